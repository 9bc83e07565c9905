"""What one-token decoding of Native Sparse Attention keeps between steps.

All sizes are fixed when the cache is made and the number of tokens lives on the device, so that a step has no shape
and no branch on the host that depends on data: it can be captured in a CUDA graph and replayed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from anchors._names import forwarding
from anchors.errors import AnchorsError
from anchors.nsa.geometry import Geometry
from anchors.nsa.texts import Texts

PROGRAMS = 264
"""Programs that keep an H100 busy: two for each of its 132 multiprocessors."""
BLOCKS = 16384
"""Selection blocks that fit the registers of the selecting program."""


@dataclass(frozen=True)
class Tuning:
    """How the work of a step is cut. No output depends on it beyond rounding.

    Attributes:
        chunk_cmp, chunk: compressed tokens of a full cache, and tokens of the selected and window branches, per program.
        tile_cmp, tile: tokens that a program holds at once, a power of two from 16 on.
        tile_sum: compressed tokens whose patterns are summed over the heads at once, a power of two.
        stages_cmp, stages: of the compressed branch, and of the others: a program holds one tile fewer, and while it works on
            one of them the rest are on their way; at 2, none.
        tile_merge: partial results that are merged at once, a power of two.
        bits: bits of the n-th highest importance that are found at once, by 2^bits counts: 1, 2, 4 or 8.
    """

    chunk_cmp: int = 256
    chunk: int = 128
    tile_cmp: int = 64
    tile: int = 64
    tile_sum: int = 512
    tile_merge: int = 16
    bits: int = 4
    warps_cmp: int = 4
    warps: int = 4
    warps_select: int = 8
    warps_merge: int = 4
    stages: int = 2
    stages_cmp: int = 2

    @classmethod
    def of(cls, rows: int, compressed: int, blocks: int, slots: int, row_bytes: int) -> "Tuning":
        """Few programs with much to read each where there are many rows, else many with little.

        Args:
            rows: batch times groups.
            compressed, blocks: compressed tokens and selection blocks of a full cache.
            slots: tokens that a row reads in the other two branches.
            row_bytes: bytes of one key.
        """

        def chunk(tokens: int, *sizes: int) -> int:
            return next((size for size in sizes if rows * -(-tokens // size) >= PROGRAMS), sizes[-1])

        def wave(size: int) -> int:
            # Tokens that pass one after the other, where a program's start costs as much as a tile.
            return -(-rows * -(-compressed // size) // at_once) * (size + tile)

        tile = 64 if row_bytes <= 512 else 32
        stages = 2 if row_bytes <= 512 else 1
        # Two tiles that a program holds leave a multiprocessor's shared memory room for a third program.
        at_once = PROGRAMS * 3 // 2 if row_bytes <= 256 else PROGRAMS
        return cls(
            chunk_cmp=min(range(tile, compressed + tile, tile), key=wave),
            chunk=chunk(slots, 256, 128, 64),
            tile_cmp=tile,
            tile=tile,
            tile_sum=chunk(compressed, 1024, 512, 256, 128),
            bits=4 if blocks <= 512 else 2,
            warps_select=8 if blocks <= 2048 else 16,
            stages=stages,
            stages_cmp=3 if row_bytes <= 256 else stages,
        )


@dataclass(frozen=True)
class NSACache:
    """Keys and values of the three branches, head-major, so that a block of one head is contiguous.

    The selected branch keeps every token, the compressed branch every compressed token and the last l raw ones, the
    window branch the last w tokens. The last two are rings: position p lies in row p mod l, or p mod w.

    Attributes:
        length: tokens held, by example; a step adds 1. More than `tokens` means that the cache overflowed.
        position: where the current step's token stands: `length` before the step.
        scores: scaled scores of the compressed branch, natural scale; of the last step, like all that follows.
        shares: p^cmp summed over the heads of a group.
        idx: the chosen blocks, ascending, −1 at the end.
        top, mass, part: maximum (in units of log 2), Σ exp and Σ exp · v of each piece of the keys, by query head.
        arrived: programs of a row that finished summing; 0 between launches.
    """

    geometry: Geometry
    tuning: Tuning
    k_slc: Float[Tensor, "batch groups tokens dim"]
    v_slc: Float[Tensor, "batch groups tokens dim_v"]
    k_win: Float[Tensor, "batch groups window dim"]
    v_win: Float[Tensor, "batch groups window dim_v"]
    k_cmp: Float[Tensor, "batch groups l dim"]
    v_cmp: Float[Tensor, "batch groups l dim_v"]
    kc: Float[Tensor, "batch groups compressed dim"]
    vc: Float[Tensor, "batch groups compressed dim_v"]
    length: Int[Tensor, " batch"]
    position: Int[Tensor, " batch"]
    scores: Float[Tensor, "batch heads compressed"]
    shares: Float[Tensor, "batch groups compressed"]
    idx: Int[Tensor, "batch groups n"]
    top: Float[Tensor, "batch heads splits"]
    mass: Float[Tensor, "batch heads splits"]
    part: Float[Tensor, "batch heads splits dim_v"]
    arrived: Int[Tensor, " rows"]

    @classmethod
    def empty(
        cls,
        batch: int,
        tokens: int,
        heads: int,
        query_heads: int,
        dim: int,
        dim_v: int,
        geometry: Geometry,
        dtype: torch.dtype,
        device: torch.device | str,
        tuning: Tuning | None = None,
    ) -> "NSACache":
        """A cache with room for `tokens` tokens and none in it.

        Args:
            heads, query_heads: groups (key-value heads) and query heads.
            tuning: how the work of a step is cut; None takes what suits the sizes.

        Raises:
            AnchorsError: sizes that the kernels cannot serve.
        """
        if heads < 1 or query_heads % heads:
            raise AnchorsError(
                f"{query_heads} query heads cannot be divided among {heads} groups.",
                "Choose a number of groups (key-value heads) that divides the query heads.",
                code="geometry",
            )
        if min(batch, tokens) < 1:
            raise AnchorsError(
                f"A cache of {batch} x {tokens} tokens is empty.", "Both must be at least 1.", code="shape"
            )
        if geometry.blocks(tokens) > BLOCKS:
            raise AnchorsError(
                f"{tokens} tokens are {geometry.blocks(tokens)} selection blocks; decoding holds {BLOCKS}.",
                "Choose larger selection blocks or fewer tokens.",
                code="geometry",
            )
        if tokens * max(dim, dim_v) >= 1 << 31:
            raise AnchorsError(
                f"{tokens} tokens of {max(dim, dim_v)} numbers are more than 32 bits count.",
                "Make room for fewer tokens.",
                code="length",
            )
        compressed, window = max(1, geometry.compressed(tokens)), min(geometry.w, tokens)
        if tuning is None:
            width = (1 << max(dim - 1, dim_v - 1).bit_length()) * dtype.itemsize
            slots = geometry.n * geometry.lp + window
            tuning = Tuning.of(batch * heads, compressed, geometry.blocks(tokens), slots, width)

        def made(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        def pair(rows: int) -> tuple[Tensor, Tensor]:
            return made(batch, heads, rows, dim, dtype=dtype), made(batch, heads, rows, dim_v, dtype=dtype)

        splits = sum(_splits(geometry, tuning, compressed, window))
        return cls(
            geometry, tuning, *pair(tokens), *pair(window), *pair(geometry.l), *pair(compressed),
            length=made(batch, dtype=torch.int32),
            position=made(batch, dtype=torch.int32),
            # Lines of whole 64 bytes, so that several scores are moved at once.
            scores=made(batch, query_heads, -(-compressed // 16) * 16)[:, :, :compressed],
            shares=made(batch, heads, compressed),
            idx=made(batch, heads, geometry.n, dtype=torch.int32) - 1,
            top=made(batch, query_heads, splits),
            mass=made(batch, query_heads, splits),
            part=made(batch, query_heads, splits, dim_v),
            arrived=made(batch * heads, dtype=torch.int32),
        )  # fmt: skip

    @property
    def tokens(self) -> int:
        """Tokens that there is room for."""
        return self.k_slc.shape[2]

    @property
    def splits(self) -> tuple[int, int, int]:
        """Pieces that the keys of the compressed, selected and window branch are cut into."""
        return _splits(self.geometry, self.tuning, self.kc.shape[2], self.k_win.shape[2])

    @property
    def kept(self) -> tuple[Tensor, ...]:
        """All keys and values."""
        return (
            self.k_slc, self.v_slc, self.k_win, self.v_win, self.k_cmp, self.v_cmp, self.kc, self.vc
        )  # fmt: skip

    @property
    def bytes(self) -> int:
        """Memory of the keys and values."""
        return sum(x.nbytes for x in self.kept)

    def prefill(
        self,
        keys: Sequence[Float[Tensor, "batch prompt groups dim"]],
        values: Sequence[Float[Tensor, "batch prompt groups dim_v"]],
        kc: Float[Tensor, "batch compressed groups dim"],
        vc: Float[Tensor, "batch compressed groups dim_v"],
        lengths: Int[Tensor, " batch"] | None = None,
        *,
        texts: Texts | None = None,
        starts: Int[Tensor, " batch"] | None = None,
    ) -> None:
        """Takes in a prompt, in place of what the cache held.

        Args:
            keys, values: of the branches cmp, slc and win, in this order.
            kc, vc: all compressed tokens of the prompt, C of them.
            lengths: tokens of each example, where the prompts are padded on the right; None: all of them.
            texts, starts: the texts of rows that are padded at either end, or packed, and the first token of the one that
                each example goes on with, in place of `lengths`; `kc` and `vc` are those of `Layout.compress`. Nothing
                waits for the device.

        Raises:
            AnchorsError: a prompt without tokens, or without room; texts without starts.
        """
        prompt = keys[0].shape[1]
        if not 1 <= prompt <= self.tokens:
            raise AnchorsError(
                f"A prompt of {prompt} tokens does not fit a cache of {self.tokens}.",
                "Make the cache with room for the prompt and for what is decoded after it.",
                code="length",
            )
        complete = self.geometry.compressed(prompt)
        if kc.shape[1] != complete or vc.shape[1] != complete:
            raise AnchorsError(
                f"{kc.shape[1]} compressed keys and {vc.shape[1]} values came with {prompt} tokens.",
                f"Compress the whole prompt: {complete} of each.",
                code="shape",
            )
        if (texts is None) != (starts is None) or (texts is not None and lengths is not None):
            raise AnchorsError(
                "A prompt of several texts needs the texts and their first tokens, and no lengths.",
                "Give texts and starts together, or lengths alone.",
                code="shape",
            )
        if texts is not None and starts is not None:
            texts, starts = texts.expanded(len(starts)), starts.long()[:, None]
            first = texts.laid(self.geometry).first.long().gather(1, starts)
            keys, values = ([_from(x, starts) for x in xs] for xs in (keys, values))
            kc, vc = _from(kc, first), _from(vc, first)
            lengths = (texts.end.long().gather(1, starts) - starts)[:, 0]
        if lengths is None:
            self.length.fill_(prompt)
        else:
            self.length.copy_(lengths)
        (k_cmp, k_slc, k_win), (v_cmp, v_slc, v_win) = keys, values
        for cache, x in ((self.k_slc, k_slc), (self.v_slc, v_slc), (self.kc, kc), (self.vc, vc)):
            cache[:, :, : x.shape[1]] = x.transpose(1, 2)
        for cache, x in (
            (self.k_win, k_win), (self.v_win, v_win), (self.k_cmp, k_cmp), (self.v_cmp, v_cmp)
        ):  # fmt: skip
            rows = cache.shape[2]
            last = self.length.long()[:, None] - 1
            # The last position that lies in each row; what would lie before the prompt is never read.
            held = (last - (last - torch.arange(rows, device=last.device)) % rows).clamp(min=0)
            cache.copy_(x.transpose(1, 2).take_along_dim(held[:, None, :, None], 2))


def _from(
    x: Float[Tensor, "batch rows groups size"], first: Int[Tensor, "batch 1"]
) -> Float[Tensor, "batch rows groups size"]:
    """Each example's rows from its first on; behind the last, the last again, which nobody reads."""
    rows = x.shape[1]
    place = (first + torch.arange(rows, device=x.device)).clamp(max=rows - 1)
    return x.take_along_dim(place[:, :, None, None], 1) if rows else x


