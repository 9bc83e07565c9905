# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false
"""The chosen blocks of Native Sparse Attention from two other sides: what a tile of queries reads, who reads a block.

Neighbouring queries choose much the same blocks, so the forward pass loads the union of a tile's blocks once; the
gradients of keys and values gather, for a block, the queries that chose it. No atomics: two runs agree bit for bit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Int
from torch import Tensor

from anchors._names import forwarding
from anchors.attention.kernels import cdiv, power_of_2
from anchors.errors import AnchorsError
from anchors.nsa.kernels.tiles import UNION

__getattr__ = forwarding(__name__)


@dataclass(frozen=True)
class Union:
    """What a tile of neighbouring query rows has chosen.

    Attributes:
        blocks: distinct blocks of each tile, ascending, then −1.
        members: for each of them, the rows of the tile that chose it, as bits; 0 behind the last.
        counts: how many there are.
    """

    blocks: Int[Tensor, "batch groups tiles slots"]
    members: Int[Tensor, "batch groups tiles slots"]
    counts: Int[Tensor, "batch groups tiles"]


@dataclass(frozen=True)
class Inverse:
    """Who has chosen a block.

    Attributes:
        queries: query rows by batch × group, then by block, ascending; behind the last list, rows of no list.
        items: work items (batch · groups + group, block, start, stop) into `queries`, lists in order, the pieces of a
            list in order; −1 where unused.
        first: the first item of each list.
        number: how many items it is cut into.
    """

    queries: Int[Tensor, " entries"]
    items: Int[Tensor, "items 4"]
    first: Int[Tensor, "lists blocks"]
    number: Int[Tensor, "lists blocks"]


@triton.jit
@no_type_check
def _union(
    idx, blocks, members, counts, idx_strides, queries, groups, tiles,
    N: tl.constexpr, TILE: tl.constexpr, ENTRIES: tl.constexpr, ROW_BITS: tl.constexpr,
):  # fmt: skip
    tile, group, example = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    idx += example * idx_strides[0] + group * idx_strides[2]
    entry = tl.arange(0, ENTRIES)
    query = (tile * TILE + entry // N).to(tl.int64)
    inside = (entry < TILE * N) & (query < queries)
    block = tl.load(idx + query * idx_strides[1] + entry % N * idx_strides[3], mask=inside, other=-1)
    key = tl.sort(tl.where(block >= 0, (block << ROW_BITS) | (entry // N), 2147483647))
    block, there = key >> ROW_BITS, key < 2147483647
    before = tl.gather(block, tl.maximum(entry - 1, 0), 0)
    first = there & ((entry == 0) | (block != before))
    rank = tl.cumsum(first.to(tl.int32), 0) - 1
    count = tl.sum(first.to(tl.int32), 0)
    kind = members.dtype.element_ty
    bits = tl.full([ENTRIES], 1, kind) << (key & ((1 << ROW_BITS) - 1)).to(kind)
    bits = tl.where(there, bits, 0)
    # A row chooses a block once, so that the bits of a block add up to their union; the sums may wrap, for only
    # differences of them are read.
    since = tl.cumsum(bits, 0) - bits
    every = tl.sum(bits, 0)
    line = (example * groups + group) * tiles + tile
    tl.store(counts + line, count)
    blocks += line * TILE * N
    members += line * TILE * N
    tl.store(blocks + rank, block, mask=first)
    tl.store(members + rank, since, mask=first)
    tl.debug_barrier()
    start = tl.load(members + entry, mask=entry < count, other=0)
    stop = tl.load(members + entry + 1, mask=entry + 1 < count, other=0)
    stop = tl.where(entry + 1 == count, every, stop)
    tl.debug_barrier()
    tl.store(members + entry, stop - start, mask=entry < TILE * N)
    tl.store(blocks + entry, tl.full([ENTRIES], -1, tl.int32), mask=(entry >= count) & (entry < TILE * N))


def union(
    idx: Int[Tensor, "batch query groups n"], tile: int, tuning: Mapping[str, Any] | None = None
) -> Union:
    """The distinct blocks that each `tile` of neighbouring query rows has chosen, and which row chose which.

    Args:
        idx: chosen blocks, each at most once in a row; −1 is no block.
        tuning: num_warps of the kernel, under the name union.
    """
    if not 1 <= tile <= UNION:
        raise AnchorsError(
            f"A tile of {tile} query rows was asked for.",
            f"Use 1 to {UNION}: a row is a bit.",
            code="option-value",
        )
    batch, queries, groups, n = idx.shape
    row_bits = (tile - 1).bit_length()
    if queries << row_bits >= 2**31:
        raise AnchorsError(
            f"{queries} queries in tiles of {tile} do not fit 32-bit keys.",
            "Attend to shorter texts.",
            code="shape",
        )
    tiles = cdiv(queries, tile)
    blocks = idx.new_empty(batch, groups, tiles, tile * n, dtype=torch.int32)
    members = torch.empty_like(blocks, dtype=torch.int32 if tile <= 32 else torch.int64)
    counts = idx.new_empty(batch, groups, tiles, dtype=torch.int32)
    entries = power_of_2(tile * n)
    table = {"num_warps": min(8, max(1, entries // 128))} | dict((tuning or {}).get("union", {}))
    with torch.cuda.device_of(idx):
        _union[tiles, groups, batch](
            idx, blocks, members, counts, idx.stride(), queries, groups, tiles,
            N=n, TILE=tile, ENTRIES=entries, ROW_BITS=row_bits, **table,
        )  # fmt: skip
    return Union(blocks, members, counts)


def rho(union: Union) -> float:
    """|U| / (tile · n), averaged over the tiles: 1 where neighbours share nothing, 1 / tile where they share all."""
    return float(union.counts.float().mean()) / union.blocks.shape[-1]


def inverse(idx: Int[Tensor, "batch query groups n"], blocks: int, split: int = 1024) -> Inverse:
    """The query rows that chose each block, in pieces of at most `split`; nothing waits for the device.

    Block 0 is chosen by everybody: unsplit, its list would be as long as the text. There are at most
    batch · groups · blocks + ⌊batch · query · groups · n / split⌋ pieces.

    Args:
        idx: chosen blocks, each at most once in a row; −1 is no block.
        blocks: how many blocks there are.
    """
    batch, queries, groups, n = idx.shape
    lists, entries = batch * groups * blocks, idx.numel()
    if max(lists, entries) >= 2**31:
        raise AnchorsError(
            f"{entries} chosen blocks in {lists} lists do not fit 32-bit indices.",
            "Use smaller batches.",
            code="shape",
        )
    offset = (
        torch.arange(batch * groups, dtype=torch.int32, device=idx.device).view(batch, groups, 1, 1) * blocks
    )
    chosen = idx.permute(0, 2, 1, 3).int()
    # A sort takes its keys a byte at a time.
    narrow = torch.int16 if lists < 2**15 else torch.int32
    keys, order = (chosen + offset).where(chosen >= 0, lists).flatten().to(narrow).sort(stable=True)
    every = torch.arange(lists + 1, dtype=narrow, device=idx.device)
    edges = torch.searchsorted(keys, every, out_int32=True)
    return _pieces((order // n % queries).int(), edges, blocks, entries, split)


def _pieces(rows: Tensor, edges: Tensor, blocks: int, entries: int, split: int) -> Inverse:
    """Lists between edges, cut into pieces."""
    lists = len(edges) - 1
    number = (edges.diff() + (split - 1)) // split
    ends = number.cumsum(0, dtype=torch.int32)
    first = ends - number
    item = torch.arange(lists + entries // split, dtype=torch.int32, device=edges.device)
    owner = torch.searchsorted(ends, item, right=True, out_int32=True)
    used = owner < lists
    owner = owner.clamp(max=lists - 1)
    start = edges[owner] + (item - first[owner]) * split
    stop = torch.minimum(start + split, edges[owner + 1])
    items = torch.stack([owner // blocks, owner % blocks, start, stop], 1).where(used[:, None], -1)
    shape = lists // blocks, blocks
    return Inverse(rows, items, first.view(shape), number.view(shape))


@dataclass(frozen=True)
class Rows:
    """Where the pieces of a sum over readers lie, by rows of one buffer.

    Attributes:
        bases: first row of each work item: of a list's first piece the row of its block's first token, among
            batch · groups · tokens; of the others, behind these.
        extra: of each list, how many such others stand before its own.
        number: rows of the buffer.
    """

    bases: Int[Tensor, " items"]
    extra: Int[Tensor, "lists tokens"]
    number: int


def rows_of_texts(found: Inverse, others: int, lp: int) -> Rows:
    """The rows for blocks that are named by their first tokens: blocks of texts part the tokens among them.

    Args:
        found: of such blocks, one list per token.
        others: the most pieces that are not a list's first.
        lp: tokens of a block.
    """
    lists = found.number.numel()
    more = (found.number.flatten() - 1).clamp(min=0)
    extra = more.cumsum(0, dtype=torch.int32) - more
    owner = (found.items[:, 0].long() * found.number.shape[1] + found.items[:, 1]).clamp(min=0)
    piece = torch.arange(len(owner), device=owner.device) - found.first.flatten()[owner]
    behind = lists + (extra[owner].long() + piece - 1) * lp
    return Rows(owner.where(piece == 0, behind), extra.view_as(found.number), lists + others * lp)
