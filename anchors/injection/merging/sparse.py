"""First steps of merging methods that drop entries of a task vector.

Each is P(τ, parameters, random numbers) → the task vector with dropped entries 0. Density 0 drops all, density 1 none.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor

Vector = Float[Tensor, "*shape"]
Prune = Callable[[Vector, Mapping[str, Any], Generator], Vector]


def pruned(prune: Prune) -> Callable[..., tuple[Vector, Vector]]:
    """A first step that prunes the expert's task vector, and with `drop=both` the VLM's, too."""

    def prepare(
        tau_v: Vector, tau_e: Vector, parameters: Mapping[str, Any], generator: Generator
    ) -> tuple[Vector, Vector]:
        # The expert first: its mask is then the same whatever happens to the other.
        a_e = _pruned(prune, tau_e, parameters, generator)
        return _pruned(prune, tau_v, parameters, generator) if parameters["drop"] == "both" else tau_v, a_e

    return prepare


def _pruned(prune: Prune, tau: Vector, parameters: Mapping[str, Any], generator: Generator) -> Vector:
    if parameters["density"] == 1 or tau.numel() == 0:
        return tau
    return torch.zeros_like(tau) if parameters["density"] == 0 else prune(tau, parameters, generator)


def dare(tau: Vector, parameters: Mapping[str, Any], generator: Generator) -> Vector:
    """DARE: each entry stays with probability d, and what stays is rescaled.

    `rescale` is `density` (the paper: 1/d, so that the mean over masks is τ), `l1` (mergekit: ‖τ‖₁/‖masked‖₁) or
    `none` (peft up to 0.18.1 and code copied from it, by mistake: the mean over masks is d·τ, task arithmetic with λ·d).
    """
    d = parameters["density"]
    return _rescaled(tau, _uniform(tau, generator) < d, d, parameters["rescale"])


def della(tau: Vector, parameters: Mapping[str, Any], generator: Generator) -> Vector:
    """MagPrune of DELLA: like DARE, but an entry's probability to stay rises with its magnitude.

    p = d − ε + 2ε·rank/(n − 1), where rank (0 … n − 1) is the place of |τ| among the n of its row (the last axis; all
    higher axes of a row together). A row of one has p = d.

    `rescale` is `density` (the paper: 1/p, entry by entry), `l1` (mergekit) or `none`.
    """
    d, epsilon = parameters["density"], parameters["epsilon"]
    rows = tau.abs().flatten(1) if tau.dim() > 1 else tau.abs().reshape(1, -1)
    n = rows.shape[1]
    order = rows.argsort(dim=1, stable=True)
    places = torch.linspace(d - epsilon, d + epsilon, n) if n > 1 else torch.tensor([d])
    keep = torch.empty_like(rows).scatter_(1, order, places.to(rows).expand_as(rows)).reshape(tau.shape)
    return _rescaled(tau, _uniform(tau, generator) < keep, keep, parameters["rescale"])


def trim(tau: Vector, parameters: Mapping[str, Any], generator: Generator) -> Vector:
    """Keep the ⌊d·n⌋ entries (at least one) of largest magnitude (TIES, step 1)."""
    return tau * largest(tau.abs(), max(1, int(parameters["density"] * tau.numel())))


def breadcrumbs(tau: Vector, parameters: Mapping[str, Any], generator: Generator) -> Vector:
    """Drop the largest γ·n entries, then the smallest until ⌊d·n⌋ are left; fewer large ones where γ + d > 1."""
    n, magnitude = tau.numel(), tau.abs()
    kept = int(parameters["density"] * n)
    top = min(int(parameters["gamma"] * n), n - kept)
    return tau * (largest(magnitude, top + kept) & ~largest(magnitude, top))


def largest(values: Vector, count: int) -> Bool[Tensor, "*shape"]:
    """True at the `count` largest values; of equal ones the first, so that masks of growing counts are nested.

    By selection, not by sorting; no quantile, which torch refuses above 16 million entries.
    """
    flat = values.reshape(-1)
    if not 0 < count < flat.numel():
        return torch.full_like(values, count > 0, dtype=torch.bool)
    place = flat.numel() - count
    if flat.device.type == "cpu":
        threshold = float(np.partition(flat.numpy(), place)[place])  # ten times as fast as kthvalue
    else:
        threshold = torch.kthvalue(flat, place + 1).values
    mask = flat > threshold
    mask[(flat == threshold).nonzero()[: count - int(mask.sum()), 0]] = True
    return mask.reshape(values.shape)


def _uniform(tau: Vector, generator: Generator) -> Vector:
    """Drawn on the CPU, whatever the device. One draw for all densities: masks of growing densities are nested."""
    return torch.rand(tau.shape, generator=generator, dtype=torch.float32).to(tau.device)


def _rescaled(tau: Vector, mask: Bool[Tensor, "*shape"], keep: float | Vector, rescale: str) -> Vector:
    masked = tau * mask
    if rescale == "density":
        return masked.div_(keep)
    if rescale == "none":
        return masked
    left = masked.abs().sum()
    return masked.mul_(torch.where(left > 0, tau.abs().sum() / left, 1.0))
