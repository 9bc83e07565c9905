"""Reading the prediction off the attention to the label words (2.3): do deep layers extract it there?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from anchors.attention.call import AttentionCall
from anchors.attention.seam import seam
from anchors.context import Context, answer, encode, queries, shared_demonstrations
from anchors.icl import joined, label_probabilities, outcomes
from anchors.models import LanguageModel
from anchors.runner import Cell, Record
from anchors.tasks.drawing import Drawn
from anchors.tasks.task import Task


@dataclass
class TargetAttention:
    """A probe that keeps Σ_h A_{h,l}(q, p) for the target q of each example and given positions p.

    Attributes:
        layers: where it looks.
        target: q of each example, as a row of the call's queries.
        positions: [batch, positions], columns of the call's keys.
        found: by layer, [batch, positions].
    """

    layers: frozenset[int]
    target: Int[Tensor, " batch"]
    positions: Int[Tensor, "batch positions"]

    def __post_init__(self) -> None:
        self.found: dict[int, Float[Tensor, "batch positions"]] = {}

    def see(self, call: AttentionCall) -> None:
        home = call.q.device
        row = call.pattern_at(self.target.to(home)[:, None])[:, :, 0].sum(1)
        self.found[call.layer] = row.gather(1, self.positions.to(home))


@dataclass(frozen=True)
class Readout:
    """The attention that the target pays to the label words of each class, in every layer.

        score of class i in layer l = Σ_h Σ_{k: class of p_k is i} A_{h,l}(q, p_k)

    `anchors.summaries.readout_summary` turns it into AUCROC_l, how well these scores tell the model's own prediction, and R_l, the
    share of it that the layers up to l contribute (section 2.3, Figure 5).
    """

    kind: ClassVar[str] = "readout"
    version: ClassVar[int] = 1
    fresh: ClassVar[bool] = False

    @property
    def passes(self) -> float:
        return 1.1

    def prepare(self, model: LanguageModel, cell: Cell) -> Context:
        return encode(model, shared_demonstrations([d.prompt for d in cell.prompts]))

    def once(self, model: LanguageModel, state: Context, cell: Cell) -> list[Record]:
        return []

    def measure(
        self, model: LanguageModel, state: Context, task: Task, batch: Sequence[Drawn]
    ) -> list[list[Record]]:
        asked = queries([d.prompt for d in batch], len(state.ids), model.device)
        positions = torch.tensor([d.prompt.label_positions for d in batch], device=model.device)
        probe = TargetAttention(frozenset(range(model.n_layers)), asked.target, positions)
        with seam(model.modules, probes=[probe]):
            logits = answer(model, state, asked)
        home = asked.ids.device
        rows = torch.stack([probe.found[layer].to(home) for layer in range(model.n_layers)], dim=1)
        classes = torch.tensor([d.prompt.label_classes for d in batch], device=home)
        scores = rows.new_zeros(*rows.shape[:2], len(task.labels))
        scores.scatter_add_(2, classes[:, None].expand_as(rows), rows)
        seen = [
            [
                Record(f"attention/{label}", value, layer=layer)
                for layer, own in enumerate(example)
                for label, value in zip(task.labels, own, strict=True)
            ]
            for example in scores.double().tolist()
        ]
        return joined(outcomes(task, asked, label_probabilities(logits, asked)), seen)
