"""Second steps of merging methods that work entry by entry: sums, elected signs, SCE."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from anchors.injection.merging.sparse import largest

Vector = Float[Tensor, "*shape"]


def both(
    tau_v: Vector, tau_e: Vector, parameters: Mapping[str, Any], generator: Generator
) -> tuple[Vector, Vector]:
    """A first step that leaves both task vectors as they are."""
    return tau_v, tau_e


def weighted_sum(
    a_v: Vector, a_e: Vector, vlm_strength: float, strength: float, parameters: Mapping[str, Any]
) -> Vector:
    """Δ = λ_v·A_v + λ_e·A_e."""
    return torch.mul(a_v, vlm_strength).add_(a_e, alpha=strength)


def elected(
    a_v: Vector, a_e: Vector, vlm_strength: float, strength: float, parameters: Mapping[str, Any]
) -> Vector:
    """Elect a sign for each entry, then take the mean of those who have it (TIES, steps 2 and 3).

    With s = +1 where the sum of votes is at least 0, else −1, and the members M = {i : sign A_i = s} of each entry:

    - `paper`:    votes A_i;      Δ = λ_e · Σ_M A_i / |M|. One λ; λ_v has no place (λ_e = 0 is nevertheless the VLM).
    - `peft`:     votes A_i;      Δ = Σ_M λ_i·A_i / |M|.
    - `mergekit`: votes λ_i·A_i;  Δ = Σ_M λ_i·A_i / Σ_M λ_i: a common factor of the weights has no effect, and an entry
      that only one of them has comes in whole, whatever its λ.
    - `sum`:      votes λ_i·A_i;  Δ = Σ_M λ_i·A_i, mergekit's with `normalize: false`, its default for dare_ties.

    In the first three, of two vectors that agree each counts half: with λ = 1 they inject less than task arithmetic does.
    """
    convention = parameters["convention"]
    if convention == "paper":
        vlm_strength = strength
    w_v, w_e = a_v * vlm_strength, a_e * strength
    u_v, u_e = (w_v, w_e) if convention in ("mergekit", "sum") else (a_v, a_e)
    in_v, in_e = _members(u_v, u_e)
    total = w_v.mul_(in_v).add_(w_e.mul_(in_e))
    if convention == "sum":
        return total
    if convention == "mergekit":
        share = in_v * vlm_strength + in_e * strength
        return total.div_(torch.where(share == 0, 1.0, share))
    return torch.where(in_v & in_e, total / 2, total)


def sce(
    a_v: Vector, a_e: Vector, vlm_strength: float, strength: float, parameters: Mapping[str, Any]
) -> Vector:
    """Select, calculate, erase, on δ_i = λ_i·τ_i.

    Select the `density` of the entries whose variance over the δ is not 0 that vary most; weigh each δ_i with its mean
    square η_i ∝ ‖δ_i‖²/n, Σ η = 1; erase entries against the sign of the sum: Δ = Σ_M η_i·δ_i / Σ_M η_i.

    Args:
        parameters: `density`, and `floor`: below this sum of mean squares both weigh alike. 0 by default. Published code
            has 1e-6, which deltas of fine-tuned language models (1e-4 and less) never reach, so that it weighs
            nothing there.
    """
    d_v, d_e = a_v * vlm_strength, a_e * strength
    if parameters["density"] < 1:
        variance = ((d_v - d_e) / 2).square()
        chosen = largest(variance, int(int(torch.count_nonzero(variance)) * parameters["density"]))
        d_v, d_e = d_v * chosen, d_e * chosen
    eta = torch.stack([d_v.square().mean(), d_e.square().mean()])
    total = eta.sum()
    eta = torch.where(total > parameters["floor"], eta / total, torch.full_like(eta, 0.5))
    in_v, in_e = _members(d_v, d_e)
    h_v, h_e = eta[0] * in_v, eta[1] * in_e
    share = h_v + h_e
    return (d_v.mul_(h_v).add_(d_e.mul_(h_e))).div_(torch.where(share == 0, 1.0, share))


def _members(u_v: Vector, u_e: Vector) -> tuple[Bool[Tensor, "*shape"], Bool[Tensor, "*shape"]]:
    """Which entries of either have the sign of the sum, where 0 counts as positive; an entry that is 0 has none."""
    positive = u_v + u_e >= 0
    return torch.where(positive, u_v > 0, u_v < 0), torch.where(positive, u_e > 0, u_e < 0)
