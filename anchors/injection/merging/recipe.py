"""A recipe says how two task vectors become one tower; `merge_tensor` is the one place where it is carried out.

Notation: b is the base (an LLM), v the VLM's language tower, e the expert; τ_v = v − b and τ_e = e − b are the
task vectors, λ_v (`vlm_strength`) and λ_e (`strength`) their weights, m the merged tower.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from anchors.errors import AnchorsError, nearest
from anchors.injection.merging.embeddings import POLICIES
from anchors.injection.merging.methods import METHODS, Method
from anchors.injection.merging.sign import both, weighted_sum

TABLES = ("embed_tokens.weight", "lm_head.weight")
"""Ends of the names of matrices whose rows are tokens: no linear maps of the residual stream."""

STRONGEST = 100.0
"""Of a task vector: more is a slip of the pen, and beyond the range of half precision soon."""

PIECE = 1 << 18
"""Entries that are merged at a time."""

Prepared = dict[str, tuple[Tensor | None, Tensor]]
"""By name, A_v (None: it is τ_v) and A_e: what a method makes of the task vectors before λ comes in."""


@dataclass(frozen=True)
class Recipe:
    """Everything that a merge depends on, beside the three models.

    Attributes:
        method: a name in `METHODS`.
        strength: λ_e; None is the method's own default, 1 for most.
        vlm_strength: λ_v; 1 is the VLM as it is.
        density: share of a task vector's entries that is kept, for methods that drop some; None is the method's own
            default.
        seed: of random masks.
        layers: first and last layer that are injected, both included; all other layers, the last norm, embedding and
            head then stay the VLM's. None is everywhere.
        per_layer: λ_e of each layer, from 0 on; `strength`, if given, is then that of the last norm, the embedding and
            the head, which else stay the VLM's.
        embeddings: keep (the VLM's), shared-rows (merged by row number) or by-token (by token string).
        options: the method's own, as pairs; a mapping is taken, too.

    Raises:
        AnchorsError: an unknown method or option, or a number out of its range.
    """

    method: str = "task-arithmetic"
    strength: float | None = None
    vlm_strength: float = 1.0
    density: float | None = None
    seed: int = 0
    layers: tuple[int, int] | None = None
    per_layer: tuple[float, ...] | None = None
    embeddings: str = "keep"
    options: tuple[tuple[str, Any], ...] | Mapping[str, Any] = ()

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise AnchorsError(
                f"There is no merging method {self.method!r}.",
                nearest(self.method, METHODS),
                code="unknown-name",
            )
        own = METHODS[self.method]
        put = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        default = own.strength if self.per_layer is None else 0.0
        strength = float(default if self.strength is None else self.strength)
        put("strength", strength)
        put("vlm_strength", float(self.vlm_strength))
        put("options", tuple(sorted(dict(self.options).items())))
        for name, kind in (("layers", int), ("per_layer", float)):
            if (value := getattr(self, name)) is not None:
                put(name, tuple(kind(x) for x in value))
        self._check(own, (strength, *(self.per_layer or ())))

    def _check(self, own: Method, strengths: tuple[float, ...]) -> None:
        if not all(map(math.isfinite, (*strengths, self.vlm_strength))):
            raise AnchorsError(f"A strength of {self.label()!r} is not finite.", code="merge-recipe")
        if wild := [x for x in (*strengths, self.vlm_strength) if abs(x) > STRONGEST]:
            raise AnchorsError(
                f"A strength of {wild[0]:g} would drown the model in {abs(wild[0]):g} times a task vector.",
                f"Strengths are about 1; up to {STRONGEST:g} are taken.",
                code="merge-recipe",
            )
        if self.density is not None and "density" not in own.defaults:
            raise AnchorsError(
                f"{self.method} keeps every entry of the task vectors: it takes no density.",
                f"Methods with a density: {', '.join(n for n, m in METHODS.items() if 'density' in m.defaults)}.",
                code="merge-recipe",
            )
        if "density" in own.defaults and not 0 < self.parameters()["density"] <= 1:
            raise AnchorsError(
                f"density is {self.parameters()['density']:g}; it must be a share above 0, up to 1.",
                "Density 0 would drop the whole task vector: that is --strength 0.",
                code="merge-recipe",
            )
        if self.layers is not None and not (len(self.layers) == 2 and 0 <= self.layers[0] <= self.layers[1]):
            raise AnchorsError(
                f"layers is {self.layers}; it must be the first and the last layer to inject, such as (2, 5).",
                code="layers",
            )
        if self.embeddings not in POLICIES:
            raise AnchorsError(
                f"There is no policy of embeddings {self.embeddings!r}.",
                nearest(self.embeddings, POLICIES),
                code="unknown-name",
            )
        if unknown := [name for name in dict(self.options) if name not in own.defaults or name == "density"]:
            known = [name for name in own.defaults if name != "density"]
            raise AnchorsError(
                f"{self.method} has no option {unknown[0]!r}.",
                nearest(unknown[0], known) if known else "It has none.",
                code="unknown-name",
            )
        own.check(self.parameters(), strengths, self.vlm_strength)

    def parameters(self) -> dict[str, Any]:
        """The density and the options, with the method's defaults where the recipe says nothing."""
        given = {} if self.density is None else {"density": float(self.density)}
        return {**METHODS[self.method].defaults, **given, **dict(self.options)}

    def strength_of(self, layer: int | None) -> float | None:
        """λ_e of a layer (None: last norm, embedding, head); None where the VLM stays as it is."""
        if self.layers is not None and (layer is None or not self.layers[0] <= layer <= self.layers[1]):
            return None
        if self.per_layer is not None and layer is not None:
            self.require_depth(max(layer + 1, len(self.per_layer)))
            strength = self.per_layer[layer]
        else:
            strength = self.strength
        return None if strength == 0 and self.vlm_strength == 1 else strength

    def require_depth(self, n_layers: int) -> None:
        """Refuse a recipe for towers of another depth.

        Raises:
            AnchorsError: `layers` or `per_layer` name layers that the tower does not have, or not all that it has.
        """
        if self.layers is not None and self.layers[1] >= n_layers:
            raise AnchorsError(
                f"layers is {self.layers}, but the tower has layers 0 to {n_layers - 1}.",
                "Give the first and the last layer to inject.",
                code="layers",
            )
        if self.per_layer is not None and len(self.per_layer) != n_layers:
            raise AnchorsError(
                f"The recipe has strengths of {len(self.per_layer)} layers, the tower has {n_layers}.",
                "Give one strength per layer of the tower.",
                code="layers",
            )

    def generator(self, name: str) -> torch.Generator:
        """Random numbers of a tensor: a function of its canonical name and the seed, whatever the order or device."""
        digest = hashlib.sha256(f"{name}\n{self.seed}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    def label(self) -> str:
        """A short text for people, such as "task-arithmetic λ=0.5"."""
        own = METHODS.get(self.method)
        parts = [self.method, f"λ={self.strength:g}"]
        if self.per_layer is not None:
            parts[1:] = [f"λ={','.join(f'{x:g}' for x in self.per_layer)}", f"else {self.strength:g}"]
        if self.vlm_strength != 1:
            parts.append(f"λv={self.vlm_strength:g}")
        if self.density is not None:
            parts.append(f"d={self.density:g}")
        parts += [f"{name}={value}" for name, value in dict(self.options).items()]
        if self.layers is not None:
            parts.append(f"layers {self.layers[0]}–{self.layers[1]}")
        if self.embeddings != "keep":
            parts.append(self.embeddings)
        if own is not None and own.random and self.seed:
            parts.append(f"seed {self.seed}")
        return " ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """Fit for JSON."""
        return asdict(self) | {"options": dict(self.options)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Recipe":
        """The recipe that `as_dict` wrote, from JSON or not."""
        if unknown := sorted(set(fields) - set(cls.__dataclass_fields__)):
            raise AnchorsError(f"A recipe has no field {unknown[0]!r}.", code="unknown-name")
        return cls(**fields)


def merge_tensor(
    recipe: Recipe,
    name: str,
    b: Shaped[Tensor, "*shape"],
    v: Shaped[Tensor, "*shape"],
    e: Shaped[Tensor, "*shape"],
    layer: int | None = None,
    cache: Prepared | None = None,
    dtype: torch.dtype = torch.float32,
) -> Shaped[Tensor, "*shape"]:
    """One tensor of the merged tower, by float32 arithmetic on the device of `v`.

    m = b + Δ, where Δ is the method's; computed as v + (Δ − τ_v), so that an entry that the method leaves alone keeps
    its bits. Where λ_e is 0 and λ_v is 1, and outside the recipe's layers, the answer is `v` itself, whatever the
    method. Integers are never merged: `v` where base and expert have the same.

    Args:
        recipe: how.
        name: the canonical name, which seeds random masks.
        b, v, e: base, VLM and expert, of one shape.
        layer: None for the last norm, the embedding and the head.
        cache: keeps what does not depend on λ (masks, factors) from call to call; of one recipe but for its λ, and of
            the same three models.
        dtype: of the answer, where it is not `v` itself.

    Raises:
        AnchorsError: shapes that differ, integers that differ or meet floats, NaN or infinity (also where the density
            would have dropped it).
    """
    strength = recipe.strength_of(layer)
    if strength is None:
        return v
    if not b.shape == v.shape == e.shape:
        shapes = ", ".join(f"{who} {tuple(t.shape)}" for who, t in (("base", b), ("VLM", v), ("expert", e)))
        raise AnchorsError(
            f"{name} has shapes that differ: {shapes}.",
            "All three must be of one family and size.",
            code="merge-layout",
        )
    if not (b.is_floating_point() and v.is_floating_point() and e.is_floating_point()):
        if not v.is_floating_point() and torch.equal(b.to(e.device), e):
            return v
        raise AnchorsError(
            f"{name} holds {b.dtype} in the base, {v.dtype} in the VLM and {e.dtype} in the expert: integers have no "
            "mean.",
            "Take checkpoints that are not quantised.",
            code="quantised",
        )
    if v.device.type == "cpu" and v.numel() > PIECE and _entrywise(recipe, name, v):
        # Of a large tensor no more than a piece is in float32 at a time, and that in the processor's cache.
        merged = torch.empty_like(v, dtype=dtype, memory_format=torch.contiguous_format)
        for into, base, own, other in zip(
            *(t.view(-1).split(PIECE) for t in (merged, *(t.detach().contiguous() for t in (b, v, e)))),
            strict=True,
        ):
            into.copy_(merge_tensor(recipe, name, base, own, other, layer))
        return merged
    return _merged(recipe, name, b, v, e, strength, cache).to(dtype)


def _entrywise(recipe: Recipe, name: str, v: Tensor) -> bool:
    """Whether an entry of the merged tensor depends on the same entry of the three, and on nothing else."""
    method = METHODS[recipe.method]
    summed = method.prepare is both and method.combine is weighted_sum
    return method.blend or summed or (method.linear_only and _no_map(name, v))


def _no_map(name: str, v: Tensor) -> bool:
    """Whether a tensor is no linear map of the residual stream."""
    return v.dim() != 2 or name.endswith(TABLES)


def _merged(
    recipe: Recipe, name: str, b: Tensor, v: Tensor, e: Tensor, strength: float, cache: Prepared | None
) -> Float[Tensor, "*shape"]:
    b, v, e = (t.detach().to(device=v.device, dtype=torch.float32) for t in (b, v, e))
    method, weight, parameters = METHODS[recipe.method], recipe.vlm_strength, recipe.parameters()
    if method.blend:
        _require_finite(name, v.sum() + e.sum(), b, v, e)
        return torch.lerp(v, e, strength)
    prepare, combine = method.prepare, method.combine
    if method.linear_only and _no_map(name, v):
        prepare, combine = both, weighted_sum
        strength, weight = strength * method.rest, weight * method.rest
    if cache is not None and name in cache:
        a_v, a_e = cache[name]
    else:
        tau_e = e - b
        _require_finite(name, v.sum() + tau_e.sum(), b, v, e)
        if prepare is both:
            a_v, a_e = None, tau_e
        else:
            tau_v = v - b
            a_v, a_e = prepare(tau_v, tau_e, parameters, recipe.generator(name))
            a_v = None if a_v is tau_v else a_v
            if cache is not None:
                cache[name] = a_v, a_e
    if a_v is None and combine is weighted_sum and weight == 1:
        # Into the memory of τ_e where nobody keeps it.
        return torch.add(v, a_e, alpha=strength, out=a_e if prepare is both else None)
    tau_v = v - b
    return combine(tau_v if a_v is None else a_v, a_e, weight, strength, parameters).sub_(tau_v).add_(v)


def _require_finite(name: str, total: Tensor, b: Tensor, v: Tensor, e: Tensor) -> None:
    """Refuse NaN and infinity, which survive the sum `total`."""
    if torch.isfinite(total):
        return
    for who, tensor in (("the base", b), ("the VLM", v), ("the expert", e)):
        if bad := int((~torch.isfinite(tensor)).sum()):
            raise AnchorsError(
                f"{name} of {who} holds {bad} numbers that are NaN or infinite.",
                "The checkpoint is damaged, or its training broke; take another.",
                code="not-finite",
            )
