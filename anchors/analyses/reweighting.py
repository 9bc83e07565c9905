"""Anchor re-weighting (3.1): learn how much the target should attend to each label word."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from anchors.errors import AnchorsError
from anchors.study.analysis import Cell, Costs, Pass, Record, Sizes

if TYPE_CHECKING:
    from anchors.context import Context
    from anchors.model.language import LanguageModel
    from anchors.reweighting import Beta
    from anchors.tasks.drawing import Drawn
    from anchors.tasks.task import Task


@dataclass(frozen=True)
class Reweighting:
    """Fit β on a few extra examples, apply it to the test set.

        Â_{lh}(q, p_i) = exp(β^i_{lh}) · A_{lh}(q, p_i)

    only in the target's row, after the softmax, without renormalising; β starts at 0 (which changes nothing) and is
    trained with Adam on the cross-entropy over the label words' logits, the model frozen (section 3.1, Table 1). It is kept
    under the results' runs as safetensors with its provenance, drawn by layer, head and label, and used again.

    Attributes:
        epochs: passes over the training examples.
        learning_rate: of Adam.
        per_class: extra training examples of each class, none of them a demonstration.
        batch: training examples per step.
        beta: a file with a fitted β (safetensors) to apply to every seed, instead of fitting.

    Conditions: `none` is vanilla in-context learning on the same prompts, `reweighted` with the fitted β.
    """

    kind: ClassVar[str] = "reweight"
    version: ClassVar[int] = 1
    fresh: ClassVar[bool] = False

    learning_rate: float = field(default=0.01, metadata={"option": ("--lr",), "min": 1e-6})
    epochs: int = field(default=10, metadata={"min": 1})
    per_class: int = field(default=4, metadata={"min": 1})
    batch: int = field(default=1, metadata={"option": ("--per-step",), "min": 1})
    beta: Path | str | None = None

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.per_class < 1 or self.batch < 1 or not self.learning_rate > 0:
            raise AnchorsError(f"{self}: every setting must be positive.", code="option-value")

    def costs(self, sizes: Sizes) -> Costs:
        examples = 0 if self.beta is not None else self.per_class * sizes.classes
        before = sizes.shared + sizes.mean - 1
        new, step = (before, before + 1) if sizes.states else (sizes.mean - 1, 1)
        fitted = (
            Pass(new, before - new, times=examples, kept=True),
            Pass(
                step,
                before + 1 - step,
                times=examples * self.epochs,
                backward=True,
                edited=sizes.layers,
                columns=0,
            ),
        )
        return Costs(
            (sizes.asked(), sizes.asked(edited=sizes.layers)),
            (sizes.encoded(), *(fitted if examples else ())),
            sizes.shared + examples * before,
        )

    def settings(self) -> dict[str, Any]:
        """The fields, with what is in the file of β in place of its name.

        Raises:
            AnchorsError: the file cannot be read.
        """
        if self.beta is None:
            return asdict(self)
        try:
            from anchors.digest import file_digest

            return asdict(self) | {"beta": file_digest(Path(self.beta))}
        except OSError as error:
            raise AnchorsError(
                f"{str(self.beta)!r} does not hold a fitted β: {error.strerror or error}.",
                "Give the .safetensors file that `anchors reweight` left in its run.",
                code="beta",
            ) from error

    def notes(self, model: "LanguageModel") -> list[str]:
        """Where fitting runs more than a reader expects."""
        if self.beta is not None or not model.beside_attention or not model.carries:
            return []
        return [
            "The steps of re-weighting run whole prompts: a step of one token would write over recurrent states that its gradient reads."
        ]

    def kept(self, folder: Path, seeds: "Sequence[int]") -> list[Path]:
        """The files of β that fitting left in a run's folder."""
        files = [folder / f"beta-{seed}.safetensors" for seed in seeds]
        return [file for file in files if file.is_file()]

    def prepare(self, model: "LanguageModel", cell: Cell) -> "tuple[Context, Beta]":
        from anchors.context import encode, shared_demonstrations
        from anchors.reweighting import Beta, fit, training_prompts
        from anchors.study.results import Run, provenance

        context = encode(model, shared_demonstrations([d.prompt for d in cell.prompts]))
        kept = cell.folder / f"beta-{cell.how.seed}.safetensors" if self.beta is None else Path(self.beta)
        if kept.is_file() or self.beta is not None:
            beta = Beta.load(kept)
            beta.demand(model)
            return context, beta
        if any(seed == cell.how.seed for seed, _ in Run(cell.folder, {}).done()):
            raise AnchorsError(
                f"{str(kept)!r} is gone, and rows beside it were made with it.",
                f"Remove the folder {str(cell.folder)!r}: everything in it is measured anew.",
                code="beta",
            )
        prompts = training_prompts(model, cell, self.per_class)
        beta = fit(model, context, prompts, self.learning_rate, self.epochs, self.batch, cell.how.seed)
        beta.save(
            kept,
            provenance(
                model=model.name,
                fingerprint=model.fingerprint,
                precision=model.precision,
                task=cell.task.identity(),
                data=cell.data.fingerprint,
                seed=cell.how.seed,
                shots=cell.how.shots,
                examples=len(prompts),
            ),
        )
        return context, beta

    def once(self, model: "LanguageModel", state: "tuple[Context, Beta]", cell: Cell) -> list[Record]:
        beta = state[1]
        label_of = [
            f"{cell.task.labels[c]}#{n}" if (n := beta.classes[: i + 1].count(c)) > 1 else cell.task.labels[c]
            for i, c in enumerate(beta.classes)
        ]
        values = [
            Record(f"beta/{label_of[i]}/{head}", float(beta.beta[layer, head, i]), "reweighted", layer)
            for layer, heads in enumerate(beta.heads)
            for head in range(heads)
            for i in range(beta.beta.shape[2])
        ]
        losses = [Record("training_loss", loss, f"epoch-{e:02}") for e, loss in enumerate(beta.losses)]
        return [*losses, *values]

    def measure(
        self, model: "LanguageModel", state: "tuple[Context, Beta]", task: "Task", batch: "Sequence[Drawn]"
    ) -> list[list[Record]]:
        from anchors.attention.seam import seam
        from anchors.context import answer, queries
        from anchors.icl import joined, label_probabilities, outcomes

        context, beta = state
        asked = queries([d.prompt for d in batch], len(context.ids), model.device)
        baseline = label_probabilities(answer(model, context, asked), asked)
        with seam(model.modules, edits=[beta.edit([d.prompt for d in batch], model.device)]):
            changed = label_probabilities(answer(model, context, asked), asked)
        return joined(outcomes(task, asked, baseline), outcomes(task, asked, changed, "reweighted"))
