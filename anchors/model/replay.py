"""Small work as CUDA graphs: what the CPU takes longer to order than the GPU to do.

One prompt's forward and backward pass is thousands of kernels of a few microseconds. Once recorded, they are replayed by a
single order. A step is recorded at its third use with inputs of the same shapes: the first two run as they stand (and find
out what waits for the GPU), so that a single question costs nothing more. The literal twin is the step itself.

A record holds what the model was: addresses of its weights, its hooks, every attribute of its modules. Where any of these is
another now, all records are thrown away.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from operator import eq
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from anchors.attention.bands import widths

TOKENS = 8192
"""Tokens of a batch beyond which the GPU takes longer than the orders to it."""
RECORDS = 32
"""Records that are kept, the oldest thrown away."""
PLAIN_RUNS = 2
"""Runs of a shape before it is recorded."""
SHARE = 0.25
"""Of a GPU's memory, what records of all models may hold before no more are made: what they hold, no other step can have."""

Step = Callable[..., tuple[Tensor, ...]]


def told_apart(columns: Sequence[int]) -> tuple[list[int], list[int]]:
    """The different columns that rows ask for, the last one again up to a power of two, so that there are few shapes; and which of
    them each row asks for."""
    found = sorted(set(columns))
    padded = [*found, *found[-1:] * ((1 << (len(found) - 1).bit_length()) - len(found))]
    return padded, [found.index(column) for column in columns]


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Each source into its target. torch copies tensors of one dtype by one order, those of several dtypes by one order each."""
    of_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        for own, x in zip(of_dtype.setdefault(target.dtype, ([], [])), (target, source), strict=True):
            own.append(x)
    for own, given in of_dtype.values():
        torch._foreach_copy_(own, given)


class _Record:
    """A step as a graph, its inputs and outputs at fixed addresses."""

    def __init__(self, step: Step, inputs: Sequence[Tensor], pool: Any) -> None:
        self.inputs = [x.clone() for x in inputs]
        self.graph = torch.cuda.CUDAGraph()
        device = self.inputs[0].device
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            self.graph.capture_begin(pool=pool)
            try:
                self.outputs = step(*self.inputs)
            finally:
                self.graph.capture_end()
        torch.cuda.current_stream(device).wait_stream(side)

    def replay(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        copy_all(self.inputs, inputs)
        self.graph.replay()
        return tuple(x.clone() for x in self.outputs)


class Replays:
    """The records of one model.

    Attributes:
        refused: why a step was not recorded.
        full: why none is recorded any more; None where some may be.
    """

    def __init__(self) -> None:
        self._records: OrderedDict[Hashable, _Record] = OrderedDict()
        self._runs: dict[Hashable, int] = {}
        self._widths: dict[Hashable, dict[int, int | None]] = {}
        self.refused: dict[Hashable, str] = {}
        self.full: str | None = None
        self._state: State | None = None
        self._pool: Any = None

    def __call__(
        self, model: nn.Module, key: Hashable, step: Step, inputs: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """`step(*inputs)`, replayed where it has been recorded.

        Args:
            model: whose state the record depends on.
            key: names the step, and everything that it reads beside `inputs` and the model.
            step: waits for the GPU nowhere; returns tensors without a gradient.
            inputs: on the GPU.
        """
        state = self._state_of(model)
        if not state.one_device:  # what another device does is in no record
            return step(*inputs)
        key = (key, *((x.shape, x.dtype, x.device) for x in inputs))
        with widths(self._widths.setdefault(key, {})):
            return self._run(key, step, inputs)

    def _run(self, key: Hashable, step: Step, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        record = self._records.get(key)
        if record is None:
            self._runs[key] = self._runs.get(key, 0) + 1
            if self._runs[key] <= PLAIN_RUNS or key in self.refused:
                return step(*inputs)
            record = self._recorded(key, step, inputs)
        if record is None:
            return step(*inputs)
        self._records.move_to_end(key)
        return record.replay(inputs)

    def _recorded(self, key: Hashable, step: Step, inputs: Sequence[Tensor]) -> _Record | None:
        if waiting := [layer for layer, width in self._widths[key].items() if width is None]:
            self.refused[key] = (
                f"the attention of layers {waiting} waits for the GPU: it is computed in tiles, or its mask is no band"
            )
            return None
        if self.full is not None:
            self.refused[key] = self.full
            return None
        if not self._records:
            # A pool dies with its last graph, also one whose recording failed, and no other can be recorded into it.
            self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.synchronize(inputs[0].device)
        try:
            record = _Record(step, inputs, self._pool)
        except RuntimeError as why:  # something waits for the GPU, or its memory does not suffice
            self.refused[key] = str(why).splitlines()[0]
            torch.cuda.empty_cache()
            return None
        self._records[key] = record
        try:
            held = _share(inputs[0].device)
            self.full = f"records hold {held:.0%} of the GPU's memory" if held > SHARE else None
        except RuntimeError as why:  # another allocator
            self.full = str(why).splitlines()[0]
        while len(self._records) > RECORDS:
            self._records.popitem(last=False)
        return record

    @property
    def recorded(self) -> int:
        """How many records there are."""
        return len(self._records)

    def forget(self) -> None:
        """Throw all records away."""
        for told in (self._records, self._runs, self._widths, self.refused):
            told.clear()
        self.full = None

    def _state_of(self, model: nn.Module) -> "State":
        if self._state is None or not self._state.same():
            self.forget()
            self._state = State(model)
        return self._state


class State:
    """What the modules of a model hold, to be told from what they hold later.

    Attributes:
        one_device: whether all weights lie on one GPU.
    """

    def __init__(self, model: nn.Module) -> None:
        own = [vars(module) for module in model.modules()]
        inner = [value for held in own for value in held.values() if isinstance(value, dict)]
        self.filled = [*own, *(held for held in inner if held)]
        self.empty = [held for held in inner if not held]
        self.copies = [*map(dict, self.filled)]
        self.weights = [*model.parameters(), *model.buffers()]
        self.places = self._places()
        self.one_device = {weight.device.type for weight in self.weights} == {"cuda"} and (
            len({weight.device for weight in self.weights}) == 1
        )

    def _places(self) -> list[int]:
        return [*map(Tensor.data_ptr, self.weights)]

    def same(self) -> bool:
        """Asked before every replay, so it is one pass in C: dictionaries compare what they hold by identity first."""
        try:
            held = not any(map(len, self.empty)) and all(map(eq, self.filled, self.copies))
        except (RuntimeError, ValueError):  # tensors in the place of others say no clear yes or no
            return False
        return held and self.places == self._places()


_REPLAYS: "WeakKeyDictionary[nn.Module, Replays]" = WeakKeyDictionary()


def replays_of(model: nn.Module) -> Replays:
    """The records of a model, to be looked at, or thrown away where their memory is needed."""
    return _REPLAYS.setdefault(model, Replays())


def _holding() -> list[Replays]:
    return [records for records in _REPLAYS.values() if records.recorded]


def _share(device: torch.device) -> float:
    """Of a GPU's memory, what records of all models have taken: their pools, and their inputs, which lie outside of these."""
    holding = _holding()
    pools = {tuple(records._pool) for records in holding}
    taken = sum(
        segment["total_size"]
        for segment in torch.cuda.memory_snapshot()
        if tuple(segment["segment_pool_id"]) in pools
    )
    inputs = [x for records in holding for record in records._records.values() for x in record.inputs]
    taken += sum(x.untyped_storage().nbytes() for x in inputs)
    return taken / torch.cuda.get_device_properties(device).total_memory


def released() -> bool:
    """Throw all records of all models away, where a step found no memory, not to be made again; whether there were any."""
    holding = _holding()
    for records in holding:
        keys = list(records._records)
        records.forget()
        records.refused = dict.fromkeys(keys, "beside its record another step found no memory")
    return bool(holding)


def replayed(model: nn.Module, key: Hashable, step: Step, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """`step(*inputs)`; on CUDA from its third run on as one order, see `Replays`."""
    if inputs[0].device.type != "cuda":
        return step(*inputs)
    return replays_of(model)(model, key, step, inputs)