def _splits(geometry: Geometry, tuning: Tuning, compressed: int, window: int) -> tuple[int, int, int]:
    selected = -(-geometry.n * geometry.lp // tuning.chunk)
    return -(-compressed // tuning.chunk_cmp), selected, -(-window // tuning.chunk)


def captured(step: Callable[..., Tensor], cache: NSACache, *inputs: Tensor) -> Callable[..., Tensor]:
    """A decode step as a CUDA graph: one launch for all its kernels.

    Args:
        step: takes tensors like `inputs` and calls `nsa_decode` on `cache`, with no look at a value on the host.
        cache: stands where it stood when this returns.
        inputs: examples of what `step` takes; copied.

    Returns:
        A function of new inputs, or of none to repeat with the last ones. Its output is overwritten by the next call.
    """
    held = [x.clone() for x in inputs]
    length = cache.length.clone()
    with torch.no_grad(), torch.cuda.device_of(length):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step(*held)
                # A row that a step wrote is never read by a step at the same position: it writes it anew.
                cache.length.copy_(length)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = step(*held)

    def replay(*inputs: Tensor) -> Tensor:
        for target, x in zip(held, inputs or held, strict=True):
            target.copy_(x)
        graph.replay()
        return output

    return replay


__getattr__ = forwarding(__name__)
