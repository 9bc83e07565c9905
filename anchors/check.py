"""Certify that the analyses are exact on a model, before anybody believes a number."""

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from anchors._names import forwarding
from anchors.attention.edits import isolate
from anchors.attention.seam import seam
from anchors.certificate.agreement import Asked, Finding, agreement, ask, last_rows
from anchors.context import answer, encode, queries
from anchors.errors import AnchorsError, CertificateError
from anchors.flow.saliency import TOLERANCE, collate, flow, literal_flow
from anchors.model.language import LanguageModel
from anchors.model.witness import TOLERANCE as WITNESS_TOLERANCE
from anchors.model.witness import apart
from anchors.tasks.prompts import Prompt, label_tokens
from anchors.tasks.task import Task


def failed(findings: Iterable[Finding]) -> list[Finding]:
    """The findings that do not hold."""
    return [finding for finding in findings if finding.ok is False]


def check(
    model: LanguageModel,
    prompts: list[Prompt],
    tasks: Iterable[Task],
    *,
    quick: bool = False,
    asked: Asked | None = None,
) -> list[Finding]:
    """Certify the seam and the saliency on a model, against the model as it came (`anchors.model.witness`).

    Args:
        model: on the seam (every layer arrived there once, or `load` would have refused it).
        prompts: a few prompts of different lengths, with their right answers; in the quick form those of the run.
        tasks: whose label words must be tokens of their own.
        quick: only what a run needs each time: the witness on its prompts (`anchors.certificate.agreement`), edits fire in every
            layer, and the identity on one prompt.
        asked: what the witness said on the prompts, where that is known.

    Raises:
        AnchorsError: in the quick form, what the full form reports as a finding.
    """
    tolerance = TOLERANCE[model.precision]
    count = f"{model.n_layers} layers" + f", of which {len(model.layers)} attend" * (
        len(model.layers) < model.n_layers
    )
    findings = [Finding("attention passes the seam", True, f"{count}, each once")]

    def certify(name: str, measure: Callable[[], tuple[bool | None, str]]) -> None:
        try:
            ok, detail = measure()
        except AnchorsError as error:
            if quick:
                raise
            ok, detail = False, str(error)
        findings.append(Finding(name, ok, detail))

    findings += agreement(model, prompts, quick=quick, asked=asked)
    certify("Σ_j A_ij ∂L/∂A_ij = ⟨z_i, ∂L/∂z_i⟩", lambda: _identity(model, prompts[:1] if quick else prompts))
    certify("edits fire in every layer", lambda: _edits_fire(model, prompts[0]))
    shared = "demonstrations run once are the whole prompt"
    if quick:
        if model.beside_attention and model.carries:  # lengths tell on a state
            certify(shared, lambda: _shared(model, prompts[0]))
        return findings
    certify("saliency equals its definition", lambda: _literal(model, prompts[0], tolerance))
    certify("batched equals one by one", lambda: _batched(model, prompts, tolerance))
    certify(shared, lambda: _shared(model, prompts[0]))
    for task in tasks:
        certify(f"label words of {task.name}", lambda task=task: _labels(model, task))
    return findings


def demand(model: LanguageModel, prompts: list[Prompt]) -> float | None:
    """The quick form of `check` on the prompts of a run, before anything is measured.

    Returns:
        The arithmetic error of the shortest one, see `arithmetic_error`.

    Raises:
        CertificateError: it failed.
    """
    asked = ask(model, prompts)
    if wrong := failed(check(model, prompts, [], quick=True, asked=asked)):
        raise CertificateError(
            f"{model.name} failed: {wrong[0].name}: {wrong[0].detail}", "See `anchors check`."
        )
    shortest = min(prompts, key=lambda prompt: len(prompt.ids))
    return arithmetic_error(model, shortest, asked.few if shortest.ids == asked.short else None)


def _relative(one: Tensor, other: Tensor) -> float:
    one, other = one.double(), other.double()
    return float((one - other).norm() / other.norm().clamp(min=1e-300))


