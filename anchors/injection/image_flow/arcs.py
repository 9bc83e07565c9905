"""What a page shows of the flow of one prompt with pictures: some rows, what every token gives, the strongest arcs.

All of it is gathered from tiles while the loss is differentiated, so that what is kept grows with the number of tokens and
not with its square.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from anchors.attention.form import Call
from anchors.injection.image_flow.flow import ImageBatch

KINDS = ("ip", "tp", "iq", "pq", "tq", "ww")
"""Where flow comes from and goes to, as in `anchors.injection.image_flow.flow`; S_wp is S_ip and S_tp together."""


def kinds(batch: ImageBatch) -> Int[Tensor, "receiver giver"]:
    """The number in `KINDS` of every pair (receiver, giver) of the one prompt of a batch, by three kinds of receivers:
    label words, the target, and all others."""
    image, at = batch.image[0], torch.arange(batch.image.shape[1], device=batch.image.device)
    label = torch.isin(at, batch.labels[0])
    own = batch.query[0] & ~label
    words = torch.where(image, KINDS.index("ip"), KINDS.index("tp"))
    asked = torch.where(
        image & own, KINDS.index("iq"), torch.where(own, KINDS.index("tq"), KINDS.index("ww"))
    )
    asked = asked.where(~label, KINDS.index("pq"))
    return torch.stack([words, asked, torch.full_like(words, KINDS.index("ww"))])


def pairs(batch: ImageBatch) -> dict[str, int]:
    """How many pairs each kind of the one prompt of a batch has; of S_ww those within images, too, where they see each other."""
    at, target = torch.arange(batch.image.shape[1], device=batch.image.device), int(batch.target[0])
    words, asked, _ = kinds(batch)
    seen = [words[at < p] for p in batch.labels[0]] + [asked[at < target]]
    counts = torch.cat(seen).bincount(minlength=len(KINDS)).tolist()
    found = dict(zip(KINDS, counts, strict=True))
    found["ww"] = target * (target + 1) // 2 + int(batch.backward[0]) - sum(counts) + found["ww"]
    return found


@dataclass
class ArcTap:
    """Listens to A ⊙ ∂L/∂A of one prompt.

    Attributes:
        batch: the prompt, and its roles.
        layers: where it listens.
        keep: how many arcs of each kind, and as many from the first token. Arcs into image tokens are not kept.
        target: by layer, I_l[q, ·].
        labels: by layer, Σ_k I_l[p_k, ·].
        given: by layer, Σ_i I_l[i, ·] over the tokens i that are no image tokens.
        first: by layer, Σ_i I_l[i, 0] over all of them.
        arcs: by layer, kind and whether they come from the first token: receivers, givers and values of the strongest.
    """

    batch: ImageBatch
    layers: frozenset[int]
    keep: int
    target: dict[int, Float[Tensor, " tokens"]] = field(default_factory=dict)
    labels: dict[int, Float[Tensor, " tokens"]] = field(default_factory=dict)
    given: dict[int, Float[Tensor, " tokens"]] = field(default_factory=dict)
    first: dict[int, Float[Tensor, ""]] = field(default_factory=dict)
    arcs: dict[int, dict[tuple[int, bool], tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.kinds = kinds(self.batch)

    def begin(self, call: Call, z: Tensor, dz: Tensor) -> None:
        for kept in (self.target, self.labels, self.given):
            kept[call.layer] = z.new_zeros(call.k.shape[2], dtype=call.compute_dtype)
        self.arcs[call.layer], self.first[call.layer] = {}, z.new_zeros((), dtype=call.compute_dtype)

    def tile(self, call: Call, rows: Tensor, keys: slice, product: Tensor) -> None:
        layer, image = call.layer, self.batch.image[0]
        columns = torch.arange(keys.start, keys.stop, device=rows.device)
        flow = product[0].sum(0).abs_().masked_fill_(columns == rows[:, None], 0)
        is_label, is_target = torch.isin(rows, self.batch.labels[0]), rows == self.batch.target[0]
        for kept, chosen in ((self.target, is_target), (self.labels, is_label), (self.given, ~image[rows])):
            kept[layer][keys] += flow[chosen].sum(0)
        self.first[layer] += flow[:, columns == 0].sum()
        if not (shown := ~image[rows]).any():
            return
        flow, rows = flow[shown], rows[shown]
        receiver = torch.where(is_label, 0, torch.where(is_target, 1, 2))[shown]
        code = 2 * self.kinds[receiver][:, keys] + (columns == 0)
        for one in code.unique().tolist():
            values = flow.masked_fill(code != one, 0).flatten()
            best, place = values.topk(min(self.keep, len(values)))
            pairs = torch.stack([rows[place // len(columns)], columns[place % len(columns)]], 1)
            before = self.arcs[layer].get((one // 2, bool(one % 2)))
            if before is not None:
                pairs, best = torch.cat([before[0], pairs]), torch.cat([before[1], best])
                place = best.topk(min(self.keep, len(best))).indices
                pairs, best = pairs[place], best[place]
            self.arcs[layer][one // 2, bool(one % 2)] = pairs, best

    def edges(self, layer: int, factor: float) -> list[list[int | float]]:
        """The arcs of a layer, strongest first, as `[receiver, giver, value]`, times a factor, to 4 significant digits."""
        found = [
            (float(value) * factor, i, j)
            for pairs, values in self.arcs[layer].values()
            for (i, j), value in zip(pairs.tolist(), values.tolist(), strict=True)
            if value > 0 and j < i
        ]
        return [
            [i, j, float(f"{value:.4g}")]
            for value, i, j in sorted(found, key=lambda arc: (-arc[0], *arc[1:]))
        ]
