"""The witness of every certificate: the model as it came, asked the plain way.

What `load` does to a model (the seam, fused activations, hooks) changes attributes of its modules and configurations
and nothing else. `Witness.of` keeps a copy of all of them before the first change; `Witness.untouched` puts that copy
back for a while. In between, the model is the one that transformers built, on its own eager attention: it makes its
own positions and its own mask, and no line of this toolkit takes part.
"""

import copy
import inspect
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from anchors.context import cache_argument
from anchors.errors import AnchorsError, brief
from anchors.model.lengths import numbers

TOLERANCE = {"float64": 1e-5, "float32": 1e-4, "tf32": 2e-2, "bfloat16": 1e-1, "float16": 2e-2}
"""How far logits on the seam may be from the witness's, see `apart`. Eager attention forms its softmax in float32 at
any precision, and in half precision the witness rounds everywhere, the seam's attention nowhere."""

ROWS = 64
"""Query rows that are asked where the whole would be too much."""

EAGER_BYTES = 1 << 31
"""Memory that the witness's attention matrices and logits may take."""

_TEXT = "Review: a quiet film, and a very good one.\nSentiment: Positive\n\nReview: far too long and rather dull.\nSentiment:"

Part = nn.Module | PreTrainedConfig


@dataclass(frozen=True)
class Witness:
    """A model as it came.

    Attributes:
        model: the model object, whatever has been done to it since.
        parts: its modules and configurations, each with a copy of its attributes.
        ids: a few tokens, and in a second row the same with another last one.
        said: its logits there, before anything was done to it.
    """

    model: PreTrainedModel
    parts: tuple[tuple[Part, dict[str, Any]], ...]
    ids: Int[Tensor, "2 tokens"]
    said: Float[Tensor, "2 tokens vocabulary"]

    @classmethod
    def of(cls, model: PreTrainedModel, ids: Int[Tensor, "2 tokens"], **beside: Tensor) -> "Witness":
        """Keep how a model is now, and what it says: to be taken before anything is done to it.

        Args:
            model: in eval mode.
            ids: see `Witness`.
            beside: what else its forward demands, of one row (pixels); each row is then asked alone.

        Raises:
            AnchorsError: the model by itself does not run.
        """
        parts: list[Part] = [*model.modules(), *_configurations(model)]
        witness = cls(
            model, tuple((part, _copied(vars(part))) for part in parts), ids, torch.empty(*ids.shape, 0)
        )
        if not beside:
            return replace(witness, said=witness.logits(ids))
        rows = [
            witness.answer(input_ids=row, attention_mask=torch.ones_like(row), **beside)
            for row in ids.split(1)
        ]
        return replace(witness, said=torch.cat(rows))

    @contextmanager
    def untouched(self, attention: str = "eager") -> Generator[PreTrainedModel]:
        """The model as it came, on transformers' own `attention`; whatever it is now comes back afterwards.

        Buffers that a run replaces (dynamic NTK's frequencies) are forgotten, too: each time starts as the first.
        """
        now = [dict(vars(part)) for part, _ in self.parts]
        matmul = torch.backends.cuda.matmul
        precision, matmul.fp32_precision = matmul.fp32_precision, "ieee"
        try:
            for part, came in self.parts:
                _become(part, _copied(came))
                if isinstance(part, PreTrainedConfig):
                    vars(part)["_attn_implementation_internal"] = attention
            yield self.model
        finally:
            for (part, _), was in zip(self.parts, now, strict=True):
                _become(part, was)
            matmul.fp32_precision = precision

    @torch.no_grad()
    def logits(
        self, ids: Int[Tensor, "batch tokens"], mask: Int[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch tokens vocabulary"]:
        """`model(input_ids=ids, attention_mask=mask).logits`, of every token.

        Raises:
            AnchorsError: the model by itself does not run.
        """
        mask = torch.ones_like(ids) if mask is None else mask
        with self.untouched() as model, _by_itself(model):
            return model(input_ids=ids, attention_mask=mask).logits

    @torch.no_grad()
    def last_logits(
        self, ids: Int[Tensor, "1 tokens"], first: int | None = None
    ) -> Float[Tensor, "1 rows vocabulary"]:
        """Logits of the last `ROWS` tokens of a long prompt, whose attention matrices are the only ones formed.

        The tokens before them go into the model's own cache through transformers' own fused attention.

        Args:
            ids: the prompt.
            first: the position of its first token (`first_position`), from which those of the last ones are counted: after a cache
                a family may begin anew without (Bamba). None where positions cannot be set.

        Raises:
            AnchorsError: the model by itself does not run, or keeps no cache.
        """
        mask, before = torch.ones_like(ids), ids.shape[1] - ROWS
        fused = "sdpa" if getattr(self.model, "_supports_sdpa", False) else "eager"
        with self.untouched(fused) as model, _by_itself(model):
            said = model.base_model(
                input_ids=ids[:, :before], attention_mask=mask[:, :before], use_cache=True
            )
        past = getattr(said, "past_key_values", None)
        if past is None:
            raise AnchorsError(
                f"{type(self.model).__name__} by itself keeps no cache of a prompt's beginning.",
                code="no-shared-context",
            )
        where = {}
        if first is not None:
            where["position_ids"] = torch.arange(before, ids.shape[1], device=ids.device)[None] + first
        with self.untouched() as model, _by_itself(model):
            return model(
                input_ids=ids[:, before:], attention_mask=mask, **where, **{cache_argument(model): past}
            ).logits

    @torch.no_grad()
    def answer(self, **inputs: Any) -> Float[Tensor, "batch tokens vocabulary"]:
        """`model(**inputs).logits`, of every token: for prompts that are more than tokens.

        Raises:
            AnchorsError: the model by itself does not run.
        """
        with self.untouched() as model, _by_itself(model):
            return model(**inputs, use_cache=False).logits

    def bytes(self, tokens: int) -> int:
        """About the memory that `logits` takes for one prompt: scores, weights and their copy, and the logits."""
        config = self.model.config.get_text_config()
        heads = max(numbers(config, "num_attention_heads"), default=1)
        return 4 * tokens * (3 * heads * tokens + 2 * _rows(self.model))


def _configurations(model: nn.Module) -> list[PreTrainedConfig]:
    """Every configuration object that a module of the model reads, those inside others included."""
    found: dict[int, PreTrainedConfig] = {}
    waiting = [
        x for module in model.modules() for x in vars(module).values() if isinstance(x, PreTrainedConfig)
    ]
    while waiting:
        config = waiting.pop()
        if id(config) not in found:
            found[id(config)] = config
            waiting += [x for x in vars(config).values() if isinstance(x, PreTrainedConfig)]
    return list(found.values())


def _copied(attributes: dict[str, Any]) -> dict[str, Any]:
    """Attributes with their containers (submodules, buffers, hooks) copied, so that no change reaches the copy."""
    return {
        name: copy.copy(value) if isinstance(value, (dict, list, set)) else value
        for name, value in attributes.items()
    }


def _become(part: Part, attributes: dict[str, Any]) -> None:
    own = vars(part)
    own.clear()
    own.update(attributes)


@contextmanager
def _by_itself(model: PreTrainedModel) -> Generator[None]:
    """Say of an exception that it is the model's own."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a family's own code raises
        raise AnchorsError(
            f"{type(model).__name__} does not run by itself, in transformers' own code without this toolkit: {brief(error)}",
            "transformers took flash-linear-attention (fla-core), which runs on GPUs only: let anchors.load read the model's "
            "folder in a fresh process, or uninstall fla-core."
            if "active drivers" in str(error)
            else "Does its configuration make a model (key-value heads that divide the heads), and do its kernels run on this "
            "device? Run model(input_ids=…) to see it.",
            code="model-broken",
        ) from error


def apart(ours: Float[Tensor, "*rows vocabulary"], theirs: Float[Tensor, "*rows vocabulary"]) -> float:
    """How far logits are from the witness's, as a part of what they say.

        ‖ours − theirs‖ / ‖theirs‖   over all rows, each with its mean taken off

    because a softmax sees no constant, which in some models is much larger than all differences. Infinite where one
    side has an infinite entry or none and the other has not.
    """
    off = size = 0.0
    flat = ours.reshape(-1, ours.shape[-1]), theirs.reshape(-1, theirs.shape[-1]).to(ours.device)
    for one, other in zip(*(side.split(ROWS) for side in flat), strict=True):
        if not bool((one.float().sum() + other.float().sum()).isfinite()):
            finite = torch.isfinite(other)
            if not torch.equal(torch.isfinite(one), finite):
                return float("inf")
            one, other = (_filled(x, finite) for x in (one, other))
        one, other = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (one, other))
        off += float((one - other).var(-1, correction=0).sum())
        size += float(other.var(-1, correction=0).sum())
    return (off / size) ** 0.5 if size else float(off > 0)


def _filled(logits: Float[Tensor, "rows vocabulary"], finite: Tensor) -> Float[Tensor, "rows vocabulary"]:
    """A row's mean where an entry is not finite: there it adds nothing to the row's variance."""
    kept = logits.masked_fill(~finite, 0)
    return kept + (kept.sum(-1, keepdim=True) / finite.sum(-1, keepdim=True).clamp(min=1)).masked_fill(
        finite, 0
    )


def _rows(model: PreTrainedModel) -> int:
    """Tokens of the embedding."""
    return cast(Tensor, model.get_input_embeddings().weight).shape[0]


def sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, most: int = 8
) -> Int[Tensor, "2 tokens"]:
    """A few tokens of text, and the same with another last one."""
    rows = _rows(model)
    ids = [i for i in tokenizer(_TEXT)["input_ids"] if i < rows][:most]
    return with_another_last(model, torch.tensor(ids, device=model.device))


def with_another_last(
    model: PreTrainedModel, ids: Int[Tensor, " tokens"], unlike: int | None = None
) -> Int[Tensor, "2 tokens"]:
    """Some tokens, and the same with another last one, which is not `unlike` (an image token)."""
    known = [*ids.tolist(), *range(_rows(model))]
    last = next((i for i in known if i not in (known[len(ids) - 1], unlike)), 0)
    return torch.stack([ids, torch.cat([ids[:-1], ids.new_tensor([last])])])


def leak(logits: Float[Tensor, "tokens vocabulary"], other: Float[Tensor, "tokens vocabulary"]) -> float:
    """How far another last token moves the logits before it: in a causal model not at all."""
    return apart(other[:-1], logits[:-1])


def flat(logits: Float[Tensor, "*rows vocabulary"]) -> bool:
    """Whether no token of the vocabulary is told from any other, beyond rounding: then no loss has a gradient."""
    other = ~torch.isfinite(logits)
    low, high = logits.masked_fill(other, torch.inf).amin(-1), logits.masked_fill(other, -torch.inf).amax(-1)
    size = logits.masked_fill(other, 0).abs().max()
    return bool(((low <= high) & (high - low <= torch.finfo(logits.dtype).eps * size)).all())


@torch.no_grad()
def first_position(witness: Witness, tolerance: float) -> int | None:
    """Where a family counts positions from, as its `forward` understands `position_ids`; None where they cannot be set.

    Asked of the model itself: the numbers with which it says what it says without any. Most families count from 0,
    RoBERTa and its kin from `padding_idx + 1`. Decoders in the manner of BART swallow the argument: other positions
    change nothing, and a token stands where the cache ends. A model without any positions takes every number.
    """
    ids, model = witness.ids[:1].expand(2, -1), witness.model
    steps = torch.arange(ids.shape[1], device=ids.device)
    named = "position_ids" in inspect.signature(model.forward).parameters
    config = model.config.get_text_config()
    padding, longest = (getattr(config, name, None) for name in ("pad_token_id", "max_position_embeddings"))
    firsts = [0]
    if padding is not None and longest is not None and 0 <= padding < longest - ids.shape[1]:
        firsts.append(padding + 1)
    for first in firsts:
        try:
            with witness.untouched() as model:
                # In the second row the order is turned round: a model that hears of positions notices.
                forth, back = model(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    position_ids=torch.stack([steps, steps.flip(0)]) + first,
                ).logits
        except torch.OutOfMemoryError:
            raise
        except Exception:  # noqa: BLE001 - a family whose forward has no such argument, or takes other shapes
            return None
        off = apart(forth, witness.said[0])
        if off > tolerance:
            continue
        if apart(back, forth) > max(10 * off, 4 * torch.finfo(model.dtype).eps):
            return first
        return 0 if named and _unordered(witness, tolerance) else None
    return None


def _unordered(witness: Witness, tolerance: float) -> bool:
    """Whether a model has no positions: a hidden token in the middle is as good as none."""
    ids = witness.ids[:1]
    middle = ids.shape[1] // 2
    mask = torch.ones_like(ids)
    mask[:, middle] = 0
    try:
        hidden = witness.logits(ids, mask)[:, middle + 1 :]
    except AnchorsError:  # a model that takes no such mask cannot be asked
        return False
    gone = witness.logits(torch.cat([ids[:, :middle], ids[:, middle + 1 :]], 1))[:, middle:]
    return apart(hidden, gone) <= tolerance