def _shared(model: LanguageModel, prompt: Prompt) -> tuple[bool | None, str]:
    """The answer on demonstrations that were run once, against the witness on the whole prompt."""
    if not prompt.query:
        return None, "the prompt has no demonstrations"
    try:
        context = encode(model, prompt.ids[: prompt.query])
        ours = answer(model, context, queries([prompt], prompt.query, model.device))[0]
    except AnchorsError as why:
        return None, f"refused: {why.message}"
    own = last_rows(model, prompt.ids)
    if isinstance(own, str):
        return None, f"not asked: {own}"
    error = apart(ours, own[-1])
    return error <= WITNESS_TOLERANCE[model.precision], f"relative difference {error:.1e}"


def arithmetic_error(
    model: LanguageModel, prompt: Prompt, own: Float[Tensor, "rows vocabulary"] | None = None
) -> float | None:
    """How far the logits of the label words, or of what the prompt aims at, are from the witness's: what rounding does, in nats; None where the prompt is too
    long for the witness.

    Two losses of a prompt that differ by no more than twice as much may be the same.

    Args:
        model: on the seam.
        prompt: asked.
        own: the witness's logits of its last tokens, where they are known.
    """
    said = last_rows(model, prompt.ids) if own is None else own
    if isinstance(said, str):
        return None
    batch = collate([prompt], model.device)
    with torch.no_grad():
        ours = model.logits_at(batch.ids, batch.target)[0]
    asked = list(prompt.aim.tokens if prompt.aim else prompt.label_ids)
    return float((ours[asked].double() - said[-1].to(ours.device)[asked].double()).abs().max())


def _identity(model: LanguageModel, prompts: list[Prompt]) -> tuple[bool, str]:
    return True, f"worst layer {float(flow(model, prompts).identity_error.max()):.1e}"


def _literal(model: LanguageModel, prompt: Prompt, tolerance: float) -> tuple[bool, str]:
    layers = model.layers
    maps = flow(model, [prompt], maps=layers).maps
    error = _relative(torch.stack([maps[layer][0] for layer in layers]), literal_flow(model, prompt))
    return error <= tolerance, f"relative difference {error:.1e} over all maps"


def _batched(model: LanguageModel, prompts: list[Prompt], tolerance: float) -> tuple[bool, str]:
    together, alone = flow(model, prompts).sums, [flow(model, [prompt]).sums for prompt in prompts]
    error = max(
        _relative(getattr(together, name), torch.cat([getattr(one, name) for one in alone]))
        for name in ("s_wp", "s_pq", "s_ww")
    )
    lengths = sorted(len(prompt.ids) for prompt in prompts)
    return error <= tolerance, f"relative difference {error:.1e}, lengths {lengths[0]} to {lengths[-1]}"


def _edits_fire(model: LanguageModel, prompt: Prompt) -> tuple[bool, str]:
    """Hide everything but itself from the last token, in row l of a batch only in layer l: its logits must change."""
    count = len(model.layers)
    length = min(len(prompt.ids), 8)
    ids = torch.tensor(prompt.ids[:length], device=model.device).expand(count, -1)
    last = torch.full((count,), length - 1, device=model.device)
    edits = []
    for row, layer in enumerate(model.layers):
        alone = torch.full((count, 1), -1, device=model.device)
        alone[row] = length - 1
        edits.append(isolate([layer], alone, name=f"check in layer {layer}"))
    with torch.no_grad():
        before = model.logits_at(ids, last)
        with seam(model.modules, edits=edits):
            edited = model.logits_at(ids, last)
        after = model.logits_at(ids, last)
    dead = [model.layers[row] for row in (edited == before).all(-1).nonzero().flatten().tolist()]
    if dead:
        return False, f"no effect in layers {dead}"
    if not torch.equal(before, after):
        return False, "the logits did not come back after the edits"
    return True, f"{count} layers, logits restored"


def _labels(model: LanguageModel, task: Task) -> tuple[bool, str]:
    words = label_tokens(task, model.tokenizer)
    shown = [" ".join(repr(model.tokenizer.decode([t])) for t in word) for word in words]
    return True, ", ".join(shown)


__getattr__ = forwarding(__name__)
