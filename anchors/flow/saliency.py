"""Information flow between words (2.1): I_l = |Σ_h A_{h,l} ⊙ ∂L/∂A_{h,l}|, and its three sums.

Source: Wang et al., "Label Words are Anchors" (EMNLP 2023), section 2.1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from anchors.attention.edits import Edit
from anchors.attention.form import Call
from anchors.attention.seam import seam
from anchors.attention.taps import Slopes
from anchors.errors import AnchorsError, CertificateError, RoutingError
from anchors.flow.metrics import Sums, flow_sums, left_out
from anchors.model.language import LanguageModel
from anchors.model.lengths import groups
from anchors.tasks.prompts import Prompt

TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "tf32": 2e-2, "bfloat16": 5e-2, "float16": 2e-2}
"""How far Σ_j A_ij ∂L/∂A_ij may be from ⟨z_i, ∂L/∂z_i⟩, relative to the layer's largest value."""


@dataclass(frozen=True)
class Batch:
    """Prompts padded on the right to one length.

    Attributes:
        ids: token ids; padding repeats the row's last token and is seen by no real one.
        target: q of each row.
        labels: label-word positions, ascending; -1 where a row has fewer.
        label_ids: per class, the token that stands for it.
        gold: class of the query.
    """

    ids: Int[Tensor, "batch tokens"]
    target: Int[Tensor, " batch"]
    labels: Int[Tensor, "batch labels"]
    label_ids: Int[Tensor, "batch classes"]
    gold: Int[Tensor, " batch"]


