"""What two task vectors look like before they are merged, and whether the base can be right.

    found = inspect("llava", "math-expert", "llama")
    found.layers, found.total, found.warnings

τ_v = v − b and τ_e = e − b, of the vision-language model's tower v, the expert e and the base b, in float32, one
tensor at a time.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from anchors.injection.merging.base import UNRELATED, differing, ratio
from anchors.injection.merging.merge import Report
from anchors.injection.merging.sources import Source, Sources

NEARER = 0.5
"""‖v − e‖ / ‖v − b‖ below which the expert, or what it was made from, is the likelier base."""
ALIKE = 0.8
"""Cosine of τ_v and τ_e above which both contain a third thing; trainings on different data stay far below."""
FURTHER = 3.0
"""‖τ_v‖ / ‖τ_e‖ above which the tower has left the base further than an expert does."""
ROUNDED = 0.5
"""Share of exactly zero deltas above which the type on disk has swallowed most of a training."""

_SHOWN = 3


@dataclass(frozen=True)
class Inspection:
    """Two task vectors, measured.

    The tables have these columns, NaN where there is nothing to divide by, or a model holds NaN or infinity:
        entries: numbers.
        norm_base, norm_vlm, norm_expert, distance: ‖b‖, ‖τ_v‖, ‖τ_e‖, ‖v − e‖ (Frobenius).
        cosine: of τ_v and τ_e.
        conflicts: share of entries that differ in sign, among those that both task vectors change.
        zeros_vlm, zeros_expert: share of exactly zero deltas, in those tensors that changed at all: changes below the
            resolution of bfloat16 vanish.

    Attributes:
        rows: one row per layer (NA outside layers) and module (attention, mlp, norm, embedding, head).
        layers: one row per layer.
        total: the measures over everything.
        warnings: tensors with NaN or infinity, configurations that differ, signs of a wrong base or of a useless
            expert, as sentences; none if all is well.
    """

    rows: pd.DataFrame
    layers: pd.DataFrame
    total: Mapping[str, float]
    warnings: tuple[str, ...]


def inspect(
    vlm: Source,
    expert: Source,
    base: Source | None,
    *,
    embeddings: str = "keep",
    report: Report | None = None,
) -> Inspection:
    """Measure both task vectors, layer by layer, and look for signs of a wrong base.

    Args:
        vlm: the vision-language model: directory, hub id, or an open `Checkpoint`.
        expert: the language model with the skill.
        base: the language model that both others should have been made from.
        embeddings: as in a recipe; with `keep`, embedding and head are left out.
        report: told of every tensor.

    Raises:
        AnchorsError: a model cannot be read, or does not fit.
    """
    sources = Sources.open(vlm, expert, base, embeddings)
    names = list(sources.merged())
    rows, broken = [], []
    for done, name in enumerate(names, 1):
        where = {"layer": sources.pairs[name][0].layer, "module": sources.part(name)}
        tensors = [tensor.float() for tensor in sources.shared(name)]
        rows.append(where | _sums(*tensors))
        for role, tensor in zip(("base", "vision-language model", "expert"), tensors, strict=True):
            if not torch.isfinite(tensor).all():
                broken.append(f"{name} of the {role}")
        if report is not None:
            report(done, len(names), name)
    sums = pd.DataFrame(rows).astype({"layer": "Int64"})
    layers = sums.drop(columns="module").dropna(subset=["layer"])
    total = _measures(sums.drop(columns=["layer", "module"]).sum(skipna=False).to_frame().T).iloc[0].to_dict()
    return Inspection(
        _measures(
            sums.groupby(["layer", "module"], dropna=False, sort=False).sum(skipna=False)
        ).reset_index(),
        _measures(layers.groupby("layer").sum(skipna=False)).reset_index(),
        total,
        (*_damaged(broken), *differing(sources), *sources.expert.notes, *warnings_of(total)),
    )


def warnings_of(total: Mapping[str, float]) -> tuple[str, ...]:
    """Signs of a wrong base, or of an expert that cannot do anything, in the measures over everything.

    A tower or expert that was trained from another model than the base (from its instruct version, say) has the
    whole difference of these two in its task vector. Averages hide it; TIES, DARE and the like do not.
    """
    base, vlm, expert = (total[f"norm_{role}"] for role in ("base", "vlm", "expert"))
    found = []
    if expert == 0:
        return ("The expert is the base, bit for bit: there is nothing to inject.",)
    for role, norm in (("tower", vlm), ("expert", expert)):
        if norm > UNRELATED * base:
            found.append(
                f"Little of the base is left in the {role} (‖τ‖ is {ratio(norm, base):.2f} ‖b‖): it was trained from "
                "another model."
            )
    if total["distance"] < NEARER * vlm:
        found.append(
            f"The tower is nearer to the expert than to the base ({total['distance'] / vlm:.2f} of the distance): the "
            "expert, or the model it was trained from, is the likelier base."
        )
    if total["cosine"] > ALIKE:
        found.append(
            f"Both task vectors point the same way (cosine {total['cosine']:.2f}): tower and expert were both trained "
            "from a third model, which is the right base; injecting adds what they share twice."
        )
    if vlm > FURTHER * expert:
        found.append(
            f"The tower is {vlm / expert:.1f} times as far from the base as the expert is: it was trained from another "
            "model (an instruct version?), or so long that little can be injected."
        )
    for role, name in (("tower", "vlm"), ("expert", "expert")):
        if (share := total[f"zeros_{name}"]) > ROUNDED:
            found.append(
                f"{share:.0%} of the {role}'s deltas are exactly zero: most of its training is below the resolution "
                "of the type on disk. Take a float32 checkpoint if there is one."
            )
    return tuple(found)


def _damaged(broken: list[str]) -> tuple[str, ...]:
    if not broken:
        return ()
    more = f" and {len(broken) - _SHOWN} more" if len(broken) > _SHOWN else ""
    return (
        f"There are numbers that are NaN or infinite in {', '.join(broken[:_SHOWN])}{more}: the checkpoint is damaged, "
        "or its training broke.",
    )


def _sums(
    b: Float[Tensor, "*shape"], v: Float[Tensor, "*shape"], e: Float[Tensor, "*shape"]
) -> dict[str, float]:
    """What adds up over tensors."""
    tau_v, tau_e = v - b, e - b
    signs = tau_v.sign() * tau_e.sign()
    zeros = {role: int((tau == 0).sum()) for role, tau in (("vlm", tau_v), ("expert", tau_e))}
    return {
        "entries": b.numel(),
        "base": _square(b),
        "vlm": _square(tau_v),
        "expert": _square(tau_e),
        "apart": _square(v - e),
        "dot": float((tau_v * tau_e).sum(dtype=torch.float64)),
        "both": int((signs != 0).sum()),
        "opposed": int((signs < 0).sum()),
        **{f"zero_{role}": count if count < b.numel() else 0 for role, count in zeros.items()},
        **{f"touched_{role}": b.numel() if count < b.numel() else 0 for role, count in zeros.items()},
    }


def _square(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


def _measures(sums: pd.DataFrame) -> pd.DataFrame:
    sums = sums.astype(float)
    return pd.DataFrame(
        {
            "entries": sums["entries"].astype(int),
            "norm_base": sums["base"] ** 0.5,
            "norm_vlm": sums["vlm"] ** 0.5,
            "norm_expert": sums["expert"] ** 0.5,
            "distance": sums["apart"] ** 0.5,
            "cosine": sums["dot"] / (sums["vlm"] * sums["expert"]) ** 0.5,
            "conflicts": sums["opposed"] / sums["both"],
            "zeros_vlm": sums["zero_vlm"] / sums["touched_vlm"],
            "zeros_expert": sums["zero_expert"] / sums["touched_expert"],
        }
    )
