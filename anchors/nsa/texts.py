"""Several texts in one row of tokens, packed or padded, that do not see each other.

Every equation of `anchors.nsa.reference` holds within a text: its compressed tokens and its selection blocks are counted
from its own first token, and none reaches into the next text. Compressed tokens of all texts lie one behind the other,
in C = ⌊(T − l) / d⌋ + 1 rows of which the last may be unused: several texts never have more than one.

Everything is a tensor on the device of the bounds. Nothing is read on the host, so that nothing waits for a GPU.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NoReturn

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from anchors.errors import AnchorsError
from anchors.nsa.geometry import Geometry


@dataclass(frozen=True)
class Spans:
    """Who sees whom in one branch.

    Attributes:
        seen: the keys [low, high) that a query may see; in the selected branch those of its text.
        seers: the queries [since, until) that may see a key; neither bound ever falls along the keys.
    """

    seen: Int[Tensor, "batch tokens 2"]
    seers: Int[Tensor, "batch keys 2"]

    def visible(self, keys: int, past: int, queries: int) -> Bool[Tensor, "batch query keys"]:
        """Whether the queries from `past` on may see each of the keys."""
        j = torch.arange(keys, device=self.seen.device)
        seen = self.seen[:, past : past + queries]
        return (j >= seen[..., :1]) & (j < seen[..., 1:])


@dataclass(frozen=True)
class Texts:
    """Where the text of each token begins and ends.

    Attributes:
        start, end: the first token of the text, and the one behind its last.
        sound: whether the bounds that were given divide the row; where they do not, outputs are not numbers.
    """

    start: Int[Tensor, "batch tokens"]
    end: Int[Tensor, "batch tokens"]
    sound: Bool[Tensor, " batch"]
    _laid: dict = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of_bounds(cls, cu_seqlens: Int[Tensor, " texts_and_one"], tokens: int) -> "Texts":
        """One row of `tokens` tokens, text i from cu_seqlens[i] to cu_seqlens[i + 1]; a text may be empty.

        Raises:
            AnchorsError: bounds on the CPU that do not divide the row. On a GPU looking would wait for it: there the
                outputs of such a row are not numbers.
        """
        bounds = cu_seqlens.long()
        begins = torch.zeros(tokens + 1, dtype=torch.bool, device=bounds.device)
        begins.index_fill_(0, bounds.clamp(0, tokens), True)
        sound = (bounds[0] == 0) & (bounds[-1] == tokens) & (bounds.diff() >= 0).all()
        made = cls._of_beginnings(begins[None, :tokens], sound[None])
        if not bounds.is_cuda and not bool(sound):
            raise AnchorsError(
                f"The bounds {cu_seqlens.tolist()} do not divide {tokens} tokens.",
                "Begin with 0, end with the number of tokens, and never fall.",
                code="shape",
            )
        return made

    @classmethod
    def of_positions(cls, position_ids: Int[Tensor, "batch tokens"]) -> "Texts":
        """A text begins wherever the position does not rise."""
        falls = position_ids.diff(dim=1) <= 0
        return cls._of_beginnings(torch.nn.functional.pad(falls, (1, 0), value=True))

    @classmethod
    def of_mask(cls, mask: Tensor, position_ids: Int[Tensor, "#batch tokens"] | None = None) -> "Texts":
        """Rows padded on the left, on the right, or on both sides; the padding at an end is a text that nobody asks for.

        Args:
            mask: [batch, tokens], 0 or false where there is padding.
            position_ids: where texts are packed besides: one begins wherever the position does not rise. Those of
                padding say nothing.

        Raises:
            AnchorsError: a mask on the CPU that hides tokens within a text. On a GPU looking would wait for it: there the
                outputs of such a row are not numbers.
        """
        real = mask.bool()
        changes = torch.nn.functional.pad(real[:, 1:] != real[:, :-1], (1, 0), value=True)
        sound = (changes & real).sum(1) <= 1
        if position_ids is not None:
            changes = changes | (cls.of_positions(position_ids)._begins & real)
        if not mask.is_cuda and not bool(sound.all()):
            refuse_holes()
        return cls._of_beginnings(changes, sound)

    @classmethod
    def _of_beginnings(
        cls, begins: Bool[Tensor, "batch tokens"], sound: Bool[Tensor, " batch"] | None = None
    ) -> "Texts":
        t = torch.arange(begins.shape[1], device=begins.device)
        begins = begins | (t == 0)
        start = t.where(begins, 0).cummax(1).values
        behind = torch.nn.functional.pad(t.where(begins, len(t))[:, 1:], (0, 1), value=len(t))
        end = behind.flip(1).cummin(1).values.flip(1)
        if sound is None:
            sound = torch.ones(len(begins), dtype=torch.bool, device=begins.device)
        return cls(start.int().contiguous(), end.int().contiguous(), sound)

    @property
    def tokens(self) -> int:
        return self.start.shape[1]

    @property
    def position(self) -> Int[Tensor, "batch tokens"]:
        """Where each token stands in its text."""
        return torch.arange(self.tokens, dtype=torch.int32, device=self.start.device) - self.start

    @property
    def _begins(self) -> Bool[Tensor, "batch tokens"]:
        return self.position == 0

    def expanded(self, batch: int, device: torch.device | None = None) -> "Texts":
        """The same texts in every example, on the device of a layer; made once for all layers that ask."""
        device = self.start.device if device is None else device
        if len(self.start) == batch and self.start.device == device:
            return self
        if (batch, device) not in self._laid:
            start, end, sound = (
                x.to(device).expand(batch, *x.shape[1:]).contiguous()
                for x in (self.start, self.end, self.sound)
            )
            self._laid[batch, device] = Texts(start, end, sound)
        return self._laid[batch, device]

    def of_examples(self, change: Callable[[Tensor], Tensor]) -> "Texts":
        """Of other examples: some of these, or some twice."""
        return Texts(change(self.start), change(self.end), change(self.sound))

    def laid(self, geometry: Geometry) -> "Layout":
        """Where blocks lie; made once for all layers that ask."""
        if geometry not in self._laid:
            self._laid[geometry] = Layout(self, geometry)
        return self._laid[geometry]

    def guarded(self, gates: Float[Tensor, "batch query heads 3"]) -> Float[Tensor, "batch query heads 3"]:
        """The gates; not numbers where the bounds are wrong, so that no wrong output goes unnoticed."""
        return gates.masked_fill(~self.sound[:, None, None, None], torch.nan)


def refuse_holes() -> NoReturn:
    raise AnchorsError(
        "A mask hides tokens within a text: blocks of l and of l' neighbours would have holes.",
        "Leave such tokens out of the input, and mask padding at the ends only.",
        code="shape",
    )


@dataclass(frozen=True)
class Layout:
    """Where the blocks of texts lie under a geometry."""

    texts: Texts
    geometry: Geometry

    @cached_property
    def _whole(self) -> Bool[Tensor, "batch tokens"]:
        """The tokens at which a compression block begins that is complete within the text."""
        t = torch.arange(self.texts.tokens, device=self.texts.start.device)
        return (self.texts.position % self.geometry.d == 0) & (t + self.geometry.l <= self.texts.end)

    @cached_property
    def place(self) -> Int[Tensor, "batch compressed"]:
        """The first token of each compressed token's block; T for unused rows."""
        batch, tokens = self.texts.start.shape
        rows = self.geometry.compressed(tokens)
        rank = (self._whole.cumsum(1) - 1).where(self._whole, rows)
        found = torch.full((batch, rows + 1), tokens, dtype=torch.int32, device=rank.device)
        t = torch.arange(tokens, dtype=torch.int32, device=rank.device).expand(batch, -1)
        return found.scatter(1, rank, t)[:, :rows].contiguous()

    @cached_property
    def first(self) -> Int[Tensor, "batch tokens"]:
        """The row of the first compressed token of each token's text; where it has none, of the next one's."""
        before = self._whole.cumsum(1) - self._whole.long()
        return before.gather(1, self.texts.start.long()).int()

    @cached_property
    def tokens(self) -> Int[Tensor, "batch tokens 3"]:
        """Of each token's text: its first token, the one behind its last, and its first compressed token."""
        return torch.stack([self.texts.start, self.texts.end, self.first], -1)

    @cached_property
    def compressed(self) -> Spans:
        l, d = self.geometry.l, self.geometry.d
        complete = (self.texts.position + (d + 1 - l)).clamp(min=0) // d
        # Of an unused row: nobody, from beyond the last token on.
        end = torch.nn.functional.pad(self.texts.end, (0, 1), value=self.texts.tokens)
        until = end.gather(1, self.place.long())
        return Spans(
            torch.stack([self.first, self.first + complete], -1).int(),
            torch.stack([self.place + (l - 1), until], -1).int(),
        )

    @cached_property
    def selected(self) -> Spans:
        t = torch.arange(self.texts.tokens, dtype=torch.int32, device=self.texts.start.device)
        t = t.expand_as(self.texts.start)
        return Spans(torch.stack([self.texts.start, t + 1], -1), torch.stack([t, self.texts.end], -1))

    @cached_property
    def window(self) -> Spans:
        (start, behind), (t, end) = self.selected.seen.unbind(-1), self.selected.seers.unbind(-1)
        w = self.geometry.w
        return Spans(
            torch.stack([torch.maximum(behind - w, start), behind], -1),
            torch.stack([t, torch.minimum(t + w, end)], -1),
        )

    def blocks_at(
        self, idx: Int[Tensor, "batch query groups n"], past: int = 0
    ) -> Int[Tensor, "batch query groups n"]:
        """The first token of each chosen block in place of its number in its text; −1 stays.

        A block in a query's future, of which it sees nothing, becomes −1: it may lie in another text.
        """
        rows = slice(past, past + idx.shape[1])
        start, position = (x[:, rows, None, None] for x in (self.texts.start, self.texts.position))
        within = idx * self.geometry.lp
        return (within + start).where((idx >= 0) & (within <= position), -1).int()

    def _block_rows(self) -> Int[Tensor, "batch compressed l"]:
        last = max(0, self.texts.tokens - self.geometry.l)
        inside = torch.arange(self.geometry.l, device=self.place.device)
        return self.place.long().clamp(max=last)[..., None] + inside

    def compress(
        self, x: Float[Tensor, "batch tokens groups dim"], phi: Callable[[Tensor], Tensor], first: int = 0
    ) -> Float[Tensor, "batch compressed groups dim_out"]:
        """K^cmp (Eq. 7) of every text, from row `first` on; what stands in unused rows is seen by nobody."""
        batch, _, groups, dim = x.shape
        if not self.place.shape[1]:
            return phi(x.new_zeros(batch, 0, groups, self.geometry.l, dim))
        return phi(self.of_blocks(x, first).transpose(2, 3))

    def of_blocks(self, x: Tensor, first: int = 0) -> Tensor:
        """The l entries [batch, compressed, l, …] of every compression block, from row `first` on."""
        rows = self._block_rows()[:, first:].expand(len(x), -1, -1)
        return x[torch.arange(len(x), device=x.device)[:, None, None], rows]

    def selected_visible(
        self, idx: Int[Tensor, "batch query groups n"], past: int = 0
    ) -> Bool[Tensor, "batch query groups token"]:
        """The tokens of the chosen blocks of a query's own text that are not in the future (Eq. 12)."""
        batch, queries, groups, _ = idx.shape
        blocks = self.geometry.blocks(self.texts.tokens)
        chosen = idx.new_zeros(batch, queries, groups, blocks + 1, dtype=torch.bool)
        chosen.scatter_(-1, idx.long().where(idx >= 0, blocks), True)
        own = (self.texts.position // self.geometry.lp).long()[:, None, None]
        per_token = chosen.gather(-1, own.expand(batch, queries, groups, -1))
        seen = self.selected.visible(self.texts.tokens, past, queries)
        return per_token & seen[:, :, None]

    def overlap(self) -> Float[Tensor, "batch compressed blocks"]:
        """W of Eq. 9, the blocks being those of the compressed token's own text."""
        l, d, lp = self.geometry.l, self.geometry.d, self.geometry.lp
        start = torch.nn.functional.pad(self.texts.position, (0, 1)).gather(1, self.place.long())
        start = start[..., None].float()
        edge = torch.arange(self.geometry.blocks(self.texts.tokens), device=start.device) * lp
        shared = torch.minimum(start + l, edge + lp) - torch.maximum(start, edge.float())
        return shared.clamp(min=0) / d
