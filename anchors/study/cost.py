"""What a pass through a model costs: operations in closed form, memory term by term, seconds from short passes.

With B rows of T tokens after C keys, S = C + T, n layers of H heads (K of keys) of width d, width D, vocabulary V, U columns of
logits and P parameters that every token is multiplied with:

    FLOP, forward    2 P B T + 2 V D B U + 4 n H d B T S
    FLOP, backward   as much again without the parameters' own gradients, and 10 H d in place of 4 for every pair of the tiles;
                     2 P B T more where blocks are computed twice (anchors.model.memory); none of layers below the
                     first that attends

The products of recurrent states among themselves are not in P, and left out: some hundredths of a hybrid's.

What it holds is a sum of named terms, see `Peak`. How fast it is nobody can know: it is timed here.
"""

import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from anchors.attention.dense import DenseCall
from anchors.attention.edits import Edit
from anchors.attention.form import Call
from anchors.attention.seam import seam
from anchors.attention.streaming import TILE_BYTES, triton_runs
from anchors.context import Context, encode
from anchors.flow.saliency import FlowTap
from anchors.model.identity import Identity
from anchors.model.language import LanguageModel
from anchors.model.memory import Kept, twice
from anchors.model.routed import seconds
from anchors.study.analysis import Pass

SHORT = 24
"""Tokens of the pass by which activations are weighed."""
TIMED = {"cpu": 1024, "cuda": 16384}
"""Tokens of the longest pass that is timed; longer ones are foretold from two that are."""
AT_ONCE = 3
"""Tiles held at once, and patterns of an edited layer: scores, pattern and product."""


class Peak(NamedTuple):
    """Bytes at the most, by what they are.

    Attributes:
        weights: parameters and buffers.
        contexts: keys and values of demonstrations that are held.
        cache: keys and values of the pass, those of the context among them for each row.
        saved: activations of all layers that the backward pass reads.
        working: activations of one layer while it runs, or their gradients.
        logits: and their gradient, as far as they exceed `working`, which is free by then.
        tiles: of attention: scores, patterns and products, and the mask of a layer with a window.
    """

    weights: int = 0
    contexts: int = 0
    cache: int = 0
    saved: int = 0
    working: int = 0
    logits: int = 0
    tiles: int = 0

    @property
    def total(self) -> int:
        return sum(self)


class Heads(NamedTuple):
    """The attention of a layer.

    Attributes:
        heads, groups: query heads, heads of keys and values.
        dim, dim_v: widths of a key and of a value.
        fusable: whether torch's kernel computes it; else it is cut into tiles.
        masked: whether it comes with a mask of its own, one entry for each pair.
    """

    heads: int
    groups: int
    dim: int
    dim_v: int
    fusable: bool
    masked: bool


@dataclass
class _Shapes:
    """A probe that reads what attention is like in each layer."""

    layers: frozenset[int]

    def __post_init__(self) -> None:
        self.found: dict[int, Heads] = {}

    def see(self, call: Call) -> None:
        if isinstance(call, DenseCall):
            (_, heads, _, dim), groups, dim_v = call.q.shape, call.k.shape[1], call.v.shape[3]
            self.found[call.layer] = Heads(heads, groups, dim, dim_v, call.fusable, call.mask is not None)


class Held(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, as long as they live.

    Attributes:
        now, most: bytes at this moment, and at the most.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in _tensors((args, kwargs)):
            self._meet(tensor, there=True)
        made = func(*args, **(kwargs or {}))
        for tensor in _tensors(made):
            self._meet(tensor)
        return made

    def _meet(self, tensor: Tensor, *, there: bool = False) -> None:
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # a tensor that stands for others, of quantised weights
            return
        key, size = storage._cdata, 0 if there else storage.nbytes()
        if key in self._known:
            return

        def gone(_: object) -> None:
            self.now -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)


def _tensors(tree: object) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


