"""The information flow (2.1) of many prompts, and of single ones as a map."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from anchors.study.analysis import Cell, Costs, Pass, Record, Sizes

if TYPE_CHECKING:
    from anchors.model.language import LanguageModel
    from anchors.tasks.drawing import Drawn
    from anchors.tasks.task import Task


@dataclass(frozen=True)
class InformationFlow:
    """S_wp, S_pq and S_ww of every prompt and layer (2.1), with loss and label probabilities.

        I_l = |Σ_h A ⊙ ∂L/∂A|

    S_wp is the mean flow from words to label words, S_pq from label words to the target, S_ww between all other words.
    How evenly the label words share in S_pq is told by the entropy of their parts, as a share of the largest possible one (`s_pq_entropy`):

        −Σ_k f_k log f_k / log K,   f_k = I_l[q, p_k] / Σ_k I_l[q, p_k]        k: the K label words

    It is missing where nothing flows from them at all. Where label words have several tokens, what S_pq leaves out of the flow from them to the target stands beside it
    (`s_pq_rest`), because the task's policy counts one of these tokens (`anchors.flow.metrics.left_out`).

    Every prompt shows demonstrations of its own, so whole prompts are run.
    """

    kind: ClassVar[str] = "flow"
    version: ClassVar[int] = 4
    fresh: ClassVar[bool] = True

    def costs(self, sizes: Sizes) -> Costs:
        return Costs((sizes.asked(backward=True),))

    def prepare(self, model: "LanguageModel", cell: Cell) -> None:
        return None

    def once(self, model: "LanguageModel", state: None, cell: Cell) -> list[Record]:
        return []

    def measure(
        self, model: "LanguageModel", state: None, task: "Task", batch: "Sequence[Drawn]"
    ) -> list[list[Record]]:
        from anchors.flow.metrics import evenness
        from anchors.flow.saliency import flow
        from anchors.stats import ENTROPY, REST, SUMS

        result = flow(model, [d.prompt for d in batch])
        found = []
        for i, drawn in enumerate(batch):
            row = result.probabilities[i]
            whole: dict[str, Any] = {
                "loss": result.loss[i],
                "gold": drawn.prompt.gold,
                "predicted": row.argmax(),
                "accuracy": row.argmax() == drawn.prompt.gold,
                "tokens": len(drawn.prompt.ids),
                "identity_error": result.identity_error.max(),
            } | {f"probability/{label}": p for label, p in zip(task.labels, row, strict=True)}
            by_layer = {metric: getattr(result.sums, metric)[i] for metric in SUMS} | {REST: result.rest[i]}
            by_layer[ENTROPY] = evenness(result.into[i][:, list(drawn.prompt.label_positions)])
            sums = [
                Record(metric, float(value), layer=layer)
                for metric, values in by_layer.items()
                for layer, value in zip(model.layers, values, strict=True)
                if not value.isnan()
            ]
            found.append(sums + [Record(metric, float(value)) for metric, value in whole.items()])
        return found


@dataclass(frozen=True)
class FlowMap:
    """The whole I_l of single prompts in a few layers, their tokens, and which are the positions p_k (Figure 1).

    Attributes:
        layers: which; None takes one in the first and one in the last quarter of those that attend.
    """

    kind: ClassVar[str] = "map"
    version: ClassVar[int] = 2
    fresh: ClassVar[bool] = True

    layers: tuple[int, ...] | None = None

    def costs(self, sizes: Sizes) -> Costs:
        return Costs((Pass(sizes.mean, times=sizes.rows, backward=True),))

    def prepare(self, model: "LanguageModel", cell: Cell) -> Any:
        return model.tokenizer

    def once(self, model: "LanguageModel", state: Any, cell: Cell) -> list[Record]:
        return []

    def measure(
        self, model: "LanguageModel", state: Any, task: "Task", batch: "Sequence[Drawn]"
    ) -> list[list[Record]]:
        from anchors.flow.saliency import flow

        own = model.layers
        depth = len(own)
        layers = (own[depth // 8], own[depth - 1 - depth // 8]) if self.layers is None else self.layers
        found = []
        for drawn in batch:
            prompt = drawn.prompt
            maps = flow(model, [prompt], maps=layers).maps
            tokens = [
                Record(f"token/{prompt.roles[i]}/{state.decode([token])}", i)
                for i, token in enumerate(prompt.ids)
            ]
            tokens += [Record("counted", position) for position in prompt.label_positions]
            flows = [
                Record(f"flow/{i}/{j}", float(maps[layer][0, i, j]), layer=layer)
                for layer in layers
                for i in range(len(prompt.ids))
                for j in range(i)
            ]
            found.append(tokens + flows)
        return found