def collate(prompts: Sequence[Prompt], device: torch.device | str = "cpu") -> Batch:
    """Pad prompts on the right. Needs the right answer of each, for the loss."""
    nameless = [i for i, prompt in enumerate(prompts) if prompt.gold is None]
    if nameless:
        raise AnchorsError(
            f"Prompts {nameless} have no right answer, so they have no loss.",
            "Give each a label.",
            code="prompt",
        )
    length = max(len(prompt.ids) for prompt in prompts)
    count = max(len(prompt.label_positions) for prompt in prompts)

    def padded(row: Sequence[int], size: int, fill: int) -> list[int]:
        return [*row, *[fill] * (size - len(row))]

    return Batch(
        ids=torch.tensor([padded(p.ids, length, p.ids[-1]) for p in prompts], device=device),
        target=torch.tensor([p.target for p in prompts], device=device),
        labels=torch.tensor([padded(p.label_positions, count, -1) for p in prompts], device=device),
        label_ids=torch.tensor([p.label_ids for p in prompts], device=device),
        gold=torch.tensor([p.gold for p in prompts], device=device),
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

    def begin(self, call: Call, z: Tensor, dz: Tensor) -> None:
        batch, keys, layer = z.shape[0], call.k.shape[2], call.layer
        if keys != z.shape[2]:
            raise RoutingError(
                f"Layer {layer} attends to {keys} keys in a prompt of {z.shape[2]} tokens: they are not its tokens.",
                "Models that attend to compressed keys cannot be analysed: there is no flow between words to read.",
            )
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


@dataclass(frozen=True)
class Flow:
    """The information flow of a batch of prompts.

    Attributes:
        sums: S_wp, S_pq and S_ww per example and layer.
        rest: flow from the label words' other tokens to the target per example and layer, see
            `anchors.flow.metrics.left_out`.
        probabilities: softmax over the label words' logits at the target.
        loss: cross-entropy over the label words' logits against the right answer, in nats.
        identity_error: per layer, the certificate's relative error (see `FlowTap.error`).
        maps: by requested layer, I_l: row = the position that receives, column = the one that gives.
    """

    sums: Sums
    rest: Float[Tensor, "batch layers"]
    probabilities: Float[Tensor, "batch classes"]
    loss: Float[Tensor, " batch"]
    identity_error: Float[Tensor, " layers"]
    maps: dict[int, Float[Tensor, "batch query key"]]


def label_loss(
    logits: Float[Tensor, "batch vocabulary"], batch: Batch
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch classes"]]:
    """L(x): cross-entropy over the label words' logits only, and the label probabilities.

    Raises:
        AnchorsError: a loss that is not a number.
    """
    over_labels = logits.gather(1, batch.label_ids.to(logits.device))
    over_labels = over_labels.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(over_labels, batch.gold.to(logits.device), reduction="none")
    if not torch.isfinite(loss).all():
        bad = (~torch.isfinite(loss)).nonzero().flatten().tolist()
        raise AnchorsError(
            f"The loss of example(s) {bad} of the batch is not a number: the model's logits overflow.",
            "Use --precision float32 or bfloat16 (float16 overflows easily), and check the model's weights.",
            code="not-finite",
        )
    return loss, over_labels.detach().softmax(-1)


def flow(model: LanguageModel, prompts: Sequence[Prompt], *, maps: Sequence[int] = ()) -> Flow:
    """The information flow of some prompts, exactly and without keeping any attention matrix.

        I_l = |Σ_h A_{h,l} ⊙ ∂L/∂A_{h,l}| = |Σ_h A_{h,l} ⊙ (∂L/∂Z_{h,l} V_{h,l}ᵀ)|

    Each tile of rows of the right-hand side is a by-product of the gradient of attention itself. Its literal twin
    is `literal_flow`.

    Args:
        model: on the seam.
        prompts: with their right answers; run as one batch, or as several where the family encodes positions by the
            length of the longest row (longrope, dynamic NTK).
        maps: layers whose whole T × T map is wanted.

    Raises:
        AnchorsError: a loss that is not a number; a layer the model does not have.
        CertificateError: the saliency does not satisfy Σ_j A_ij ∂L/∂A_ij = ⟨z_i, ∂L/∂z_i⟩.

    Example:
        >>> result = flow(model, prompts, maps=[0, 20])
        >>> result.sums.s_wp.shape                     # examples × layers
    """
    unknown = [layer for layer in maps if not 0 <= layer < model.n_layers]
    if unknown:
        raise AnchorsError(
            f"The model has no layers {unknown}.", f"It has layers 0 to {model.n_layers - 1}.", code="layers"
        )
    parts = groups(model.changes, [len(prompt.ids) for prompt in prompts])
    if len(parts) > 1:
        return _joined([flow(model, [prompts[i] for i in part], maps=maps) for part in parts], parts)
    batch = collate(prompts, model.device)
    wanted = torch.cat([batch.labels, batch.target[:, None]], dim=1)
    tap = FlowTap(frozenset(range(model.n_layers)), wanted, frozenset(maps))
    with torch.enable_grad(), seam(model.modules, taps=[tap]), model.arithmetic():
        loss, probabilities = label_loss(model.logits_at(batch.ids, batch.target), batch)
        loss.sum().backward()
    layers = range(model.n_layers)
    lost = [layer for layer in layers if layer not in tap.total]
    if lost:
        raise CertificateError(f"No gradient reached the attention of layers {lost}.", code="no-gradient")
    # Gathered before it is moved: one transfer instead of one per layer. MPS has no float64.
    home = torch.device("cpu") if model.device.type == "mps" else model.device
    rows = torch.stack([tap.rows[layer].to(home) for layer in layers], dim=1).double()
    total = torch.stack([tap.total[layer].to(home) for layer in layers], dim=1).double()
    sums = flow_sums(rows[:, :, :-1], rows[:, :, -1], total, batch.labels.to(home), batch.target.to(home))
    others = uncounted(prompts, rows.shape[-1]).to(home)
    rest = left_out(rows[:, :, -1], others, batch.labels.to(home))
    errors = torch.stack([torch.stack(tap.error[layer]).to(home) for layer in layers]).double().cpu()
    relative = errors[:, 0] / errors[:, 1].clamp(min=torch.finfo(torch.float64).tiny)
    if not (relative <= TOLERANCE[model.precision]).all():
        worst = int(relative.nan_to_num(torch.inf).argmax())
        raise CertificateError(
            f"In layer {worst} of {model.name} Σ_j A_ij ∂L/∂A_ij differs from ⟨z_i, ∂L/∂z_i⟩ by "
            f"{relative[worst]:.1e} of its size: the recomputed attention is not the model's.",
            f"Allowed at {model.precision}: {TOLERANCE[model.precision]:.0e}. Try --precision float32; if it stays, "
            "this family does something in its attention that the toolkit does not know.",
        )
    return Flow(
        sums=Sums(sums.s_wp.cpu(), sums.s_pq.cpu(), sums.s_ww.cpu()),
        rest=rest.cpu(),
        probabilities=probabilities.float().cpu(),
        loss=loss.detach().float().cpu(),
        identity_error=relative,
        maps={layer: tap.full[layer].float().cpu() for layer in maps},
    )


def _joined(found: Sequence[Flow], parts: Sequence[Sequence[int]]) -> Flow:
    """Flows of some prompts each, as one of all of them in their order."""
    order = torch.tensor([i for part in parts for i in part]).argsort()

    def put(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(tensors))[order]

    def padded(maps: Tensor) -> Tensor:
        missing = width - maps.shape[-1]
        return F.pad(maps, (0, missing, 0, missing))

    width = max((m.shape[-1] for one in found for m in one.maps.values()), default=0)
    return Flow(
        sums=Sums(*(put([getattr(one.sums, name) for one in found]) for name in ("s_wp", "s_pq", "s_ww"))),
        rest=put([one.rest for one in found]),
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
    ones = [
        torch.ones(length, length, device=model.device, requires_grad=True) for _ in range(model.n_layers)
    ]
    edits = [
        Edit(frozenset([layer]), weight=lambda _, w=weight: w, name=f"W_{layer}", neutral=True)
        for layer, weight in enumerate(ones)
    ]
    with torch.enable_grad(), seam(model.modules, edits=edits):
        loss, _ = label_loss(model.logits_at(batch.ids, batch.target), batch)
        gradients = torch.autograd.grad(loss.sum(), ones)
    return torch.stack([g.abs().fill_diagonal_(0) for g in gradients]).cpu()
