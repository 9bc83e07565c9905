"""What becomes of label words under block selection: the numbers, as functions of arrays. Nothing here imports torch.

With I_q the blocks that the last position q reads, p_k a label word and block(p) = ⌊p / l'⌋, the anchor selection rate is

    ASR = P(block(p_k) ∈ I_q),   by chance (n − n_forced) / (N_visible − n_forced)

over *candidates* only: blocks that q sees and that are not selected anyway (the initial and the local ones). Blocks
carry weights, the number of label words in them, so that everything is a weighted mean over blocks.
"""

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import rankdata

from anchors.nsa.geometry import Geometry

NEAR = 8
"""Neighbouring candidate blocks among which a permutation moves label words: about the same distance from q."""


def candidates(t: int, tokens: int, geometry: Geometry) -> Bool[np.ndarray, " blocks"]:
    """The blocks that position t sees and that are not selected anyway."""
    own, j = t // geometry.lp, np.arange(geometry.blocks(tokens))
    return (j >= geometry.n_init) & (j <= own - geometry.n_local)


def free(t: int, geometry: Geometry) -> int:
    """n − n_forced at position t: how many blocks it chooses."""
    seen = t // geometry.lp + 1
    forced = seen - int(candidates(t, t + 1, geometry).sum())
    return geometry.n - forced


def chance(t: int, geometry: Geometry) -> float:
    """(n − n_forced) / (N_visible − n_forced): the share of candidates that are chosen. NaN without candidates."""
    count = int(candidates(t, t + 1, geometry).sum())
    return min(free(t, geometry), count) / count if count else np.nan


def members(idx: Int[np.ndarray, "*rows n"], blocks: int) -> Bool[np.ndarray, "*rows blocks"]:
    """Chosen blocks as a mask; −1 is none."""
    found = np.zeros((*idx.shape[:-1], blocks + 1), bool)
    np.put_along_axis(found, np.where(idx < 0, blocks, idx), True, axis=-1)
    return found[..., :blocks]


