"""Information flow in prompts with images: I_l = |Σ_h A_{h,l} ⊙ ∂L/∂A_{h,l}|, summed by where it comes from and goes to.

Image tokens are a role of their own. With demonstrations, label words p_k and the target q (the last token before the
answer), each sum is a mean over the pairs (receiver, giver) of its class, raw, as in `anchors.flow.metrics`:

    S_ip   label words      ← image tokens before them          S_iq   target ← image tokens of the query
    S_tp   label words      ← other tokens before them          S_tq   target ← other tokens of the query
    S_wp   label words      ← both: the paper's S_wp            S_ww   everything else
    S_pq   target           ← label words: the paper's S_pq

An image has many tokens, so that a mean over them says little of what they give together; the masses M_x are the same
sums undivided. Source of I_l, S_wp, S_pq and S_ww: Wang et al., "Label Words are Anchors" (EMNLP 2023), section 2.1; the
division by images is this toolkit's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

from anchors.attention.seam import seam
from anchors.attention.taps import Tap
from anchors.context import keeping
from anchors.errors import AnchorsError, CertificateError
from anchors.flow.saliency import TOLERANCE, FlowTap
from anchors.injection.asking.vlm import VisionLanguageModel
from anchors.injection.image_flow.rows import INTO_LABELS as INTO_LABELS
from anchors.injection.image_flow.rows import INTO_TARGET as INTO_TARGET
from anchors.injection.image_flow.rows import MASSES, SUMS
from anchors.model.witness import TOLERANCE as ALLOWED
from anchors.model.witness import Witness, apart


@dataclass(frozen=True)
class ImagePrompt:
    """Demonstrations with images and a query with one.

    Attributes:
        text: all of it; `<image>` stands for each image.
        images: in their order.
        labels: ranges of characters of the demonstrations' label words.
        query: the first character of the query.
        answer: range of characters of the query's label word, which ends the text; None where the text ends before the
            answer, which then nobody knows.
        number: of the query in its scenario.
    """

    text: str
    images: tuple[Image.Image, ...]
    labels: tuple[tuple[int, int], ...]
    query: int
    answer: tuple[int, int] | None
    number: int = 0


@dataclass(frozen=True)
class ImageBatch:
    """Encoded prompts and the role of every token.

    Attributes:
        tensors: what the model takes, without a mask: the padding, on the right, is seen by no real token.
        labels: positions of the label words, ascending; their first tokens.
        target: q.
        answer: the token to come after q; -1 where nobody knows.
        image: image tokens.
        query: tokens of the query up to q.
        backward: pairs of tokens of which the earlier one sees the later one (images, in some families).
    """

    tensors: dict[str, Tensor]
    labels: Int[Tensor, "batch labels"]
    target: Int[Tensor, " batch"]
    answer: Int[Tensor, " batch"]
    image: Bool[Tensor, "batch tokens"]
    query: Bool[Tensor, "batch tokens"]
    backward: Int[Tensor, " batch"]


@dataclass(frozen=True)
class ImageFlow:
    """The information flow of some prompts with images.

    Attributes:
        sums: by name in `SUMS` and `MASSES`; without demonstrations only those into the target, S_ww and the total.
        loss: L = −log p of the answer's token at the target, over the whole vocabulary, in nats.
        surprise: 1 − p. Divided by it, the sums are those of the log-odds log p / (1 − p): a model that is sure has no
            gradient of L left, so that the sums themselves mostly say how wrong it is.
        predicted: the most likely token there.
        answer: the token that the loss is about.
        identity_error: per layer, the certificate's relative error (see `anchors.flow.saliency.FlowTap.error`).
    """

    sums: dict[str, Float[Tensor, "batch layers"]]
    loss: Float[Tensor, " batch"]
    surprise: Float[Tensor, " batch"]
    predicted: Int[Tensor, " batch"]
    answer: Int[Tensor, " batch"]
    identity_error: Float[Tensor, " layers"]


def collate(vlm: VisionLanguageModel, prompts: Sequence[ImagePrompt]) -> ImageBatch:
    """Encode prompts and find their roles.

    Raises:
        AnchorsError: prompts with different numbers of demonstrations; an answer that some prompts have and others have
            not; images that do not fit the places for them; different label words with the same first token; label
            words that share a token; a prompt too long.
    """
    known = {prompt.answer is not None for prompt in prompts}
    counts = {len(prompt.labels) for prompt in prompts}
    if len(known) > 1 or len(counts) > 1:
        raise AnchorsError(
            "Prompts of one batch need as many demonstrations, and all an answer or none.", code="prompt"
        )
    marks = [[*p.labels, (p.query, len(p.text)), *([] if p.answer is None else [p.answer])] for p in prompts]
    inputs = vlm.encode([p.text for p in prompts], [p.images for p in prompts], marks=marks)
    shots = counts.pop()
    labels, target, answer, first = [], [], [], []
    for row, (prompt, found) in enumerate(zip(prompts, inputs.marked, strict=True)):
        ends = found[shots + 1][0] if known == {True} else int(inputs.prompts[row])
        places = [tokens[0] for tokens in found[:shots]]
        asked = [*places, ends] if known == {True} else places
        spans = [*prompt.labels, prompt.answer] if known == {True} else list(prompt.labels)
        words = [prompt.text[slice(*span)].strip() for span in spans if span is not None]
        _refuse_sharing(row, words, inputs.ids[row, asked].tolist(), asked)
        labels.append(places)
        target.append(ends - 1)
        answer.append(int(inputs.ids[row, ends]) if known == {True} else -1)
        first.append(found[shots][0])
    device = vlm.device
    at = torch.arange(inputs.ids.shape[1], device=device)
    image = inputs.ids == vlm.image_token_id
    if not image.any(1).all():
        raise AnchorsError("A prompt has no image tokens.", "Flow from images needs images.", code="prompt")
    targets, begins = torch.tensor(target, device=device), torch.tensor(first, device=device)
    return ImageBatch(
        tensors={name: x for name, x in inputs.tensors.items() if name != "attention_mask"},
        labels=torch.tensor(labels, device=device, dtype=torch.long).view(len(prompts), shots),
        target=targets,
        answer=torch.tensor(answer, device=device),
        image=image,
        query=(at >= begins[:, None]) & (at <= targets[:, None]),
        backward=_backward(inputs.tensors),
    )


def _refuse_sharing(row: int, words: Sequence[str], tokens: Sequence[int], places: Sequence[int]) -> None:
    if len(set(places)) < len(places):
        raise AnchorsError(
            f"Two label words of prompt {row} share a token.",
            "Put something between them.",
            code="label-words",
        )
    by_token: dict[int, str] = {}
    for word, token in zip(words, tokens, strict=True):
        other = by_token.setdefault(token, word)
        if other != word:
            raise AnchorsError(
                f"The label words {other!r} and {word!r} of prompt {row} begin with the same token.",
                "What flows to the one could not be told from what flows to the other: draw other demonstrations.",
                code="label-words",
            )


def _backward(tensors: dict[str, Tensor]) -> Int[Tensor, " batch"]:
    """Pairs within an image whose earlier token sees the later one: n (n − 1) / 2 for each image of n tokens.

    Only families that say with `token_type_ids` which tokens are images let them see each other (Gemma 3).
    """
    ids = tensors["input_ids"]
    kinds = tensors.get("token_type_ids")
    if kinds is None:
        return torch.zeros(len(ids), dtype=torch.long, device=ids.device)
    one = kinds == 1
    begins = one & ~F.pad(one, (1, 0))[:, :-1]
    number = begins.cumsum(1) * one
    sizes = F.one_hot(number, int(number.max()) + 1).sum(1)[:, 1:]
    return (sizes * (sizes - 1) // 2).sum(1)


def role_sums(
    batch: ImageBatch,
    label_rows: Float[Tensor, "batch layers labels key"],
    target_row: Float[Tensor, "batch layers key"],
    total: Float[Tensor, "batch layers"],
) -> dict[str, Float[Tensor, "batch layers"]]:
    """The sums from a few rows of I_l and its total.

    Args:
        batch: roles.
        label_rows: I_l[p_k, ·].
        target_row: I_l[q, ·].
        total: Σ_{j≠i} I_l[i, j] over the rows up to q.
    """
    at = torch.arange(batch.image.shape[1], device=target_row.device)
    before = at < batch.target[:, None]
    is_label = (at == batch.labels[..., None]).any(1)
    earlier = at < batch.labels[..., None]
    image, query = batch.image, batch.query
    into_label = {"ip": earlier & image[:, None], "tp": earlier & ~image[:, None]}
    into_target = {
        "pq": is_label, "iq": query & image, "tq": query & before & ~image, "dq": before & ~query & image,
        "eq": before & ~query & ~image & ~is_label,
    }  # fmt: skip
    mass = {
        name: torch.einsum("blkt,bkt->bl", label_rows, x.to(label_rows)) for name, x in into_label.items()
    }
    count = {name: x.sum((1, 2)) for name, x in into_label.items()}
    mass |= {
        name: torch.einsum("blt,bt->bl", target_row, x.to(target_row)) for name, x in into_target.items()
    }
    count |= {name: x.sum(1) for name, x in into_target.items()}
    mass["wp"], count["wp"] = mass["ip"] + mass["tp"], count["ip"] + count["tp"]
    classes = ("wp", "pq", "iq", "tq")
    pairs = batch.target * (batch.target + 1) // 2 + batch.backward
    mass["ww"] = total - sum(mass[name] for name in classes)
    count["ww"] = pairs - sum(count[name] for name in classes)
    mass["all"] = total
    shown = [name for name in (*SUMS, *MASSES) if batch.labels.shape[1] or name[2:] not in NEED_LABELS]
    return {
        name: mass[name[2:]] / (count[name[2:]][:, None].clamp(min=1) if name.startswith("s_") else 1)
        for name in shown
    }


NEED_LABELS = ("ip", "tp", "wp", "pq", "dq", "eq")
"""What prompts without demonstrations have nothing of."""


def demand(vlm: VisionLanguageModel, prompts: Sequence[ImagePrompt]) -> None:
    """Hold prompts in one batch, as `image_flow` runs them, against the model as it came, asked for each alone.

    Raises:
        CertificateError: the logits at the targets differ.
        AnchorsError: see `image_flow`.
    """
    batch = collate(vlm, prompts)
    witness = _ready(vlm, batch)
    with torch.no_grad(), vlm.arithmetic():
        ours = at_targets(vlm, batch)
    own = [witness.answer(**vlm.encode([prompt.text], [prompt.images]).tensors)[0] for prompt in prompts]
    theirs = torch.stack([logits[q] for logits, q in zip(own, batch.target.tolist(), strict=True)])
    if not (error := apart(ours, theirs)) <= ALLOWED[vlm.precision]:
        lengths = ", ".join(str(q + 1) for q in batch.target.tolist())
        raise CertificateError(
            f"{vlm.name} failed: on prompts of {lengths} tokens its logits on the seam differ from its own by {error:.1e} of "
            "their size.",
            f"Allowed at {vlm.precision}: {ALLOWED[vlm.precision]:.0e}. Try --precision float32.",
            code="not-itself",
        )


def _ready(vlm: VisionLanguageModel, batch: ImageBatch) -> Witness:
    """The witness of a model that can be asked for the flow of a batch."""
    if not vlm.modules or vlm.witness is None:
        raise AnchorsError(
            f"{vlm.name!r} is not on the seam.",
            "Load it with load_vlm(..., routed=True).",
            code="off-the-seam",
        )
    vlm.demand_one_side([int(batch.target.min()) + 1, batch.tensors["input_ids"].shape[1]])
    return vlm.witness


def at_targets(vlm: VisionLanguageModel, batch: ImageBatch) -> Float[Tensor, "batch vocabulary"]:
    """The logits of the token to come after each prompt's target."""
    keep = keeping(vlm.model, batch.target[:, None])
    logits = vlm.model(**batch.tensors, **keep, use_cache=False).logits
    rows = torch.arange(len(logits), device=logits.device)
    if logits.dim() == 4:  # transformers 5.20 gives every row the columns that any row asked for
        logits = logits[rows, rows]
    elif logits.shape[1] != 1:  # all columns: this family's forward does not let one ask for some
        logits = logits[rows, batch.target.to(logits.device), None]
    return logits[:, 0]