@dataclass(frozen=True)
class Cost:
    """What passes through a model cost.

    Attributes:
        model: on the seam.
    """

    model: LanguageModel

    @cached_property
    def read(self) -> tuple[Identity, float]:
        """What the numbers depend on, and the seconds in which every weight was read for it; each run does so once."""
        found: list[Identity] = []
        taken = seconds(lambda: found.append(self.model.identity), self.model)
        return found[0], taken

    @cached_property
    def weights(self) -> int:
        """Bytes of parameters and buffers."""
        every = [*self.model.model.parameters(), *self.model.model.buffers()]
        return sum(t.numel() * t.element_size() for t in every)

    @cached_property
    def multiplied(self) -> float | None:
        """P: weights that a token is multiplied with, all but embeddings and the head; of experts those that are chosen.

        None where nobody knows how many are chosen.
        """
        return None if self._each is None else sum(self._each.values())

    @cached_property
    def _below(self) -> float:
        """Those of the layers below the first that attends, of which a hybrid has some."""
        first = self.model.layers[0]
        home = next(name for name, m in self.model.model.named_modules() if m is self.model.modules[first])
        before = tuple(f"{home.partition(f'.{first}.')[0]}.{layer}." for layer in range(first))
        return sum(size for name, size in (self._each or {}).items() if name.startswith(before))

    @cached_property
    def _each(self) -> dict[str, float] | None:
        net = self.model.model
        tables = [m for m in net.modules() if isinstance(m, torch.nn.Embedding)]
        tables += [head] if (head := net.get_output_embeddings()) is not None else []
        left_out = {id(p) for table in tables for p in table.parameters()}
        found = {}
        for name, weight in net.named_parameters():
            if weight.dim() < 2 or id(weight) in left_out:
                continue
            share = _chosen(net.config.get_text_config()) if ".experts." in name else 1.0
            if share is None:
                return None
            found[name] = share * weight.numel()
        return found

    @cached_property
    def heads(self) -> dict[int, Heads]:
        """Attention by layer, of those that have one pattern over their keys."""
        probe = _Shapes(frozenset(self.model.layers))
        with torch.no_grad(), seam(self.model.modules, probes=[probe]):
            self.model.model(input_ids=torch.arange(4, device=self.model.device)[None], use_cache=False)
        return probe.found

    @cached_property
    def cached(self) -> int:
        """Bytes of keys and values per token."""
        return (self._held.bytes - self.state) // 8

    @cached_property
    def state(self) -> int:
        """Bytes of recurrent states, of a prompt of any length."""
        return self._held.state_bytes

    @cached_property
    def _held(self) -> Context:
        return encode(self.model, range(1, 9))

    @cached_property
    def fused(self) -> bool:
        """Whether the flow's attention runs in kernels that write no tile."""
        return triton_runs(self.model.device) and all(h.fusable for h in self.heads.values())

    @property
    def _config(self) -> Any:
        return self.model.model.config.get_text_config()

    def flop(self, p: Pass) -> float | None:
        """Floating-point operations of one pass, of products alone; None where nobody knows how many experts are chosen."""
        p = self._whole(p)
        if self.multiplied is None:
            return None
        config, tokens = self._config, p.rows * p.tokens
        head = 2.0 * config.vocab_size * config.hidden_size * p.rows * p.columns
        forward = 2.0 * self.multiplied * tokens + head
        keys = p.past + p.tokens
        halved = self.fused and p.backward and not p.edited
        pairs = p.rows * (_pairs(p.tokens, keys, 128) if halved else p.tokens * keys)
        for h in self.heads.values():
            own = pairs if h.fusable or p.edited else p.rows * _pairs(p.tokens, keys, self._tile(p, h))
            forward += 2.0 * h.heads * (h.dim + h.dim_v) * own
        if not p.backward:
            return forward
        back = 2.0 * self.multiplied * tokens * (2 if self._twice(p) else 1) + head
        for layer, h in self.heads.items():
            live = p.columns if layer == self.model.n_layers - 1 and p.columns else p.tokens
            seen = p.rows * (live * keys if live < p.tokens else _pairs(p.tokens, keys, self._tile(p, h)))
            again = 0 if p.edited else 2.0 * h.dim
            back += h.heads * seen * (again + 2.0 * h.dim_v)
            if layer != self.model.layers[0]:
                back += h.heads * seen * (4.0 * h.dim + 2.0 * h.dim_v)
            else:  # nothing below the first layer's attention asks for a gradient
                width = h.heads * h.dim + h.groups * (h.dim + h.dim_v)
                back -= 2.0 * tokens * (config.hidden_size * width + self._below)
        return forward + back

    def _tile(self, p: Pass, h: Heads) -> int:
        """Rows of a tile; see `anchors.attention.streaming.tiles`."""
        if self.fused:
            return 128
        kind = self.model.device.type
        return max(
            1,
            TILE_BYTES.get(kind, TILE_BYTES["cpu"]) // (p.rows * h.heads * (p.past + p.tokens) * self._wide),
        )

    @property
    def _wide(self) -> int:
        return max(4, self.model.model.dtype.itemsize)

    @cached_property
    def activations(self) -> dict[str, float]:
        """Bytes per token of `working` in a forward pass and in a backward one, and of `saved`.

        Weighed on two short passes of this model: what grows with the tokens between them, without tiles.
        """
        one, two = self._weighed(SHORT), self._weighed(2 * SHORT)
        return {name: max(0.0, (two[name] - size) / SHORT) for name, size in one.items()}

    def _weighed(self, tokens: int) -> dict[str, int]:
        there, back = Pass(tokens), Pass(tokens, backward=True)
        with Held() as forward, torch.no_grad():
            self._forward(there)
        with Held() as backward, torch.enable_grad():
            loss = self._forward(back)
            saved = backward.now
            loss()
        return {
            "forward": forward.most - self._tiles(there),
            "saved": saved,
            "backward": backward.most - saved - self._tiles(back, saved),
        }

    def peak(self, p: Pass, held: float = 0) -> Peak:
        """Bytes at the most during a pass, while the keys and values of `held` tokens are held."""
        p = self._whole(p)
        tokens, found = p.rows * p.tokens, self.activations
        each = found["saved"]
        if again := self._twice(p):
            own, keep = again
            each = own.inputs + keep * own.attention + each / len(own.blocks)
        saved = round(each * tokens) if p.backward else 0
        working = round(found["backward" if p.backward else "forward"] * tokens)
        cached = self.cached if p.past or p.kept or held else 0
        return Peak(
            weights=self.weights,
            contexts=round(cached * held) + self.state * bool(held),
            cache=p.rows * (cached * (p.past + p.tokens) + self.state) if p.past or p.kept else 0,
            saved=saved,
            working=working,
            logits=max(0, self._logits(p) - working),
            tiles=self._tiles(p, saved) + self._masks(p),
        )

    def _whole(self, p: Pass) -> Pass:
        """What really runs: a model that does not go on from a state runs its context again."""
        return p if self.model.carries else p._replace(tokens=p.past + p.tokens, past=0)

    def _twice(self, p: Pass) -> tuple[Kept, bool] | None:
        """How blocks are computed twice in a flow, see `anchors.model.memory`."""
        return twice(self.model, p.rows * p.tokens) if p.backward and not p.edited else None

    def _logits(self, p: Pass) -> int:
        return p.rows * p.columns * self._config.vocab_size * self._wide * (2 if p.backward else 1)

    def _tiles(self, p: Pass, saved: int = 0) -> int:
        """Of the last layer only the target has a gradient: before others form tiles, one layer's activations are free."""
        every, keys = self.heads.values(), p.past + p.tokens
        pairs = p.rows * p.tokens * keys
        pattern = pairs * max((h.heads for h in every), default=0) * self._wide
        kind = self.model.device.type
        cut = not all(h.fusable for h in every) or (p.backward and not self.fused)
        tile = pattern if p.edited else cut * min(pattern, TILE_BYTES.get(kind, TILE_BYTES["cpu"]))
        return max(0, AT_ONCE * tile - saved // self.model.n_layers)

    def _masks(self, p: Pass) -> int:
        """In yes and no, and once more in numbers, as torch's kernel has them on the CPU."""
        pairs = p.rows * p.tokens * (p.past + p.tokens)
        return (2 + self._wide) * pairs * any(h.masked for h in self.heads.values())

    def seconds(self, p: Pass) -> float:
        """About how long one pass takes, from passes that are timed here."""
        p = self._whole(p)
        most = max(1, TIMED.get(self.model.device.type, TIMED["cpu"]) // p.rows)
        if self.model.changes:  # of a family that runs other lengths otherwise
            return self._timed(p)
        if p.tokens <= most:
            tokens, past, rows, columns = map(rounded, (p.tokens, min(p.past, most), p.rows, p.columns))
            like = p._replace(tokens=tokens, past=past, rows=rows, columns=columns)
            # Whatever is timed has logits.
            work, own = self.flop(like._replace(columns=max(1, p.columns))), self.flop(p)
            return self._timed(like) * (own / work if work and own else p.rows * p.tokens / (rows * tokens))
        # a T + b T², through two lengths.
        one, two = (p._replace(tokens=n, past=min(p.past, most)) for n in (most // 2, most))
        short, long = self._timed(one), self._timed(two)
        b = max(0.0, (long / two.tokens - short / one.tokens) / (two.tokens - one.tokens))
        taken = (long / two.tokens + b * (p.tokens - two.tokens)) * p.tokens
        # Timed passes are run as they stand.
        work, again = self.flop(p), 2.0 * (self.multiplied or 0.0) * p.rows * p.tokens
        return taken * work / (work - again) if work and self._twice(p) else taken

    @cached_property
    def _times(self) -> dict[Pass, float]:
        self._run(Pass(8))
        return {}

    def _timed(self, p: Pass) -> float:
        p = p._replace(times=1)
        if p not in self._times:
            self._context(p.past)
            self._times[p] = min(seconds(lambda: self._run(p), self.model) for _ in range(2))
        return self._times[p]

    def _run(self, p: Pass) -> None:
        with torch.set_grad_enabled(p.backward):
            back = self._forward(p)
            if p.backward:
                back()

    def _forward(self, p: Pass) -> Any:
        """A pass of random tokens as far as its loss, and what differentiates that."""
        lm, layers = self.model, frozenset(self.model.layers)
        ids = self._ids(p.rows, p.tokens)
        # As many different columns as rows of different lengths have.
        last = p.tokens - 1 - torch.arange(p.rows, device=lm.device) % max(1, min(p.columns, p.tokens))
        context = self._context(p.past)
        with ExitStack() as stack:
            if p.edited:
                factor = torch.ones(1, 1, 1, 1, device=lm.device, requires_grad=p.backward)
                edit = Edit(layers & {*range(p.edited)}, weight=lambda _: factor, name="cost", neutral=True)
                stack.enter_context(seam(lm.modules, edits=[edit]))
            elif p.backward:
                tap = FlowTap(layers, last[:, None], frozenset())
                stack.enter_context(seam(lm.modules, taps=[tap]))
            if p.kept:
                encode(lm, ids[0].tolist(), context)
                return None
            loss = lm.logits_at(ids, last, context).sum()

        def back() -> None:
            with lm.arithmetic():
                loss.backward()

        return back

    def _context(self, tokens: int) -> Context | None:
        if not tokens:
            return None
        if tokens not in self._contexts:
            with torch.no_grad():
                self._contexts[tokens] = encode(self.model, self._ids(1, tokens)[0].tolist())
        return self._contexts[tokens]

    def _ids(self, rows: int, tokens: int) -> Tensor:
        """Any tokens but padding, which some families do not count."""
        ids = torch.randint(self._config.vocab_size, (rows, tokens), device=self.model.device)
        padding = getattr(self._config, "pad_token_id", None)
        return (
            ids
            if padding is None
            else torch.where(ids == padding, (padding + 1) % self._config.vocab_size, ids)
        )

    @cached_property
    def _contexts(self) -> dict[int, Context]:
        return {}


def _pairs(tokens: int, keys: int, tile: int) -> float:
    """Pairs of rows and keys in tiles of so many rows, of which each ends at the last key that its last row sees."""
    full, rest = divmod(tokens, tile)
    past = keys - tokens
    return full * tile * past + tile * tile * full * (full + 1) / 2 + rest * keys


def rounded(count: int) -> int:
    """The largest of 2ⁿ and 3 · 2ⁿ that is not above: lengths that are close share a timing."""
    power = 1 << max(0, count.bit_length() - 1)
    return min(count, power * 3 // 2 if 2 * count >= 3 * power else power)


def _chosen(config: Any) -> float | None:
    """The share of its experts that a token is multiplied with."""
    every = [getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts")]
    each = [getattr(config, name, None) for name in ("num_experts_per_tok", "moe_topk", "top_k_experts")]
    count, chosen = (next((n for n in found if n), None) for found in (every, each))
    return chosen / count if count and chosen else None
