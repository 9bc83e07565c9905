"""Which labels does a model confuse, and could one have known from its keys (3.3)?"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from anchors.errors import AnchorsError
from anchors.study.analysis import Cell, Costs, Record, Sizes

if TYPE_CHECKING:
    from anchors.model.language import LanguageModel
    from anchors.tasks.drawing import Drawn
    from anchors.tasks.task import Task


@dataclass(frozen=True)
class Diagnosis:
    """Predicted confusion of each pair of labels, from the keys at their label words, and the actual one.

    In one deep layer, the queries at the targets of all prompts span the directions in which the model tells its
    answers apart. Their principal components weigh the keys at the label words:

        k̂ = (components · k) ⊙ singular values
        Confusion^pred_ij = ‖k̂_{p_i} − k̂_{p_j}‖ / max_{s≠t} ‖k̂_{p_s} − k̂_{p_t}‖         (small = confusable)
        Confusion_ij = ROC AUC of p_i / p_j on the prompts whose true class is i or j

    (section 3.3, Figures 6 and 14). With several shots, k_{p_i} is the mean over the label words of class i. With
    grouped-query attention a key is repeated for each query head that reads it.

    Attributes:
        components: principal components of the queries, e.g. 10 or 5,10,20,50; each number is a condition.
        layer: where the keys are taken; default: two thirds up (the reference: layer 32 of 48).
    """

    kind: ClassVar[str] = "diagnose"
    version: ClassVar[int] = 1
    fresh: ClassVar[bool] = False

    components: tuple[int, ...] = field(default=(10,), metadata={"min": 1})
    layer: int | None = field(default=None, metadata={"min": 0})

    def __post_init__(self) -> None:
        if not self.components or min(self.components) < 1:
            raise AnchorsError(
                f"components = {self.components}: each must be at least 1.", code="option-value"
            )

    def costs(self, sizes: Sizes) -> Costs:
        return Costs((sizes.asked(),), (sizes.encoded(),), sizes.shared)

    def depth(self, model: "LanguageModel") -> int:
        middle = round(model.n_layers * 2 / 3)
        layer = min(model.layers, key=lambda own: abs(own - middle)) if self.layer is None else self.layer
        if not 0 <= layer < model.n_layers:
            raise AnchorsError(
                f"{model.name} has no layer {layer}.",
                f"It has layers 0 to {model.n_layers - 1}.",
                code="layers",
            )
        model.demand_attention([layer])
        return layer

    def prepare(self, model: "LanguageModel", cell: Cell) -> dict[int, list[Record]]:
        """Everything: the components depend on all prompts of the seed, so they are run together."""
        import torch

        from anchors.attention.seam import seam
        from anchors.context import answer, encode, queries, shared_demonstrations
        from anchors.diagnosis import TargetQueries, label_keys, predicted_confusion
        from anchors.icl import label_probabilities, outcomes
        from anchors.study.runner import tokens_per_batch

        layer, prompts = self.depth(model), [d.prompt for d in cell.prompts]
        context = encode(model, shared_demonstrations(prompts))
        longest = max(len(p.ids) - p.query for p in prompts)
        size = max(1, tokens_per_batch(model, len(context.ids) / longest) // longest)
        vectors, found = [], []
        for start in range(0, len(prompts), size):
            asked = queries(prompts[start : start + size], len(context.ids), model.device)
            probe = TargetQueries(frozenset([layer]), asked.target)
            with seam(model.modules, probes=[probe]):
                probabilities = label_probabilities(answer(model, context, asked), asked)
            vectors.append(probe.found.double().cpu())
            found += outcomes(cell.task, asked, probabilities)
        keys = label_keys(probe.keys[:1], probe.groups, prompts[0].label_positions, prompts[0].label_classes)
        whole = predicted_confusion(torch.cat(vectors).numpy(), keys.double().cpu().numpy(), self.components)
        labels = cell.task.labels
        said = [
            Record(f"predicted_confusion/{labels[i]}/{labels[j]}", matrix[i, j], f"components-{m}", layer)
            for m, matrix in whole.items()
            for i, j in itertools.combinations(range(len(labels)), 2)
        ]
        # Keyed by identity of the prompt: that is what `measure` is given.
        return {-1: said} | {id(d): own for d, own in zip(cell.prompts, found, strict=True)}

    def once(self, model: "LanguageModel", state: dict[int, list[Record]], cell: Cell) -> list[Record]:
        return state[-1]

    def measure(
        self, model: "LanguageModel", state: dict[int, list[Record]], task: "Task", batch: "Sequence[Drawn]"
    ) -> list[list[Record]]:
        return [state[id(d)] for d in batch]
