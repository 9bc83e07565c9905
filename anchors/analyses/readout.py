"""Reading the prediction off the attention to the label words (2.3): do deep layers extract it there?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from anchors.study.analysis import Cell, Costs, Record, Sizes

if TYPE_CHECKING:
    from anchors.context import Context
    from anchors.model.language import LanguageModel
    from anchors.tasks.drawing import Drawn
    from anchors.tasks.task import Task


@dataclass(frozen=True)
class Readout:
    """The attention that the target pays to the label words of each class, in every layer.

        score of class i in layer l = Σ_h Σ_{k: class of p_k is i} A_{h,l}(q, p_k)

    AUCROC_l is how well these scores tell what the model predicts; R_l is the share of Σ (AUCROC − 0.5) that the layers up
    to l contribute, which is not defined where that sum over all layers is not above 0 (section 2.3, Figure 5; computed by
    `anchors.summaries.readout_summary`).
    """

    kind: ClassVar[str] = "readout"
    version: ClassVar[int] = 1
    fresh: ClassVar[bool] = False

    def costs(self, sizes: Sizes) -> Costs:
        return Costs((sizes.asked(),), (sizes.encoded(),), sizes.shared)

    def prepare(self, model: "LanguageModel", cell: Cell) -> "Context":
        from anchors.context import encode, shared_demonstrations

        return encode(model, shared_demonstrations([d.prompt for d in cell.prompts]))

    def once(self, model: "LanguageModel", state: "Context", cell: Cell) -> list[Record]:
        return []

    def measure(
        self, model: "LanguageModel", state: "Context", task: "Task", batch: "Sequence[Drawn]"
    ) -> list[list[Record]]:
        import torch

        from anchors.attention.seam import seam
        from anchors.context import answer, queries
        from anchors.icl import joined, label_probabilities, outcomes
        from anchors.readout import TargetAttention

        asked = queries([d.prompt for d in batch], len(state.ids), model.device)
        positions = torch.tensor([d.prompt.label_positions for d in batch], device=model.device)
        probe = TargetAttention(frozenset(model.layers), asked.target, positions)
        with seam(model.modules, probes=[probe]):
            logits = answer(model, state, asked)
        home = asked.ids.device
        rows = torch.stack([probe.found[layer].to(home) for layer in model.layers], dim=1)
        classes = torch.tensor([d.prompt.label_classes for d in batch], device=home)
        scores = rows.new_zeros(*rows.shape[:2], len(task.labels))
        scores.scatter_add_(2, classes[:, None].expand_as(rows), rows)
        seen = [
            [
                Record(f"attention/{label}", value, layer=layer)
                for layer, own in zip(model.layers, example, strict=True)
                for label, value in zip(task.labels, own, strict=True)
            ]
            for example in scores.double().tolist()
        ]
        return joined(outcomes(task, asked, label_probabilities(logits, asked)), seen)
