"""The seam: the one place through which every attention call of every layer passes.

transformers lets an attention function be registered and chosen by name; it receives q, k and v after rotary
embedding and cache, the mask and the scale. `route` puts a model on it and proves, with one small run, that each of
its layers arrives there exactly once; a family that routes its attention elsewhere is refused.

    with seam(routed, edits=[...], taps=[...]):
        loss(model(ids)).backward()

A layer without edit and tap runs torch's fused kernel. On leaving, every edit, tap and probe must have fired in
every layer it names.
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from anchors.attention import bridges
from anchors.attention.call import AttentionCall
from anchors.attention.edits import Edit
from anchors.attention.form import Call, biased
from anchors.attention.layers import attending, kinds, ranges
from anchors.attention.selection import chosen_blocks, chosen_keys
from anchors.attention.taps import Probe, Tap
from anchors.errors import AnchorsError, RoutingError
from anchors.families import known

NAME = "anchors"
MASKED = "anchors_masked"
"""The name under which no mask is left out. transformers drops a causal mask for a module that says itself that it is
causal; where a layer says that it is not (BigBird-Pegasus' decoder), no mask would mean that everything is seen."""
IGNORED = {
    "position_ids",
    "cache_position",
    "position_embeddings",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "logits_to_keep",
}
"""Tensors that some families pass along and that do not enter the arithmetic after q, k and v are made; the last one is the
head's (LLaVA-OneVision hands it to both)."""


@dataclass
class _Session:
    layer_of: dict[nn.Module, int]
    edits: Sequence[Edit] = ()
    taps: Sequence[Tap] = ()
    probes: Sequence[Probe] = ()
    before: tuple[int, Sequence[Edit]] = (0, ())
    tokens: int | None = None
    reached: list[nn.Module] = field(default_factory=list)
    fired: set[tuple[int, int]] = field(default_factory=set)

    def run(self, call: Call) -> Tensor:
        """A call's output; of a whole prompt, that of a context's tokens first, and the rest as if these stood in a cache."""
        tokens, edits = self.before
        if not tokens:
            return self._run(call)
        context, rest = parted(call, tokens)
        own = [edit for edit in edits if call.layer in edit.layers]
        first = context.edited(own) if own else context.fused() if context.fusable else context.streamed(())
        return torch.cat([first.expand(len(call.q), -1, -1, -1), self._run(rest)], 2)

    def _run(self, call: Call) -> Tensor:
        edits = [edit for edit in self.edits if call.layer in edit.layers]
        taps = [tap for tap in self.taps if call.layer in tap.layers]
        probes = [probe for probe in self.probes if call.layer in probe.layers]
        for actor in (*edits, *taps, *probes):
            self.fired.add((id(actor), call.layer))
        for probe in probes:
            probe.see(call)
        if edits and taps:
            raise AnchorsError(
                f"Layer {call.layer} has an edit and a tap at once.",
                "Run them one after the other.",
                code="options-together",
            )
        if edits:
            return call.edited(edits)
        if taps or not call.fusable:
            return call.streamed(taps)
        return call.fused()

    def verify(self) -> None:
        for actor in (*self.edits, *self.taps, *self.probes):
            missed = sorted(layer for layer in actor.layers if (id(actor), layer) not in self.fired)
            if missed:
                name = getattr(actor, "name", type(actor).__name__)
                raise RoutingError(
                    f"{name!r} did not fire in layer{'s' * (len(missed) > 1)} {missed}: nothing was changed or seen there.",
                    f"Attention stands in the layers {ranges(sorted(self.layer_of.values()))}, and the model must be run inside the seam.",
                    code="without-effect",
                )


_active: ContextVar[_Session | None] = ContextVar("anchors_seam", default=None)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    indices: Tensor | None = None,
    block_indices: Tensor | None = None,
    key_bias: Tensor | None = None,
    position_bias: Tensor | None = None,
    form: Callable[..., Call] = AttentionCall,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in each layer; see `transformers.AttentionInterface`.

    A layer whose attention is of another kind passes its own `form` of the call.
    """
    unknown = [name for name, value in kwargs.items() if name not in IGNORED and _holds_tensor(value)]
    if unknown:
        raise RoutingError(
            f"{type(module).__name__} passes {unknown} to its attention, which the seam does not know.",
            "This family needs support in anchors/attention/dense.py.",
        )
    if softcap is not None and key_bias is not None:
        raise RoutingError(
            f"{type(module).__name__} caps its scores softly and biases them, too.",
            "This family needs support in anchors/attention/dense.py.",
        )
    if dropout:
        raise RoutingError(
            f"{type(module).__name__} asks for attention dropout {dropout}.", "Call model.eval()."
        )
    if indices is not None:
        attention_mask = chosen_keys(indices, attention_mask, key.shape[2])
    if block_indices is not None:
        places = kwargs.get("position_ids")
        attention_mask = chosen_blocks(module, block_indices, attention_mask, key.shape[2], places)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if position_bias is not None:
        attention_mask = biased(position_bias, attention_mask, causal)
    special = {"softcap": softcap, "sinks": s_aux, "key_bias": key_bias}
    session = _active.get()
    known = session is not None and module in session.layer_of
    call = form(
        layer=session.layer_of[module] if session is not None and known else -1,
        # Rotary embedding widens queries and keys where the residual stream is wider than the weights.
        q=query.to(value.dtype),
        k=key.to(value.dtype),
        v=value,
        scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        mask=attention_mask,
        causal=causal,
        **{name: own for name, own in special.items() if own is not None},
    )
    if session is not None:
        session.reached.append(module)
        if session.tokens not in (None, key.shape[2]):
            raise RoutingError(
                f"{type(module).__name__} attends to {key.shape[2]} keys in a prompt of {session.tokens} tokens: they are "
                "not its tokens.",
                "Models that attend to compressed keys cannot be analysed: there is no flow between words to read.",
            )
    with torch.autocast(value.device.type, enabled=False):
        if session is not None and known:
            z = session.run(call)
        else:
            z = call.fused() if call.fusable else call.streamed(())
    return z.transpose(1, 2).contiguous(), None


def _holds_tensor(value: object) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_tensor, value.values()))
    return isinstance(value, Tensor) or (isinstance(value, (list, tuple)) and any(map(_holds_tensor, value)))


def _whole_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    return sdpa_mask(
        *args, **(kwargs | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    )


for _name, _mask in ((NAME, sdpa_mask), (MASKED, _whole_mask)):
    AttentionInterface.register(_name, attend)
    AttentionMaskInterface.register(_name, _mask)


def route(model: PreTrainedModel) -> tuple[nn.Module | None, ...]:
    """Put a model on the seam; returns its attention modules, by layer: None for a layer that has none by its configuration.

    Raises:
        RoutingError: when a layer's attention does not arrive at the seam exactly once.
    """
    if not bridges.bridge(model, attend, NAME, MASKED):
        if not model._can_set_attn_implementation():
            raise RoutingError(
                f"{type(model).__name__} computes attention in its own code, not through transformers' "
                "AttentionInterface: edits on it would silently do nothing.",
                known("causal"),
            )
        model.set_attn_implementation(NAME)
    reached = _reached(model)
    if not all(getattr(module, "is_causal", True) for module in reached):
        model.set_attn_implementation(MASKED)
    config = model.config.get_text_config()
    layers, places = config.num_hidden_layers, attending(config)
    calls, modules = len(reached), len(set(reached))
    if not calls or calls != len(places) or modules != calls:
        told = (
            f"{layers} layers"
            if len(places) == layers
            else f"{layers} layers, {len(places)} of which attend ({_told(config)})"
        )
        raise RoutingError(
            f"{type(model).__name__} has {told}, but {calls} attention calls of {modules} modules arrived at the "
            f"seam: {_why(len(places), calls, modules)}.",
            "Models in which every layer that attends does so once can be analysed.",
        )
    if len(places) < layers and (
        elsewhere := _elsewhere(model, layers, dict(zip(places, reached, strict=True)))
    ):
        raise RoutingError(
            f"{type(model).__name__} has attention in layers {ranges(places)} by its configuration ({_told(config)}), but the "
            f"one of layer {elsewhere[0]} arrived at the seam from {elsewhere[1]}.",
            "Layers cannot be told apart by their numbers.",
        )
    found = dict(zip(places, reached, strict=True))
    return tuple(found.get(layer) for layer in range(layers))


def _told(config: Any) -> str:
    own = kinds(config)
    return ", ".join(f"{own.count(kind)} {kind}" for kind in dict.fromkeys(own))


def _elsewhere(model: nn.Module, layers: int, found: dict[int, nn.Module]) -> tuple[int, str] | None:
    """A layer whose attention does not stand at its place in the list of layers, and where it stands."""
    names = {module: name for name, module in model.named_modules()}
    lists = {
        name: own
        for name, own in model.named_modules()
        if isinstance(own, nn.ModuleList) and len(own) == layers
    }
    for layer, module in found.items():
        if not any(names[module].startswith(f"{name}.{layer}.") for name in lists):
            return layer, names[module]
    return None


def _reached(model: PreTrainedModel) -> list[nn.Module]:
    """The modules whose attention arrives at the seam in one small run, in order."""
    ids = torch.arange(4, device=model.device)[None]
    session = _Session(layer_of={}, tokens=ids.shape[1])
    token = _active.set(session)
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    finally:
        _active.reset(token)
    return session.reached


def _why(layers: int, calls: int, modules: int) -> str:
    """What other numbers of attention calls mean."""
    if not calls:
        return "no layer hands its attention to transformers' AttentionInterface: it is recurrent, or has code of its own"
    if modules < layers and calls == modules:
        return (
            "not every layer has attention (others are recurrent or convolutions, attend to images only, or compute it in "
            "code of their own)"
        )
    if modules == layers:
        return f"each layer attends {calls / layers:g} times, and what it does with the results is not seen"
    if modules > layers:
        return f"a layer holds {modules / layers:g} attentions, one after the other"
    return "layers are run several times"


@contextmanager
def own_attention(model: PreTrainedModel) -> Generator[None]:
    """Take a routed model off the seam for a while: its own eager attention, to compare with."""
    if bridges.release(model):
        restore = lambda: bridges.bridge(model, attend, NAME, MASKED)  # noqa: E731
    else:
        name = model.config._attn_implementation
        model.set_attn_implementation("eager")
        restore = lambda: model.set_attn_implementation(name)  # noqa: E731
    try:
        yield
    finally:
        restore()


def parted(call: Call, tokens: int) -> tuple[Call, Call]:
    """The rows of the first tokens, which all examples share, over their own keys, and the other rows over all keys: as with the
    first ones in a cache."""
    mask, (q, k, v) = call.mask, (x[:1, :, :tokens] for x in (call.q, call.k, call.v))
    own = None if mask is None else mask[:1, ..., :tokens, :tokens]
    rest = None if mask is None else mask[..., tokens:, :]
    return replace(call, q=q, k=k, v=v, mask=own), replace(call, q=call.q[:, :, tokens:], mask=rest)


@contextmanager
def after(modules: Sequence[nn.Module | None], tokens: int, edits: Sequence[Edit]) -> Generator[None]:
    """Take the first tokens of whole prompts for a context that was run under some edits: what the seam around this was opened
    with sees the rows that follow, and past them the context's keys."""
    session = _active.get() or _Session(_numbered(modules))
    token = _active.set(replace(session, before=(tokens, tuple(edits))))
    try:
        yield
    finally:
        _active.reset(token)


def editing() -> tuple[Edit, ...]:
    """The edits of the seam that is open."""
    session = _active.get()
    return () if session is None else tuple(session.edits)


def idle() -> bool:
    """Whether no seam is open."""
    return _active.get() is None


def _numbered(modules: Sequence[nn.Module | None]) -> dict[nn.Module, int]:
    return {module: layer for layer, module in enumerate(modules) if module is not None}


@contextmanager
def seam(
    modules: Sequence[nn.Module | None],
    *,
    edits: Iterable[Edit] = (),
    taps: Iterable[Tap] = (),
    probes: Iterable[Probe] = (),
) -> Generator[list[nn.Module]]:
    """Apply edits, taps and probes to the attention of a routed model, as returned by `route`.

    Yields:
        The modules whose attention arrives, in order, as they do.

    Raises:
        RoutingError: on leaving, when one of them did not fire in a layer it names.
        AnchorsError: when an edit changes no visible entry of a layer it names.
    """
    session = _Session(_numbered(modules), tuple(edits), tuple(taps), tuple(probes))
    token = _active.set(session)
    try:
        yield session.reached
    finally:
        _active.reset(token)
    session.verify()
