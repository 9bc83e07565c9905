"""Injection in memory, for a while: the model that is there, with other weights, and then the old ones again.

    vectors = TaskVectors.of(vlm, base, expert)
    for strength in (0.5, 1.0, 1.5):
        with inject(vlm, vectors, "dare", strength, density=0.5) as injected:
            print(injected.recipe.label(), injected.relative, accuracy(vlm))

Parameters get other tensors and their own ones back, so nothing is copied and the old bits cannot be lost. What does
not depend on λ is kept between calls that differ in λ only; another method, density, seed or model drops it.
"""

import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from anchors.digest import marks
from anchors.errors import AnchorsError
from anchors.injection.merging.embeddings import SharedRows, Vocabulary, align
from anchors.injection.merging.mapping import Pair, Tower, agree, tower
from anchors.injection.merging.recipe import Prepared, Recipe, merge_tensor
from anchors.injection.merging.stacks import Apart, apart

Weights = nn.Module | Mapping[str, Tensor]
"""A model of transformers, or its state dict."""

_UNTIED = (
    "The {} has a head of its own, the vision-language model's head is its embedding: one cannot be both."
)


@dataclass
class _Kept:
    """What calls on the same weights share (`size`, ‖v‖), and those that differ in λ only (`prepared`)."""

    weights: tuple[Tensor, ...] = ()
    marks: list[int] = field(default_factory=list)
    size: float = 0.0
    recipe: Recipe | None = None
    prepared: Prepared = field(default_factory=dict)
    rows: dict[tuple[str, int, int, int], SharedRows] = field(default_factory=dict)

    def of(self, recipe: Recipe, tower: Sequence[Tensor], others: Sequence[Tensor]) -> Prepared:
        """What was prepared for this recipe from these very numbers; else nothing yet."""
        # Not torch's version counters: fused optimizers and writes to `.data` leave them as they are.
        weights = (*tower, *others)
        found = [*marks(weights), *(own.data_ptr() for own in weights)]
        if found != self.marks:
            norms = torch.stack([_norm(own.float()) for own in tower])
            # The tensors are held, so that an address means what it meant.
            self.weights, self.marks, self.size, self.recipe = weights, found, float(_norm(norms)), None
        recipe = replace(recipe, strength=1.0, vlm_strength=1.0, layers=None, per_layer=None)
        if recipe != self.recipe:
            self.recipe, self.prepared = recipe, {}
        return self.prepared


