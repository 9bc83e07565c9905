"""Information flow between words (2.1): I_l = |Σ_h A_{h,l} ⊙ ∂L/∂A_{h,l}|, and its three sums.

Source: Wang et al., "Label Words are Anchors" (EMNLP 2023), section 2.1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from anchors._names import forwarding
from anchors.attention.edits import Edit
from anchors.attention.form import Call
from anchors.attention.seam import seam
from anchors.attention.streaming import triton_runs
from anchors.attention.taps import Slopes, Summed
from anchors.errors import AnchorsError, CertificateError, RoutingError
from anchors.flow.metrics import Sums, flow_sums, left_out
from anchors.model.language import LanguageModel
from anchors.model.lengths import groups
from anchors.model.memory import recomputed
from anchors.model.replay import TOKENS, replayed, told_apart
from anchors.tasks.prompts import Prompt

TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "tf32": 2e-2, "bfloat16": 5e-2, "float16": 2e-2}
"""How far Σ_j A_ij ∂L/∂A_ij may be from ⟨z_i, ∂L/∂z_i⟩, relative to the layer's largest value."""

BUCKET = 32
"""On CUDA small batches are padded to a multiple of so many tokens."""


@dataclass(frozen=True)
class Batch:
    """Prompts padded on the right to one length.

    Attributes:
        ids: token ids; padding repeats the row's last token and is seen by no real one.
        target: q of each row.
        labels: label-word positions, ascending; -1 where a row has fewer.
        tokens, weights: of each row's loss, see `anchors.tasks.prompts.Loss`.
        whole: whether their probabilities are over the whole vocabulary.
    """

    ids: Int[Tensor, "batch tokens"]
    target: Int[Tensor, " batch"]
    labels: Int[Tensor, "batch labels"]
    tokens: Int[Tensor, "batch classes"]
    weights: Float[Tensor, "batch classes"]
    whole: bool


def collate(prompts: Sequence[Prompt], device: torch.device | str = "cpu", width: int = 0) -> Batch:
    """Pad prompts on the right, to `width` tokens at least.

    Raises:
        AnchorsError: a prompt has neither a right answer nor an aim, so that it has no loss; losses of several kinds.
    """
    losses = [prompt.loss for prompt in prompts]
    nameless = [i for i, loss in enumerate(losses) if loss is None]
    if nameless:
        raise AnchorsError(
            f"Prompts {nameless} have no right answer, so they have no loss.",
            "Give each a label.",
            code="prompt",
        )
    known = [loss for loss in losses if loss is not None]
    if len({loss.whole or len(loss.tokens) for loss in known}) > 1:
        raise AnchorsError(
            "Prompts of one batch have losses over other label words, or over label words and over the whole vocabulary.",
            "Measure each kind by itself.",
            code="mixed",
        )
    length = max(width, *(len(prompt.ids) for prompt in prompts))
    count = max(len(prompt.label_positions) for prompt in prompts)
    most = max(len(loss.tokens) for loss in known)

    def padded(row: Sequence[Any], size: int, fill: Any) -> list[Any]:
        return [*row, *[fill] * (size - len(row))]

    return Batch(
        ids=torch.tensor([padded(p.ids, length, p.ids[-1]) for p in prompts], device=device),
        target=torch.tensor([p.target for p in prompts], device=device),
        labels=torch.tensor(
            [padded(p.label_positions, count, -1) for p in prompts], dtype=torch.long, device=device
        ),
        tokens=torch.tensor([padded(x.tokens, most, x.tokens[0]) for x in known], device=device),
        weights=torch.tensor([padded(x.weights, most, 0.0) for x in known], device=device),
        whole=known[0].whole,
    )


