"""Which label words (or other tokens) the target does not see, and so cannot read, whatever the model would like to."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from anchors.attention.form import Call, boolean
from anchors.attention.seam import seam
from anchors.model.language import LanguageModel
from anchors.model.lengths import HIDING
from anchors.tasks.prompts import Prompt

MOST = 16
"""Prompts that are run to look for hidden label words."""


@dataclass
class Unseen:
    """A probe that keeps which keys a query does not see in any head: [positions], by layer.

    Attributes:
        layers: where it looks.
        row: the query, as a row of the call.
        positions: the keys.
    """

    layers: frozenset[int]
    row: int
    positions: tuple[int, ...]

    def __post_init__(self) -> None:
        self.found: dict[int, Bool[Tensor, " positions"]] = {}

    def see(self, call: Call) -> None:
        row = torch.tensor([self.row], device=call.q.device)
        visible = call.visible(row, slice(0, call.k.shape[2]))
        if visible is None:
            self.found[call.layer] = torch.zeros(len(self.positions), dtype=torch.bool)
            return
        self.found[call.layer] = (
            ~boolean(visible).reshape(-1, call.k.shape[2])[:, list(self.positions)].any(0).cpu()
        )


@torch.no_grad()
def hidden_labels(model: LanguageModel, prompts: Iterable[Prompt]) -> str | None:
    """A warning when label words are hidden from the target, whose flow is then exactly zero there; of prompts without label words
    when tokens are.

    Sliding windows, attention chunks and sparse indices hide them. The masks are those that the layers get when the
    prompts are run, so that nothing is concluded from the configuration but that there is something to look for.
    """
    hiding = [change for change in model.changes if change.what in HIDING]
    longer = [p for p in prompts if any(len(p.ids) > change.length for change in hiding)]
    hidden, total, layers = 0, 0, set()
    for prompt in longer[:MOST]:
        places = prompt.label_positions or tuple(range(prompt.target))
        probe = Unseen(frozenset(model.layers), prompt.target, places)
        with seam(model.modules, probes=[probe]):
            ids = torch.tensor([prompt.ids], device=model.device)
            model.logits_at(ids, torch.tensor([prompt.target], device=model.device))
        hidden += int(torch.stack(list(probe.found.values())).any(0).sum())
        total += len(places)
        layers |= {layer for layer, unseen in probe.found.items() if unseen.any()}
    if not hidden:
        return None
    words = "label words" if any(prompt.label_positions for prompt in longer) else "tokens"
    most = max(len(p.ids) for p in longer[:MOST])
    why = ", ".join(f"{c.what}: {c.length} tokens" for c in hiding if most > c.length)
    where = (
        f"of the first {MOST} prompts that are longer" if len(longer) > MOST else "of prompts that are longer"
    )
    return (
        f"{hidden} of {total} {words} {where} are not seen by the target in {len(layers)} of {len(model.layers)} "
        f"layers ({why}); their flow to the target is zero there by construction."
    )