@dataclass(frozen=True)
class TaskVectors:
    """Base and expert, tensor by tensor of a vision-language model's tower.

    Attributes:
        pairs: the tensors of the tower; of experts in a stack, each matrix by itself.
        base: the base's, by the names of the vision-language model.
        expert: the expert's, by the same names.
        vocabularies: token strings to rows of vision-language model, base and expert; None where unknown.
        untied: why embeddings cannot be merged, where a head of its own has no place in the tower; else empty.
        apart: which of the tower's tensors lie in stacks of experts.
    """

    pairs: tuple[Pair, ...]
    base: Mapping[str, Tensor]
    expert: Mapping[str, Tensor]
    vocabularies: tuple[Vocabulary, ...] | None = None
    untied: str = ""
    apart: Apart = field(default_factory=lambda: apart({}))
    _kept: _Kept = field(default_factory=_Kept, repr=False, compare=False)

    @classmethod
    def of(
        cls,
        vlm: Weights,
        base: Weights,
        expert: Weights,
        *,
        tokenizers: Sequence[PreTrainedTokenizerBase] | None = None,
    ) -> "TaskVectors":
        """The task vectors of a vision-language model and an expert over a base.

        Args:
            vlm, base, expert: models of transformers or their state dicts. Base and expert go to the device of the
                vision-language model; there they are not copied.
            tokenizers: of the same three, for embeddings that are merged by token.

        Raises:
            AnchorsError: base or expert do not fit the language tower.
        """
        own, ours, theirs = (_weights(side) for side in (vlm, base, expert))
        seen, *places = (
            apart({name: side[name].shape for name in _once(side)}) for side in (own, ours, theirs)
        )
        towers = [
            tower(seen.shapes, place.shapes, name)
            for place, name in zip(places, ("the base", "the expert"), strict=True)
        ]
        both = agree(*towers)
        untied = _untied(towers[0], ours, "base") or _untied(towers[1], theirs, "expert")
        embedding = next(pair for pair in both if pair[0].kind == "embedding")
        head = next((pair for pair in both if pair[0].kind == "head"), None)
        if head is not None and torch.equal(own[head[0].vlm], own[embedding[0].vlm]):
            # Bit for bit its embedding: merged as such, with the same masks.
            for side, i, name in ((ours, 0, "base"), (theirs, 1, "expert")):
                if not torch.equal(side[head[i].llm], side[embedding[i].llm]):
                    untied = untied or _UNTIED.format(name)
            both = [
                (replace(pair, canonical=embedding[0].canonical), other)
                if pair.kind == "head"
                else (pair, other)
                for pair, other in both
            ]
        devices = {pair.vlm: seen.taken(own, pair.vlm).device for pair, _ in both}
        return cls(
            pairs=tuple(pair for pair, _ in both),
            base={pair.vlm: places[0].taken(ours, pair.llm).to(devices[pair.vlm]) for pair, _ in both},
            expert={
                pair.vlm: places[1].taken(theirs, other.llm).to(devices[pair.vlm]) for pair, other in both
            },
            vocabularies=None if tokenizers is None else tuple(own.get_vocab() for own in tokenizers),
            untied=untied,
            apart=seen,
        )

    @property
    def n_layers(self) -> int:
        """Layers of the tower."""
        return 1 + max(pair.layer for pair in self.pairs if pair.layer is not None)

    @property
    def homes(self) -> dict[str, list[Pair]]:
        """By name in the vision-language model: the tensors of the tower that are there, of a stack several."""
        found: dict[str, list[Pair]] = {}
        for pair in self.pairs:
            place = self.apart.slices.get(pair.vlm)
            found.setdefault(pair.vlm if place is None else place.stack, []).append(pair)
        return found

    def whole(
        self, recipe: Recipe, pairs: Sequence[Pair], v: Tensor, cache: Prepared | None = None
    ) -> Tensor:
        """The same as `merged`, of all tensors of one home."""
        if pairs[0].vlm not in self.apart.slices:
            return self.merged(recipe, pairs[0], v, cache)
        new = v
        for pair in pairs:
            place = self.apart.slices[pair.vlm]
            own = place.of(v)
            if (made := self.merged(recipe, pair, own, cache)) is not own:
                new = v.clone() if new is v else new
                place.of(new).copy_(made)
        return new

    def merged(self, recipe: Recipe, pair: Pair, v: Tensor, cache: Prepared | None = None) -> Tensor:
        """One tensor of the merged tower, of the type of `v`; `v` itself where the recipe leaves it alone."""
        table = pair.kind in ("embedding", "head")
        if recipe.strength_of(pair.layer) is None or (table and recipe.embeddings == "keep"):
            return v
        b, e = self.base[pair.vlm], self.expert[pair.vlm]
        merge = partial(merge_tensor, recipe, pair.canonical, layer=pair.layer, cache=cache, dtype=v.dtype)
        if not table:
            return merge(b, v, e)
        if self.untied:
            raise AnchorsError(self.untied, "Take embeddings keep.", code="merge-layout")
        sizes = (len(v), len(b), len(e))
        key = (recipe.embeddings, *sizes)
        if (
            key not in self._kept.rows
            and (rows := align(recipe.embeddings, sizes, self.vocabularies)) is not None
        ):
            self._kept.rows[key] = rows
        return self._kept.rows[key].merge(b, v, e, merge)


@dataclass(frozen=True)
class Injected:
    """What an injection did to the tower.

    Attributes:
        recipe: how.
        changed: tensors of the tower that have other bits now.
        kept: tensors of the tower that do not.
        norm: ‖m − v‖, Frobenius, over the whole tower, as stored.
        relative: ‖m − v‖ / ‖v‖.
    """

    recipe: Recipe
    changed: int
    kept: int
    norm: float
    relative: float


