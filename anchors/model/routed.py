"""What a model on the seam is, with images or without: where it runs, how it multiplies, where its attention changes."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from anchors.attention.layers import beside_attention, ranges
from anchors.errors import AnchorsError, nearest
from anchors.model.alteration import Alteration
from anchors.model.identity import Identity
from anchors.model.lengths import Change, changes, demand_one_side
from anchors.model.witness import TOLERANCE, Witness, flat, leak, sample, with_another_last

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""Weights by precision; `tf32` is float32 whose products run on TF32 tensor cores (CUDA) with float32 sums."""

DEVICES = ("auto", "cpu", "cuda", "cuda:1", "mps")
"""What a device may be called, as examples."""


@dataclass(frozen=True, kw_only=True)
class Routed(ABC):
    """A frozen model whose attention stands on the seam, with its tokenizer.

    Attributes:
        model: the transformers model, in eval mode, no parameter requiring a gradient.
        tokenizer: its fast tokenizer (offsets are needed).
        name: what the user called it.
        precision: the arithmetic, one of `DTYPES`.
        modules: the attention modules, by layer, None for a layer without attention; none at all where the model was not put
            on the seam.
        witness: the model as it came, for certificates; None where it was not put on the seam.
        altered: what was changed in the model beside that; see `anchors.model.preparation.undone`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    precision: str
    modules: tuple[nn.Module | None, ...] = ()
    witness: Witness | None = None
    altered: tuple[Alteration, ...] = ()

    @property
    @abstractmethod
    def identity(self) -> Identity:
        """What the numbers depend on, as the model is now; every weight is read (see `anchors.model.identity`)."""

    @property
    @abstractmethod
    def n_layers(self) -> int:
        """Decoder layers, whether they attend or not."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The numbers of the layers that attend, counted among all."""
        return tuple(layer for layer, module in enumerate(self.modules) if module is not None)

    @property
    def beside_attention(self) -> str | None:
        """Of a model with recurrent layers, what attention does not show, in a sentence."""
        return beside_attention(self.model.config.get_text_config())

    def demand_attention(self, layers: Iterable[int]) -> None:
        """Refuse numbers of layers that do not attend.

        Raises:
            AnchorsError: names them, and those that do.
        """
        if unknown := sorted(set(layers) - set(self.layers)):
            own = f"0 to {self.n_layers - 1}"
            there = (
                own if len(self.layers) == self.n_layers else f"{own}, of which {ranges(self.layers)} attend"
            )
            what = "attention in layers" if set(unknown) <= set(range(self.n_layers)) else "layers"
            raise AnchorsError(
                f"The model has no {what} {unknown}.", f"It has layers {there}.", code="layers"
            )

    @property
    def fingerprint(self) -> str:
        """The digest of `identity`: thirty-two hex digits, part of the key of every result."""
        return self.identity.digest

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def context(self) -> int | None:
        """The longest prompt the positions of the model allow, in tokens; None when it does not say."""
        text = self.model.config.get_text_config()
        longest = getattr(text, "max_position_embeddings", None)
        return getattr(text, "max_seq_len", None) if longest is None else longest  # MPT's name

    @cached_property
    def changes(self) -> tuple[Change, ...]:
        """The lengths at which this model's attention changes; see `anchors.model.lengths`."""
        return changes(self.model.config)

    def demand_one_side(self, lengths: Sequence[int], encoded: int | None = None) -> None:
        """Refuse rows, or a context encoded at some length, that the family's rotary embedding tells apart by length.

        Raises:
            AnchorsError: see `anchors.model.lengths.demand_one_side`.
        """
        demand_one_side(self.changes, lengths, encoded, self.name)

    @contextmanager
    def arithmetic(self) -> Generator[None]:
        """The matrix-product mode of this model's precision, put back afterwards.

        On CUDA a half-precision model keeps what runs past its layers (the residual stream and its gradient,
        norms) in float32: rounding it twice per layer would be the largest error of all.
        """
        matmul = torch.backends.cuda.matmul
        before = matmul.fp32_precision
        # Half-precision operands are exact in TF32, so the tiles of a half-precision model lose nothing by it.
        half = self.precision in ("bfloat16", "float16")
        wide = half and self.device.type == "cuda"
        matmul.fp32_precision = "tf32" if half or self.precision == "tf32" else "ieee"
        try:
            with torch.autocast("cuda", DTYPES[self.precision]) if wide else nullcontext():
                yield
        finally:
            matmul.fp32_precision = before