def uncounted(prompts: Sequence[Prompt], length: int) -> Bool[Tensor, "batch length"]:
    """The tokens of label words that are no p_k.

    None where the positions are not the label words' own (the control `random-positions`): S_pq says nothing of label
    words there, so that it leaves nothing of them out.
    """
    found = torch.zeros(len(prompts), length, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        counted = set(prompt.label_positions)
        if any(prompt.roles[k] == "label" for k in counted):
            own = [i for i, role in enumerate(prompt.roles) if role == "label" and i not in counted]
            found[row, own] = True
    return found


@dataclass
class FlowTap:
    """Forms I_l tile by tile and keeps what the analyses read: a few rows, one total, on request the whole map.

    Attributes:
        layers: where it listens.
        wanted: query rows to keep, per example; -1 for none.
        maps: layers of which the whole T × T map is kept.
        rows: by layer, I_l of the wanted rows.
        total: by layer, Σ_{j<i} I_l[i, j].
        full: by layer of `maps`, I_l.
        error: by layer, max |Σ_j A_ij ∂L/∂A_ij − ⟨z_i, ∂L/∂z_i⟩| and the largest |⟨z_i, ∂L/∂z_i⟩|: the
            certificate of the saliency, from numbers the model itself computed.
    """

    layers: frozenset[int]
    wanted: Int[Tensor, "batch rows"]
    maps: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        self.rows: dict[int, Tensor] = {}
        self.total: dict[int, Tensor] = {}
        self.full: dict[int, Tensor] = {}
        self.error: dict[int, tuple[Tensor, Tensor]] = {}

    by_branch = False
    """Whether it asks for the sums of each branch of a call, too."""

    def begin(self, call: Call, z: Tensor, dz: Tensor) -> None:
        batch, keys, layer = z.shape[0], call.k.shape[2], call.layer
        _demand_own_tokens(layer, keys, z.shape[2])
        dtype = call.compute_dtype
        self.rows[layer] = z.new_zeros((*self.wanted.shape, keys), dtype=dtype)
        self.total[layer] = z.new_zeros(batch, dtype=dtype)
        if layer in self.maps:
            self.full[layer] = z.new_zeros(batch, z.shape[2], keys, dtype=dtype)
        self._inner = (z.to(dtype) * dz.to(dtype)).sum(-1)
        zero = z.new_zeros((), dtype=dtype)
        self.error[layer] = (zero, self._inner.abs().amax())

    def tile(self, call: Call, rows: Tensor, keys: slice, product: Tensor) -> None:
        layer = call.layer
        off = (product.sum(-1) - self._inner[:, :, rows]).abs().amax()
        worst, scale = self.error[layer]
        self.error[layer] = (torch.maximum(worst, off), scale)
        columns = torch.arange(keys.start, keys.stop, device=rows.device)
        flow = product.sum(1).abs_().masked_fill_(columns == rows[:, None], 0)
        self.total[layer] += flow.sum((1, 2))
        if layer in self.maps:
            self.full[layer][:, rows, keys] = flow
        wanted = self.wanted.to(rows.device)
        place = torch.searchsorted(rows, wanted).clamp_(max=len(rows) - 1)
        present = rows[place] == wanted
        picked = flow.gather(1, place[..., None].expand(*place.shape, flow.shape[-1]))
        self.rows[layer][..., keys] += picked * present[..., None]

    def fused(self, call: Call, slopes: Slopes) -> None:
        from anchors.attention.saliency_kernel import Band, saliency

        layer, length = call.layer, call.k.shape[2]
        found = saliency(
            Band(slopes.window if slopes.window < length else None),
            *(x.transpose(1, 2) for x in (call.q, call.k, call.v, slopes.dz, slopes.lse)),
            scale=call.scale,
            wanted=self.wanted,
            full=layer in self.maps,
            live=(slopes.live, slopes.block),
            base2=True,
            precision=slopes.precision,
        )
        if found.full is not None:
            self.full[layer] = found.full
        self.rows[layer], self.total[layer] = found.rows, found.abs_sums.sum((1, 2))
        self.error[layer] = ((found.head_sums - slopes.inner).abs().amax(), slopes.inner.abs().amax())

    def summed(self, call: Call, dz: Tensor, found: Mapping[str, Summed]) -> None:
        layer, whole = call.layer, found["all"]
        _demand_own_tokens(layer, call.k.shape[2], call.q.shape[2])
        self.rows[layer], self.total[layer] = whole.rows, whole.total
        if whole.full is not None:
            self.full[layer] = whole.full
        if whole.error is not None:
            self.error[layer] = whole.error


def _demand_own_tokens(layer: int, keys: int, tokens: int) -> None:
    if keys != tokens:
        raise RoutingError(
            f"Layer {layer} attends to {keys} keys in a prompt of {tokens} tokens: they are not its tokens.",
            "Models that attend to compressed keys cannot be analysed: there is no flow between words to read.",
        )


@dataclass(frozen=True)
class Flow:
    """The information flow of a batch of prompts.

    Attributes:
        sums: S_wp, S_pq and S_ww per example and layer.
        rest: flow from the label words' other tokens to the target per example and layer, see
            `anchors.flow.metrics.left_out`.
        into: I_l[q, ·] per example and layer: what flows from each token into the target.
        total: Σ_{j<i≤q} I_l[i, j], all that flows, per example and layer.
        probabilities: of the loss's tokens: softmax over the label words' logits at the target; of an aim over the whole
            vocabulary.
        loss: by default the cross-entropy over the label words' logits against the right answer, in nats; see
            `anchors.tasks.prompts.Loss`.
        identity_error: per layer, the certificate's relative error (see `FlowTap.error`).
        maps: by requested layer, I_l: row = the position that receives, column = the one that gives.
    """

    sums: Sums
    rest: Float[Tensor, "batch layers"]
    into: Float[Tensor, "batch layers key"]
    total: Float[Tensor, "batch layers"]
    probabilities: Float[Tensor, "batch classes"]
    loss: Float[Tensor, " batch"]
    identity_error: Float[Tensor, " layers"]
    maps: dict[int, Float[Tensor, "batch query key"]]


def _read(
    logits: Float[Tensor, "batch vocabulary"], tokens: Tensor, whole: bool
) -> Float[Tensor, "batch classes"]:
    """What a loss is made of: the logits of its tokens, or their log probabilities over the whole vocabulary."""
    wide, tokens = torch.promote_types(logits.dtype, torch.float32), tokens.to(logits.device)
    if whole:
        return logits.to(wide).log_softmax(-1).gather(1, tokens)
    return logits.gather(1, tokens).to(wide)


def _loss(
    read: Float[Tensor, "batch classes"], weights: Float[Tensor, "batch classes"], whole: bool
) -> Float[Tensor, " batch"]:
    return (weights.to(read) * (read if whole else read.log_softmax(-1))).sum(-1)


def _probabilities(read: Float[Tensor, "batch classes"], whole: bool) -> Float[Tensor, "batch classes"]:
    return read.exp() if whole else read.softmax(-1)


def demand_finite(loss: Float[Tensor, " batch"]) -> None:
    """Refuse a loss that is not a number.

    Raises:
        AnchorsError: some of them are.
    """
    if not torch.isfinite(loss).all():
        bad = (~torch.isfinite(loss)).nonzero().flatten().tolist()
        raise AnchorsError(
            f"The loss of example(s) {bad} of the batch is not a number: the model's logits overflow.",
            "Use --precision float32 or bfloat16 (float16 overflows easily), and check the model's weights.",
            code="not-finite",
        )


def target_loss(
    logits: Float[Tensor, "batch vocabulary"], batch: Batch
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch classes"]]:
    """L(x) of each prompt (`anchors.tasks.prompts.Loss`), and the probabilities of its tokens.

    Args:
        logits: at the target.
        batch: whose losses they are: by default the cross-entropy over the label words' logits only.

    Raises:
        AnchorsError: a loss that is not a number.
    """
    read = _read(logits, batch.tokens, batch.whole)
    loss = _loss(read, batch.weights, batch.whole)
    demand_finite(loss)
    return loss, _probabilities(read.detach(), batch.whole)


def flow(model: LanguageModel, prompts: Sequence[Prompt], *, maps: Sequence[int] = ()) -> Flow:
    """The information flow of some prompts, exactly and without keeping any attention matrix.

        I_l = |Σ_h A_{h,l} ⊙ ∂L/∂A_{h,l}| = |Σ_h A_{h,l} ⊙ (∂L/∂Z_{h,l} V_{h,l}ᵀ)|

    Each tile of rows of the right-hand side is a by-product of the gradient of attention itself. Its literal twin
    is `literal_flow`.

    Args:
        model: on the seam.
        prompts: with their right answers or aims; run as one batch, or as several where the family encodes positions by the
            length of the longest row (longrope, dynamic NTK).
        maps: layers whose whole T × T map is wanted.

    Raises:
        AnchorsError: a loss that is not a number; a layer the model does not have.
        CertificateError: the saliency does not satisfy Σ_j A_ij ∂L/∂A_ij = ⟨z_i, ∂L/∂z_i⟩.

    Example:
        >>> result = flow(model, prompts, maps=[0, 20])
        >>> result.sums.s_wp.shape                     # examples × layers, those that attend: model.layers
    """
    model.demand_attention(maps)
    parts = groups(model.changes, [len(prompt.ids) for prompt in prompts])
    if len(parts) > 1:
        return _joined([flow(model, [prompts[i] for i in part], maps=maps) for part in parts], parts)
    length = max(len(prompt.ids) for prompt in prompts)
    batch = collate(prompts, model.device, _width(model, len(prompts), length))
    # Their columns are told apart here, where no kernel has to be waited for.
    columns, where = told_apart([prompt.target for prompt in prompts])
    inputs = (
        batch.ids, batch.labels, batch.target, batch.tokens,
        torch.tensor(columns, device=model.device), torch.tensor(where, device=model.device), batch.weights,
        uncounted(prompts, batch.ids.shape[1]).to(model.device),
    )  # fmt: skip
    whole = tuple(maps)
    step = partial(_step, model, whole, batch.whole)
    if batch.ids.numel() <= TOKENS and triton_runs(model.device):
        found = replayed(model.model, ("flow", model.precision, whole, batch.whole), step, inputs)
    else:
        with recomputed(model, batch.ids.numel()):
            found = step(*inputs)
    s_wp, s_pq, s_ww, rest, into, total, errors, read, *full = found
    demand_finite(loss := _loss(read, batch.weights, batch.whole))
    errors = errors.cpu().double()
    relative = errors[:, 0] / errors[:, 1].clamp(min=torch.finfo(torch.float64).tiny)
    if not (relative <= TOLERANCE[model.precision]).all():
        worst = int(relative.nan_to_num(torch.inf).argmax())
        raise CertificateError(
            f"In layer {model.layers[worst]} of {model.name} Σ_j A_ij ∂L/∂A_ij differs from ⟨z_i, ∂L/∂z_i⟩ by "
            f"{relative[worst]:.1e} of its size: the recomputed attention is not the model's.",
            f"Allowed at {model.precision}: {TOLERANCE[model.precision]:.0e}. Try --precision float32; if it stays, "
            "this family does something in its attention that the toolkit does not know.",
        )
    return Flow(
        sums=Sums(s_wp.cpu(), s_pq.cpu(), s_ww.cpu()),
        rest=rest.cpu(),
        into=into[..., :length].cpu(),
        total=total.cpu(),
        probabilities=_probabilities(read, batch.whole).float().cpu(),
        loss=loss.float().cpu(),
        identity_error=relative,
        maps={layer: m[:, :length, :length].float().cpu() for layer, m in zip(whole, full, strict=True)},
    )


def _step(model: LanguageModel, maps: tuple[int, ...], whole: bool, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Forward and backward pass of a batch, without waiting for the GPU anywhere.

    Returns:
        The three sums, the flow that S_pq leaves out, that into the target, that of all pairs, the certificate's numbers by
        layer, what the loss is made of, and the wanted maps.

    Raises:
        CertificateError: a layer that no gradient reached.
    """
    ids, labels, target, tokens, columns, where, weights, others = inputs
    tap = FlowTap(frozenset(model.layers), torch.cat([labels, target[:, None]], dim=1), frozenset(maps))
    with torch.enable_grad(), seam(model.modules, taps=[tap]), model.arithmetic():
        logits = model.logits(ids, columns)
        chosen = logits[torch.arange(len(ids), device=logits.device), where.to(logits.device)]
        read = _read(chosen, tokens, whole)
        _loss(read, weights, whole).sum().backward()
    layers = model.layers
    if lost := [layer for layer in layers if layer not in tap.total]:
        raise CertificateError(f"No gradient reached the attention of layers {lost}.", code="no-gradient")
    # MPS has no float64.
    home = torch.device("cpu") if model.device.type == "mps" else model.device

    def together(by_layer: dict[int, Tensor], dim: int) -> Tensor:
        return torch.stack([by_layer[layer].to(home) for layer in layers], dim)

    rows, total = together(tap.rows, 1).double(), together(tap.total, 1).double()
    labels, target = labels.to(home), target.to(home)
    sums = flow_sums(rows[:, :, :-1], rows[:, :, -1], total, labels, target)
    rest = left_out(rows[:, :, -1], others.to(home), labels)
    errors = together({layer: torch.stack(tap.error[layer]) for layer in layers}, 0)
    full = (tap.full[layer] for layer in maps)
    return sums.s_wp, sums.s_pq, sums.s_ww, rest, rows[:, :, -1], total, errors, read.detach(), *full


def _width(model: LanguageModel, rows: int, length: int) -> int:
    """The length to which a batch is padded: on CUDA, that of the next of few shapes, so that what was recorded for one is
    replayed for others. Where a family encodes positions by length, as it is."""
    wide = -(-length // BUCKET) * BUCKET
    fits = model.context is None or wide <= model.context
    small = triton_runs(model.device) and rows * wide <= TOKENS
    return wide if small and fits and not model.changes else length


def _joined(found: Sequence[Flow], parts: Sequence[Sequence[int]]) -> Flow:
    """Flows of some prompts each, as one of all of them in their order."""
    order = torch.tensor([i for part in parts for i in part]).argsort()

    def put(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(tensors))[order]

    def padded(maps: Tensor) -> Tensor:
        missing = width - maps.shape[-1]
        return F.pad(maps, (0, missing, 0, missing))

    width = max(one.into.shape[-1] for one in found)
    return Flow(
        sums=Sums(*(put([getattr(one.sums, name) for one in found]) for name in ("s_wp", "s_pq", "s_ww"))),
        rest=put([one.rest for one in found]),
        into=put([F.pad(one.into, (0, width - one.into.shape[-1])) for one in found]),
        total=put([one.total for one in found]),
        probabilities=put([one.probabilities for one in found]),
        loss=put([one.loss for one in found]),
        identity_error=torch.stack([one.identity_error for one in found]).amax(0),
        maps={layer: put([padded(one.maps[layer]) for one in found]) for layer in found[0].maps},
    )


def literal_flow(model: LanguageModel, prompt: Prompt) -> Float[Tensor, "layers query key"]:
    """I_l of one prompt by the definition, for comparison: every attention matrix is formed and kept.

    Let a matrix W_l of ones multiply the pattern of every head. Then ∂L/∂W_l = Σ_h A_{h,l} ⊙ ∂L/∂A_{h,l}.
    """
    batch = collate([prompt], model.device)
    length = batch.ids.shape[1]
    ones = [torch.ones(length, length, device=model.device, requires_grad=True) for _ in model.layers]
    edits = [
        Edit(frozenset([layer]), weight=lambda _, w=weight: w, name=f"W_{layer}", neutral=True)
        for layer, weight in zip(model.layers, ones, strict=True)
    ]
    with torch.enable_grad(), seam(model.modules, edits=edits):
        loss, _ = target_loss(model.logits_at(batch.ids, batch.target), batch)
        gradients = torch.autograd.grad(loss.sum(), ones)
    return torch.stack([g.abs().fill_diagonal_(0) for g in gradients]).cpu()


__getattr__ = forwarding(__name__)