@contextmanager
def inject(
    model: nn.Module,
    vectors: TaskVectors,
    method: str | Recipe = "task-arithmetic",
    strength: float | None = None,
    **fields: Any,
) -> Generator[Injected]:
    """Inject the expert into the language tower of a model; on leaving, also by an exception, its weights are back.

    Args:
        model: the vision-language model of `vectors`, on CPU or CUDA; other modules may share its tensors.
        vectors: from `TaskVectors.of`.
        method: a name in `METHODS`, or a whole recipe.
        strength: λ_e; None is the method's own default.
        **fields: other fields of `Recipe`.

    Raises:
        AnchorsError: the model is not the one of `vectors`, the recipe does not fit it, or it changes nothing
            although its λ_e is not 0.
    """
    recipe = _recipe(method, strength, fields)
    recipe.require_depth(vectors.n_layers)
    within = vectors.homes
    homes = _homes(model, within)
    others = [side[pair.vlm] for side in (vectors.base, vectors.expert) for pair in vectors.pairs]
    cache = vectors._kept.of(recipe, [homes[name][0].data for name in within], others)
    before: list[tuple[nn.Parameter, Tensor]] = []
    norms: list[Tensor] = []
    try:
        with torch.no_grad():
            for name, pairs in within.items():
                old = homes[name][0].data
                new = vectors.whole(recipe, pairs, old, cache)
                if new is old:
                    continue
                norms.append(_norm(new.float() - old.float()))
                for parameter in homes[name]:
                    before.append((parameter, parameter.data))
                    parameter.data = new
        yield _injected(recipe, norms, vectors, len(within))
    finally:
        for parameter, old in reversed(before):
            parameter.data = old


def _recipe(method: str | Recipe, strength: float | None, fields: Mapping[str, Any]) -> Recipe:
    if not isinstance(method, Recipe):
        return Recipe(method, strength, **fields)
    return replace(method, **({} if strength is None else {"strength": strength}), **fields)


def _injected(recipe: Recipe, norms: list[Tensor], vectors: TaskVectors, count: int) -> Injected:
    changes = [change for change in torch.stack(norms).tolist() if change] if norms else []
    strengths = recipe.per_layer or (recipe.strength,)
    if not changes and any(strengths):
        raise AnchorsError(
            f"The injection {recipe.label()!r} changes none of the tower's {count} tensors.",
            "The expert is its own base there, the density drops everything, or the change is too small for the type "
            "of the weights.",
            code="without-effect",
        )
    norm = math.hypot(*changes)
    if not math.isfinite(norm):
        raise AnchorsError(
            f"The injection {recipe.label()!r} makes numbers that are too large for the type of the weights.",
            "Lower the strength.",
            code="not-finite",
        )
    return Injected(recipe, len(changes), count - len(changes), norm, norm / (vectors._kept.size or 1.0))


def _norm(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor)


def _weights(side: Weights) -> dict[str, Tensor]:
    if isinstance(side, nn.Module):
        side = dict(side.named_parameters(remove_duplicate=False))
    return {name: tensor.detach() for name, tensor in side.items()}


def _mark(tensor: Tensor) -> tuple:
    return tensor.data_ptr(), tensor.device, tensor.shape, tensor.stride()


def _once(weights: Mapping[str, Tensor]) -> list[str]:
    """The first of all names that stand for the same memory: a tied head goes by its embedding's."""
    return list({_mark(tensor): name for name, tensor in reversed(list(weights.items()))}.values())[::-1]


def _untied(own: Tower, weights: Mapping[str, Tensor], name: str) -> str:
    if own.tied is None:
        return ""
    embedding = next(pair.llm for pair in own.pairs if pair.kind == "embedding")
    if torch.equal(weights[own.tied], weights[embedding]):
        return ""
    return _UNTIED.format(name)


def _homes(model: nn.Module, names: Iterable[str]) -> dict[str, list[nn.Parameter]]:
    """By name: all parameters that are that memory, once each."""
    named = dict(model.named_parameters(remove_duplicate=False))
    if missing := [name for name in names if name not in named]:
        raise AnchorsError(
            f"{type(model).__name__} has no parameter {missing[0]!r} ({len(missing)} are missing).",
            "Inject into the model that the task vectors were made of.",
            code="merge-layout",
        )
    owners: dict[tuple, dict[int, nn.Parameter]] = {}
    for parameter in named.values():
        owners.setdefault(_mark(parameter), {})[id(parameter)] = parameter
    return {name: list(owners[_mark(named[name])].values()) for name in names}
