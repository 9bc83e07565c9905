"""Which settings a sweep tries: methods, strengths, densities, random masks and layer ranges, each where it matters."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import Any

from anchors.errors import AnchorsError, nearest, parsed, whole_number
from anchors.injection.merging.methods import METHODS
from anchors.injection.merging.recipe import Recipe

STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
COARSE = (0.5, 1.0, 1.5)
DENSITIES = {
    "dare": (0.2, 0.5, 0.8),
    "ties": (0.2, 0.5),
    "magnitude": (0.2, 0.5),
    "della": (0.5,),
    "breadcrumbs": (0.5, 0.9),
}
METHODS_OF = {
    "small": ("task-arithmetic", "dare", "ties", "tsv-m", "average", "swap"),
    "full": (
        "task-arithmetic", "dare", "ties", "magnitude", "della", "breadcrumbs", "tsv-m", "iso-c", "wudi", "average",
        "swap",
    ),
}  # fmt: skip
SLOW = ("iso-c", "wudi")
"""Whose work begins anew at every strength; by default they get the coarse ones."""


@dataclass(frozen=True)
class Grid:
    """What is varied; None leaves it to the size.

    Attributes:
        size: small (a first look) or full.
        methods: names, with options of theirs behind colons: `ties`, `dare:rescale=none`; also with one `density` or
            `vlm_strength` (λ_v) for all settings: `task-arithmetic:vlm_strength=0.8`.
        strengths: λ_e.
        densities: of the methods that drop entries.
        draws: masks of each random method.
        layers: ranges such as `0-3`, or `all`, or `thirds`; by default all, and of task arithmetic each third of a full
            grid.
        embeddings: policies of `Recipe.embeddings`.
    """

    size: str = "full"
    methods: tuple[str, ...] | None = None
    strengths: tuple[float, ...] | None = None
    densities: tuple[float, ...] | None = None
    draws: int | None = None
    layers: tuple[str, ...] | None = None
    embeddings: tuple[str, ...] = ("keep",)

    def __post_init__(self) -> None:
        if self.size not in METHODS_OF:
            raise AnchorsError(
                f"There is no grid {self.size!r}.", nearest(self.size, METHODS_OF), code="unknown-name"
            )
        if self.draws is not None and self.draws < 1:
            raise AnchorsError(f"draws is {self.draws}; it must be at least 1.", code="option-value")
        if self.strengths is not None and 0 in self.strengths:
            raise AnchorsError(
                "Strength 0 is the VLM alone.", "It is always measured; leave it out.", code="option-value"
            )
        for text, embeddings in product(self.methods or (), self.embeddings):
            _first(text, embeddings)  # refuses what it does not know, before any model is loaded

    def recipes(self, n_layers: int) -> tuple[Recipe, ...]:
        """All settings on a tower of so many layers, each once; those that differ only in λ stand together.

        Raises:
            AnchorsError: an unknown method or option, or a range that the tower does not have.
        """
        parts = [(self.methods or METHODS_OF[self.size], self.layers or ("all",))]
        if self.layers is None and self.methods is None and self.size == "full":
            parts.append((("task-arithmetic",), ("thirds",)))
        found: list[Recipe] = []
        for methods, layers in parts:
            for text, span, embeddings in product(methods, _spans(layers, n_layers), self.embeddings):
                found += self._of(replace(_first(text, embeddings), layers=span))
        return tuple(dict.fromkeys(found))

    def _of(self, first: Recipe) -> Iterator[Recipe]:
        method, small = METHODS[first.method], self.size == "small"
        strengths = self.strengths or (COARSE if small or method.name in SLOW else STRENGTHS)
        if method.name == "swap":
            strengths = (1.0,)
        elif method.blend:
            # From 1 on it is the swap; its usual strength is smaller than any other method's.
            own = tuple(s for s in strengths if s < 1)
            strengths = (own or (method.strength,)) if self.strengths else (method.strength, *own)
        densities: Sequence[float | None] = (None,)
        if first.density is not None:
            densities = (first.density,)
        elif "density" in method.defaults:
            densities = self.densities or ((None,) if small else DENSITIES.get(method.name, (None,)))
        draws = (self.draws or (1 if small else 3)) if method.random else 1
        for density, seed, strength in product(densities, range(draws), strengths):
            yield replace(first, density=density, seed=seed, strength=strength)


def setting_of(recipe: Recipe) -> str:
    """The name of a setting: its masks are repetitions, not settings of their own."""
    return replace(recipe, seed=0).label()


def family_of(recipe: Recipe) -> str:
    """The method, with what is no number to tune: options, layers and embeddings."""
    parts = [recipe.method, *(f"{name}={value}" for name, value in recipe.options)]
    if recipe.vlm_strength != 1:
        parts.append(f"λv={recipe.vlm_strength:g}")
    if recipe.layers is not None:
        parts.append(f"layers {recipe.layers[0]}–{recipe.layers[1]}")
    return " ".join(parts + ([recipe.embeddings] if recipe.embeddings != "keep" else []))


def facts_of(recipe: Recipe) -> dict[str, Any]:
    """One row of the table of settings."""
    layers = "all" if recipe.layers is None else f"{recipe.layers[0]}-{recipe.layers[1]}"
    # The method's own density is a density, too.
    density = recipe.parameters().get("density")
    options = dict(recipe.options) | (
        {} if recipe.vlm_strength == 1 else {"vlm_strength": recipe.vlm_strength}
    )
    return {
        "setting": setting_of(recipe), "mask": recipe.seed, "family": family_of(recipe), "method": recipe.method,
        "strength": recipe.strength, "density": None if density is None else float(density), "layers": layers,
        "embeddings": recipe.embeddings, "options": json.dumps(options),
    }  # fmt: skip


def _first(text: str, embeddings: str) -> Recipe:
    """`dare:rescale=none:density=0.5` as a recipe."""
    name, *pairs = text.split(":")
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise AnchorsError(
                f"{text!r} is not a method with options.",
                "For example: dare:rescale=none",
                code="merge-recipe",
            )
        try:
            options[key] = parsed(value)
        except ValueError:
            options[key] = value
    own = {key: options.pop(key) for key in ("density", "vlm_strength") if key in options}
    if wrong := [key for key, value in own.items() if not isinstance(value, int | float)]:
        raise AnchorsError(
            f"{wrong[0]} is {own[wrong[0]]!r} in {text!r}; it must be a number.", code="merge-recipe"
        )
    return Recipe(name, options=tuple(options.items()), embeddings=embeddings, **own)


def _end(first: int, dash: str, last: str) -> int:
    """The last layer of a range; before the first, where it is none."""
    end = whole_number(last) if dash else first
    return first - 1 if end is None else end


def _spans(layers: Sequence[str], count: int) -> list[tuple[int, int] | None]:
    found: list[tuple[int, int] | None] = []
    for text in layers:
        first, dash, last = text.partition("-")
        if text == "all":
            found.append(None)
        elif text == "thirds":
            ends = [round(i * count / 3) for i in range(4)]
            found += [(a, b - 1) for a, b in pairwise(ends) if b > a]
        elif (a := whole_number(first)) is not None and a <= (b := _end(a, dash, last)) < count:
            found.append((a, b))
        else:
            raise AnchorsError(
                f"{text!r} is no range of the tower's layers 0 to {count - 1}.",
                "For example: --layers 0-3,4-7,all or --layers thirds",
                code="layers",
            )
    return found
