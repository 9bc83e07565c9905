"""Certify that the analyses are exact on a model, before anybody believes a number."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from anchors.attention.edits import isolate
from anchors.attention.seam import own_attention, seam
from anchors.errors import AnchorsError
from anchors.flow.saliency import TOLERANCE, collate, flow, literal_flow
from anchors.models import LanguageModel
from anchors.tasks.prompts import Prompt, label_tokens
from anchors.tasks.task import Task


@dataclass(frozen=True)
class Finding:
    """One thing that was checked.

    Attributes:
        name: what.
        ok: whether it holds.
        detail: the number it rests on, or what went wrong.
    """

    name: str
    ok: bool
    detail: str


def check(
    model: LanguageModel, prompts: list[Prompt], tasks: Iterable[Task], *, quick: bool = False
) -> list[Finding]:
    """Certify the seam and the saliency on a model.

    Args:
        model: on the seam (every layer arrived there once, or `load` would have refused it).
        prompts: a few prompts of different lengths, with their right answers.
        tasks: whose label words must be tokens of their own.
        quick: only what a run needs each time: edits fire in every layer, and the identity on one prompt.

    Raises:
        AnchorsError: in the quick form, what the full form reports as a finding.
    """
    tolerance = TOLERANCE[model.precision]
    findings = [Finding("attention passes the seam", True, f"{model.n_layers} layers, each once")]

    def certify(name: str, measure: Callable[[], tuple[bool, str]]) -> None:
        try:
            ok, detail = measure()
        except AnchorsError as error:
            if quick:
                raise
            ok, detail = False, str(error)
        findings.append(Finding(name, ok, detail))

    certify("Σ_j A_ij ∂L/∂A_ij = ⟨z_i, ∂L/∂z_i⟩", lambda: _identity(model, prompts[:1] if quick else prompts))
    certify("edits fire in every layer", lambda: _edits_fire(model, prompts[0]))
    if quick:
        return findings
    certify("same logits as the model's own attention", lambda: _same_logits(model, prompts, tolerance))
    certify("saliency equals its definition", lambda: _literal(model, prompts[0], tolerance))
    certify("batched equals one by one", lambda: _batched(model, prompts, tolerance))
    for task in tasks:
        certify(f"label words of {task.name}", lambda task=task: _labels(model, task))
    return findings


def _relative(one: Tensor, other: Tensor) -> float:
    one, other = one.double(), other.double()
    return float((one - other).norm() / other.norm().clamp(min=1e-300))


def _logits(model: LanguageModel, prompts: list[Prompt]) -> Tensor:
    batch = collate(prompts, model.device)
    with torch.no_grad():
        return model.logits_at(batch.ids, batch.target)


def _same_logits(model: LanguageModel, prompts: list[Prompt], tolerance: float) -> tuple[bool, str]:
    through_seam = _logits(model, prompts)
    with own_attention(model.model):
        own = torch.cat([_logits(model, [prompt]) for prompt in prompts])
    error = _relative(through_seam, own)
    return error <= tolerance, f"relative difference {error:.1e}"


def arithmetic_error(model: LanguageModel, prompt: Prompt) -> float:
    """How far the label words' logits are from those of the model's own attention: what rounding does, in nats.

    Two losses of a prompt that differ by no more than twice as much may be the same.
    """
    batch = collate([prompt], model.device)
    ours = _logits(model, [prompt])
    with own_attention(model.model):
        own = _logits(model, [prompt])
    labels = batch.label_ids.to(ours.device)
    return float((ours.gather(1, labels).double() - own.gather(1, labels).double()).abs().max())


def _identity(model: LanguageModel, prompts: list[Prompt]) -> tuple[bool, str]:
    return True, f"worst layer {float(flow(model, prompts).identity_error.max()):.1e}"


def _literal(model: LanguageModel, prompt: Prompt, tolerance: float) -> tuple[bool, str]:
    layers = range(model.n_layers)
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
    count = model.n_layers
    length = min(len(prompt.ids), 32)
    ids = torch.tensor(prompt.ids[:length], device=model.device).expand(count, -1)
    last = torch.full((count,), length - 1, device=model.device)
    edits = []
    for layer in range(count):
        alone = torch.full((count, 1), -1, device=model.device)
        alone[layer] = length - 1
        edits.append(isolate([layer], alone, name=f"check in layer {layer}"))
    with torch.no_grad():
        before = model.logits_at(ids, last)
        with seam(model.modules, edits=edits):
            edited = model.logits_at(ids, last)
        after = model.logits_at(ids, last)
    dead = (edited == before).all(-1).nonzero().flatten().tolist()
    if dead:
        return False, f"no effect in layers {dead}"
    if not torch.equal(before, after):
        return False, "the logits did not come back after the edits"
    return True, f"{count} layers, logits restored"


def _labels(model: LanguageModel, task: Task) -> tuple[bool, str]:
    words = label_tokens(task, model.tokenizer)
    shown = [" ".join(repr(model.tokenizer.decode([t])) for t in word) for word in words]
    return True, ", ".join(shown)