def image_flow(vlm: VisionLanguageModel, batch: ImageBatch, taps: Sequence[Tap] = ()) -> ImageFlow:
    """The information flow of encoded prompts, exactly and without keeping any attention matrix.

    Where the answer is not known, the loss is about the token that the model finds most likely.

    Args:
        vlm: with its language tower on the seam.
        batch: of `collate`.
        taps: what else listens. They hear of the gradient of −log (p / (1 − p)): times `ImageFlow.surprise` it is that of L.

    Raises:
        AnchorsError: a tower that is not on the seam; a loss that is not a number; prompts of lengths between which the
            tower encodes positions otherwise.
        CertificateError: the saliency does not satisfy Σ_j A_ij ∂L/∂A_ij = ⟨z_i, ∂L/∂z_i⟩.

    Example:
        >>> found = image_flow(vlm, collate(vlm, prompts))
        >>> found.sums["s_ip"].shape                       # prompts × layers
    """
    _ready(vlm, batch)
    layers = vlm.layers
    tap = FlowTap(frozenset(layers), torch.cat([batch.labels, batch.target[:, None]], dim=1))
    with torch.enable_grad(), seam(vlm.modules, taps=[tap, *taps]), vlm.arithmetic():
        logits = at_targets(vlm, batch)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        predicted = logits.detach().argmax(-1)
        answer = torch.where(batch.answer < 0, predicted, batch.answer)
        loss = F.cross_entropy(logits.detach(), answer, reduction="none")
        if not torch.isfinite(loss).all():
            raise AnchorsError(
                f"The loss of {vlm.name!r} is not a number: the model's logits overflow.",
                "Use --precision float32, and check the weights: is the strength far too large?",
                code="not-finite",
            )
        # ∂L = (1 − p) ∂(−log-odds), and only the right-hand side keeps its digits where p is close to 1.
        chosen = logits.gather(1, answer[:, None])[:, 0]
        odds = logits.scatter(1, answer[:, None], -torch.inf).logsumexp(1) - chosen
        odds.sum().backward()
    lost = [layer for layer in layers if layer not in tap.total]
    if lost:
        raise CertificateError(f"No gradient reached the attention of layers {lost}.", code="no-gradient")
    rows = torch.stack([tap.rows[layer] for layer in layers], dim=1).double()
    total = torch.stack([tap.total[layer] for layer in layers], dim=1).double()
    surprise = odds.detach().double().sigmoid()
    sums = role_sums(batch, rows[:, :, :-1], rows[:, :, -1], total)
    sums = {name: x * surprise[:, None] for name, x in sums.items()}
    errors = torch.stack([torch.stack(tap.error[layer]) for layer in layers]).double().cpu()
    relative = errors[:, 0] / errors[:, 1].clamp(min=torch.finfo(torch.float64).tiny)
    if not (relative <= TOLERANCE[vlm.precision]).all():
        worst = int(relative.nan_to_num(torch.inf).argmax())
        raise CertificateError(
            f"In layer {layers[worst]} of {vlm.name} Σ_j A_ij ∂L/∂A_ij differs from ⟨z_i, ∂L/∂z_i⟩ by "
            f"{relative[worst]:.1e} of its size: the recomputed attention is not the model's.",
            f"Allowed at {vlm.precision}: {TOLERANCE[vlm.precision]:.0e}. Try --precision float32.",
        )
    return ImageFlow(
        {name: x.cpu() for name, x in sums.items()},
        loss.float().cpu(),
        surprise.cpu(),
        predicted.cpu(),
        answer.cpu(),
        relative,
    )