def weights(positions: Int[np.ndarray, " positions"], lp: int, blocks: int) -> Int[np.ndarray, " blocks"]:
    """How many of the positions each block holds."""
    return np.bincount(np.asarray(positions, np.int64) // lp, minlength=blocks)[:blocks]


def selection_rate(
    chosen: Bool[np.ndarray, "*rows blocks"], weight: np.ndarray, candidate: Bool[np.ndarray, " blocks"]
) -> Float[np.ndarray, "*rows"]:
    """The share of the weight on candidates that is on chosen ones; NaN where there is none."""
    weight = weight * candidate
    total = weight.sum()
    return chosen @ (weight / total) if total else np.full(chosen.shape[:-1], np.nan)


def control_weights(
    weight: np.ndarray, candidate: Bool[np.ndarray, " blocks"]
) -> Float[np.ndarray, " blocks"]:
    """The weights moved to the nearest candidates without any: the distance-matched control.

    Where two are equally near each gets half. All zero when every candidate holds a label word.
    """
    found = np.zeros(len(weight))
    empty = np.flatnonzero(candidate & (weight == 0))
    for block in np.flatnonzero(candidate & (weight > 0)) if len(empty) else ():
        away = np.abs(empty - block)
        nearest = empty[away == away.min()]
        found[nearest] += weight[block] / len(nearest)
    return found


def matched(blocks: Int[np.ndarray, " wanted"], others: Int[np.ndarray, " others"]) -> np.ndarray | None:
    """For each block another one near it, all different; None when there are too few."""
    left, found = list(others), []
    if len(left) < len(blocks):
        return None
    for block in blocks:
        nearest = min(left, key=lambda other: (abs(other - block), other))
        left.remove(nearest)
        found.append(nearest)
    return np.sort(np.array(found, np.int64))


def permuted(
    weight: np.ndarray,
    candidate: Bool[np.ndarray, " blocks"],
    permutations: int,
    rng: np.random.Generator,
    near: int = NEAR,
) -> Float[np.ndarray, "permutations blocks"]:
    """The weights of candidates shuffled among `near` neighbours: where label words stand says nothing then.

    Shuffling near by keeps the distance from q, which selection may follow for reasons of its own.
    """
    found = np.zeros((permutations, len(weight)))
    places = np.flatnonzero(candidate)
    for part in np.array_split(places, max(1, round(len(places) / near))):
        found[:, part] = rng.permuted(np.tile(weight[part].astype(float), (permutations, 1)), axis=1)
    return found


def anchor_auc(
    score: Float[np.ndarray, "*rows blocks"], weight: np.ndarray, candidate: Bool[np.ndarray, " blocks"]
) -> Float[np.ndarray, "*rows"]:
    """P(a candidate with label words scores higher than one without), ties half; NaN where all or none have any."""
    anchor = weight[candidate] > 0
    have, lack = int(anchor.sum()), int((~anchor).sum())
    if not have or not lack:
        return np.full(score.shape[:-1], np.nan)
    ranks = rankdata(score[..., candidate], axis=-1)
    return (ranks[..., anchor].sum(-1) - have * (have + 1) / 2) / (have * lack)


def anchor_rank(
    score: Float[np.ndarray, "*rows blocks"], weight: np.ndarray, candidate: Bool[np.ndarray, " blocks"]
) -> Float[np.ndarray, "*rows"]:
    """The mean place of label words' blocks among candidates by score, from 0 (the first) to 1 (the last)."""
    own = weight[candidate]
    if not own.sum() or len(own) < 2:
        return np.full(score.shape[:-1], np.nan)
    ranks = rankdata(-score[..., candidate], axis=-1) - 1
    return ranks @ (own / own.sum()) / (len(own) - 1)


def recall(
    chosen: Bool[np.ndarray, "*rows blocks"],
    ideal: Bool[np.ndarray, "*rows blocks"],
    weight: np.ndarray | float = 1.0,
) -> Float[np.ndarray, "*rows"]:
    """|I ∩ I*| / |I*|, blocks counted by weight; NaN where I* has none."""
    weight = np.broadcast_to(weight, ideal.shape)
    total = (ideal * weight).sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return ((chosen & ideal) * weight).sum(-1) / total


def jaccard(
    one: Bool[np.ndarray, "*rows blocks"], other: Bool[np.ndarray, "*rows blocks"]
) -> Float[np.ndarray, "*rows"]:
    """|I ∩ I'| / |I ∪ I'|; 1 where both are empty."""
    union = (one | other).sum(-1)
    return np.where(union > 0, (one & other).sum(-1) / np.maximum(union, 1), 1.0)


def purity(
    pattern: Float[np.ndarray, "*rows tokens"],
    positions: Int[np.ndarray, " positions"],
    chosen: Bool[np.ndarray, "*rows blocks"],
    lp: int,
) -> tuple[Float[np.ndarray, "*rows"], Float[np.ndarray, "*rows"]]:
    """Of the attention on block(p), the share that lands on p itself; and 1 / (tokens of the block), its value if spread
    evenly. Means over the positions whose block is chosen; NaN where none is.

    Args:
        pattern: the selected branch's attention, over all tokens that are seen.
    """
    tokens = pattern.shape[-1]
    total, even, count = (np.zeros(pattern.shape[:-1]) for _ in range(3))
    for p in positions:
        first = p // lp * lp
        stop = min(first + lp, tokens)
        mass = pattern[..., first:stop].sum(-1)
        known = chosen[..., p // lp] & (mass > 0)
        total += np.where(known, pattern[..., p] / np.where(mass > 0, mass, 1), 0)
        even += known / (stop - first)
        count += known
    with np.errstate(invalid="ignore", divide="ignore"):
        return total / count, even / count


def over_blocks(x: Float[np.ndarray, "*rows tokens"], lp: int) -> Float[np.ndarray, "*rows blocks"]:
    """Sums of neighbouring tokens by block."""
    tokens = x.shape[-1]
    fill = -tokens % lp
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, fill)]).reshape(*x.shape[:-1], -1, lp).sum(-1)


def compressed_covering(tokens: int, l: int, d: int) -> Bool[np.ndarray, "compressed tokens"]:
    """Which tokens a compressed token stands for."""
    start = np.arange(max(0, (tokens - l) // d + 1))[:, None] * d
    j = np.arange(tokens)
    return (j >= start) & (j < start + l)


def support(
    visible: Bool[np.ndarray, "query tokens"], labels: Int[np.ndarray, " labels"], target: int
) -> dict[str, int]:
    """How many pairs of each class a branch attends to: wp (text → label word), pq (label word → target), ww (other)."""
    below = np.tril(visible, -1)[: target + 1]
    wp, pq = int(below[labels].sum()), int(below[target, labels].sum())
    return {"wp": wp, "pq": pq, "ww": int(below.sum()) - wp - pq}


def pairs(labels: Int[np.ndarray, " labels"], target: int) -> dict[str, int]:
    """How many pairs (i, j < i ≤ q) each class has."""
    wp, pq = int(labels.sum()), len(labels)
    return {"wp": wp, "pq": pq, "ww": target * (target + 1) // 2 - wp - pq}