def placed(device: str, precision: str) -> tuple[torch.device, str]:
    """The device and the precision that are meant, `auto` decided.

    Raises:
        AnchorsError: there is no such device or precision here.
    """
    try:
        where = torch.device(_auto_device() if device == "auto" else device)
    except RuntimeError as error:
        raise AnchorsError(f"{device!r} is no device.", nearest(device, DEVICES), code="device") from error
    if where.type == "cpu" and where.index:
        raise AnchorsError(
            f"There is no device {device!r} here.", "The CPU is one device: --device cpu.", code="device"
        )
    if where.type == "cuda" and not torch.cuda.is_available():
        raise AnchorsError(
            "There is no CUDA device here.", "Use --device cpu, or leave it at auto.", code="device"
        )
    if where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count():
        raise AnchorsError(
            f"There is no device {device!r} here.",
            f"CUDA devices: 0 to {torch.cuda.device_count() - 1}.",
            code="device",
        )
    if where.type == "mps" and not torch.backends.mps.is_available():
        raise AnchorsError(
            "There is no MPS device here.", "Use --device cpu, or leave it at auto.", code="device"
        )
    if where.type not in ("cpu", "cuda", "mps"):
        raise AnchorsError(
            f"Models are not run on the device {device!r}.", nearest(device, DEVICES), code="device"
        )
    if precision == "auto":
        precision = "tf32" if where.type == "cuda" else "float32"
    if precision not in DTYPES:
        raise AnchorsError(
            f"Unknown precision {precision!r}.", nearest(precision, ["auto", *DTYPES]), code="unknown-name"
        )
    return where, precision


def testify(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    precision: str,
    shown: Mapping[str, Tensor] | None,
) -> Witness:
    """The witness of a model, taken before anything is done to it.

    Args:
        model: as it came.
        tokenizer: its own.
        precision: one of `DTYPES`.
        shown: what to ask, of one row that ends in text, where the model's forward demands more than tokens: `input_ids` and
            pixels. None asks a few tokens of text.

    Raises:
        AnchorsError: the model by itself does not run, says the same of every token, or later tokens move its earlier
            logits.
    """
    if shown is None:
        witness = Witness.of(model, sample(model, tokenizer))
    else:
        beside = {name: x for name, x in shown.items() if name not in ("input_ids", "attention_mask")}
        image = getattr(model.config, "image_token_id", None)
        witness = Witness.of(model, with_another_last(model, shown["input_ids"][0], image), **beside)
    if flat(witness.said):
        raise AnchorsError(
            f"{type(model).__name__} by itself gives every token of its vocabulary the same logit: the gradient of any loss "
            "is zero everywhere, so that there is nothing to look into.",
            "Its output weights are zero or all alike: give the weights of a trained model.",
            code="no-gradient",
        )
    moved = leak(*witness.said)
    if not moved <= TOLERANCE[precision]:
        raise AnchorsError(
            f"{type(model).__name__} is not causal as it is configured: by itself, without this toolkit, later tokens "
            f"move its earlier logits by {moved:.1e} of their size.",
            "Give a decoder; an encoder with a language-model head becomes one with is_decoder=True in its "
            "configuration (and weights trained so).",
            code="not-causal",
        )
    return witness


def _auto_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def seconds(run: Callable[[], object], model: Routed) -> float:
    """Wall-clock seconds of a call, the device's queue included."""
    start = time.perf_counter()
    run()
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter() - start
