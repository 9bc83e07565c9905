"""Steps of merging methods for matrices of linear layers, W [out, in]: singular directions and interference.

Factors come from the eigenvectors of the Gram matrix of the shorter side, in float64: as exact as a singular value
decomposition in float32 down to 1e-6 of the largest singular value, and quick on a GPU, where torch's own is slow.
Directions below that are rounding, have no direction of their own, and are left out.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor

Matrix = Float[Tensor, "out in"]

FLAT = 1e-6
"""Singular values below this share of the largest are rounding."""


def spectrum(
    matrix: Matrix, count: int | None = None
) -> tuple[Float[Tensor, "out k"], Float[Tensor, " k"], Float[Tensor, "in k"]]:
    """The largest `count` singular values S and their directions U, V in float64: matrix ≈ U·diag(S)·Vᵀ.

    Columns of singular values that are rounding are 0.
    """
    if matrix.shape[0] < matrix.shape[1]:
        v, s, u = spectrum(matrix.T, count)
        return u, s, v
    matrix = matrix.double()
    values, v = torch.linalg.eigh(matrix.T @ matrix)
    s, v = values.flip(0)[:count].clamp(min=0).sqrt(), v.flip(1)[:, :count]
    real = s > FLAT * s[:1]
    s, v = s * real, v * real
    return matrix @ v / torch.where(real, s, 1.0), s, v


def polar(matrix: Matrix) -> Matrix:
    """The nearest matrix with orthonormal columns (or rows), U·Vᵀ of U·S·Vᵀ: the solution of Procrustes' problem."""
    if matrix.shape[0] < matrix.shape[1]:
        return polar(matrix.T).T
    matrix = matrix.double()
    values, v = torch.linalg.eigh(matrix.T @ matrix)
    real = values > FLAT**2 * values[-1:]
    return matrix @ ((v * torch.where(real, values, 1.0).rsqrt() * real) @ v.T)


def tsv(
    tau_v: Matrix, tau_e: Matrix, parameters: Mapping[str, Any], generator: Generator
) -> tuple[Matrix, Matrix]:
    """TSV-M: the leading half of each task vector's singular directions, made orthogonal to the other's.

    τ_i = U_i·S_i·V_iᵀ, of rank k = r/2 each (r the shorter side); Û = polar([U_v U_e]), V̂ = polar([V_v V_e]);
    A_i = Û_i·S_i·V̂_iᵀ. Δ = Σ λ_i·A_i, so TSV-M is task arithmetic on task vectors freed of what they share.
    The paper's α is λ_v = λ_e.
    """
    k = max(1, min(tau_v.shape) // 2)
    parts = [spectrum(tau, k) for tau in (tau_v, tau_e)]
    u, v = (polar(torch.cat([part[side] for part in parts], dim=1)) for side in (0, 2))
    a_v, a_e = (
        ((u[:, at] * part[1]) @ v[:, at].T).to(tau_v.dtype)
        for part, at in zip(parts, (slice(0, k), slice(k, 2 * k)), strict=True)
    )
    return a_v, a_e


def iso_c(
    a_v: Matrix, a_e: Matrix, vlm_strength: float, strength: float, parameters: Mapping[str, Any]
) -> Matrix:
    """Iso-C: the sum of the task vectors with all singular values at their mean.

    M = Σ λ_i·τ_i = U·S·Vᵀ; Δ = mean(S)·U·Vᵀ. The paper's α is λ_v = λ_e.
    """
    u, s, v = spectrum(vlm_strength * a_v + strength * a_e)
    return (s.mean() * (u @ v.T)).to(a_v.dtype)


def iso_cts(
    a_v: Matrix, a_e: Matrix, vlm_strength: float, strength: float, parameters: Mapping[str, Any]
) -> Matrix:
    """Iso-CTS: Iso-C whose weakest directions make room for those of either task alone.

    The `common` share of the r directions is that of the sum M of δ_i = λ_i·τ_i, U_c its left ones; the others are, half
    and half, the leading ones of δ_i − U_c·U_cᵀ·δ_i. Û and V̂ are the polar factors of all together, and
    Δ = mean(S)·Û·V̂ᵀ over their singular values.
    """
    deltas = vlm_strength * a_v, strength * a_e
    r = min(a_v.shape)
    own = (r - min(r, round(parameters["common"] * r))) // 2
    parts = [spectrum(deltas[0] + deltas[1], r - 2 * own)]
    u = parts[0][0]
    if own:
        parts += [spectrum(delta - u @ (u.T @ delta.double()), own) for delta in deltas]
    u, s, v = (torch.cat(part, dim=-1) for part in zip(*parts, strict=True))
    return (s.mean() * (polar(u) @ polar(v).T)).to(a_v.dtype)


def wudi(
    a_v: Matrix, a_e: Matrix, vlm_strength: float, strength: float, parameters: Mapping[str, Any]
) -> Matrix:
    """WUDI: the change whose interference with each task is small on inputs that the task vectors themselves span.

    Δ from δ_v + δ_e, δ_i = λ_i·τ_i, by `iterations` steps of Adam with rate `lr` on

        Σ_i ‖(Δ − δ_i)·τ_iᵀ‖² / ‖τ_i‖².

    Adam's steps have a size of their own, so a common factor of λ_v and λ_e is not quite one of Δ; and 300 steps of 1e-5
    move no entry by more than about 0.003. A step costs out·in² multiplications for a matrix: for 135M parameters
    hours on a CPU core.
    """
    pairs = [(vlm_strength * a_v, a_v), (strength * a_e, a_e)]
    grams = [tau.T @ tau / tau.square().sum().clamp(min=torch.finfo(tau.dtype).tiny) for _, tau in pairs]
    gram = 2 * (grams[0] + grams[1])
    target = 2 * (pairs[0][0] @ grams[0] + pairs[1][0] @ grams[1])
    change = (pairs[0][0] + pairs[1][0]).requires_grad_(False)
    adam = torch.optim.Adam([change], lr=parameters["lr"])
    for _ in range(parameters["iterations"]):
        change.grad = change @ gram - target
        adam.step()
    return change.detach()


def interference(change: Matrix, tau_v: Matrix, tau_e: Matrix, vlm_strength: float, strength: float) -> float:
    """The sum that WUDI makes small."""
    deltas = (vlm_strength * tau_v, tau_v), (strength * tau_e, tau_e)
    return sum(
        float(((change - delta) @ tau.T).square().sum() / tau.square().sum())
        for delta, tau in deltas
        if tau.any()
    )
