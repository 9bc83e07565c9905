"""The three sums of the information flow (2.1)."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Sums:
    """S_wp, S_pq, S_ww, each per example and layer, raw (not divided by their sum).

    Attributes:
        s_wp: mean flow from the words before a label word to that label word.
        s_pq: mean flow from label words to the target.
        s_ww: mean flow between all other pairs.
    """

    s_wp: Float[Tensor, "batch layers"]
    s_pq: Float[Tensor, "batch layers"]
    s_ww: Float[Tensor, "batch layers"]


def flow_sums(
    label_rows: Float[Tensor, "batch layers labels key"],
    target_row: Float[Tensor, "batch layers key"],
    total: Float[Tensor, "batch layers"],
    labels: Int[Tensor, "batch labels"],
    target: Int[Tensor, " batch"],
) -> Sums:
    """The sums from a few rows of I_l and its total.

        S_wp = Σ_k Σ_{j<p_k} I_l[p_k, j] / Σ_k p_k
        S_pq = Σ_k I_l[q, p_k] / C'
        S_ww = (Σ_{j<i≤q} I_l[i, j] − both numerators) / (number of these pairs − both counts)

    Positions count from 0, so Σ_k p_k is the number of pairs (p_k, j<p_k).

    Args:
        label_rows: I_l[p_k, ·], zero on and above the diagonal.
        target_row: I_l[q, ·].
        total: Σ_{j<i≤q} I_l[i, j].
        labels: p_k, -1 where an example has fewer label words than others.
        target: q.
    """
    real = labels >= 0
    wp = (label_rows.sum(-1) * real[:, None]).sum(-1)
    columns = labels.clamp(min=0)[:, None].expand(-1, target_row.shape[1], -1)
    pq = (target_row.gather(-1, columns) * real[:, None]).sum(-1)
    pairs_wp = (labels * real).sum(-1, keepdim=True)
    pairs_pq = real.sum(-1, keepdim=True)
    pairs = (target * (target + 1) // 2)[:, None]
    others = (pairs - pairs_wp - pairs_pq).clamp(min=1)
    return Sums(wp / pairs_wp.clamp(min=1), pq / pairs_pq.clamp(min=1), (total - wp - pq) / others)


def left_out(
    target_row: Float[Tensor, "batch layers key"],
    others: Bool[Tensor, "batch key"],
    labels: Int[Tensor, "batch labels"],
) -> Float[Tensor, "batch layers"]:
    """The flow from the label words to the target that S_pq does not count, on S_pq's own scale.

        S_rest = Σ_{j ∈ R} I_l[q, j] / C'        R: the tokens of the label words that are no p_k

    The policy `first` (or `last`) counts one token of a label word; where a word has several, the target may read the
    others. Their flow is part of S_ww, and S_rest / (S_pq + S_rest) is the share that S_pq leaves out.

    Args:
        target_row: I_l[q, ·].
        others: R.
        labels: p_k, -1 where an example has fewer label words than others; C' is how many there are.
    """
    whole = (target_row * others[:, None]).sum(-1)
    return whole / (labels >= 0).sum(-1, keepdim=True).clamp(min=1)


def evenness(parts: Float[Tensor, "layers labels"]) -> Float[Tensor, " layers"]:
    """How evenly label words share in what flows from them to the target: 0 where one gives all, 1 where all give alike.

        −Σ_k f_k log f_k / log K,   f_k = I_l[q, p_k] / Σ_k I_l[q, p_k]

    Missing where nothing flows from them, and where there is only one.

    Args:
        parts: I_l[q, p_k] of the K label words.
    """
    share = parts / parts.sum(-1, keepdim=True)
    return (
        torch.special.entr(share).sum(-1) / math.log(parts.shape[-1])
        if parts.shape[-1] > 1
        else share[:, 0] * torch.nan
    )


def target_sums(
    target_row: Float[Tensor, "batch layers key"],
    total: Float[Tensor, "batch layers"],
    target: Int[Tensor, " batch"],
) -> tuple[Float[Tensor, "batch layers"], Float[Tensor, "batch layers"]]:
    """S_tq and S_ww of prompts without label words.

        S_tq = Σ_{j<q} I_l[q, j] / q                        S_ww = Σ_{j<i<q} I_l[i, j] / (q (q − 1) / 2)

    Args:
        target_row: I_l[q, ·].
        total: Σ_{j<i≤q} I_l[i, j].
        target: q.
    """
    into, q = target_row.sum(-1), target[:, None]
    return into / q, (total - into).clamp(min=0) / (q * (q - 1) // 2).clamp(min=1)


def map_sums(flow: Float[Tensor, "layers query key"], labels: list[int], target: int) -> Sums:
    """The same sums from the whole map of one example, as literal loops over pairs."""
    wp, pq, ww = (torch.zeros(len(flow), dtype=torch.float64) for _ in range(3))
    counts = [0, 0, 0]
    for i in range(target + 1):
        for j in range(i):
            if i == target and j in labels:
                pq, which = pq + flow[:, i, j], 1
            elif i in labels:
                wp, which = wp + flow[:, i, j], 0
            else:
                ww, which = ww + flow[:, i, j], 2
            counts[which] += 1
    return Sums(*(s[None] / max(n, 1) for s, n in zip((wp, pq, ww), counts, strict=True)))
