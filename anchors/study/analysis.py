"""What a study is made of: settings that measure prompts, and the records they leave. Nothing here imports torch."""

from collections.abc import Sequence
from dataclasses import Field, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from anchors.model.language import LanguageModel
    from anchors.tasks.data import Data
    from anchors.tasks.drawing import Draw, Drawn
    from anchors.tasks.task import Task


class Record(NamedTuple):
    """One measured value of one prompt (or of a seed).

    Attributes:
        metric: what was measured.
        value: the number.
        condition: under which of the analysis' conditions; `none` where nothing was changed.
        layer: in which layer, or None.
    """

    metric: str
    value: float
    condition: str = "none"
    layer: int | None = None


@dataclass(frozen=True)
class Cell:
    """All prompts of one seed, and where to keep what belongs to them.

    Attributes:
        task, data, how: what they were drawn from, and how.
        prompts: the prompts that fit into the model's context.
        folder: of the run; for tensors that an analysis keeps.
    """

    task: "Task"
    data: "Data"
    how: "Draw"
    prompts: "tuple[Drawn, ...]"
    folder: Path


class Pass(NamedTuple):
    """Passes of one kind through the model, for foretelling what an analysis costs.

    Attributes:
        tokens: that each row runs.
        past: keys of a context that stand before them.
        rows: prompts side by side.
        times: how many such passes.
        backward: with the gradient of a loss, too; the flow is read on the way.
        edited: layers in which an edit forms the whole pattern.
        columns: at which logits are computed.
        kept: whether keys and values of the tokens are kept, as a context's are.
    """

    tokens: int
    past: int = 0
    rows: int = 1
    times: float = 1
    backward: bool = False
    edited: int = 0
    columns: int = 1
    kept: bool = False


class Sizes(NamedTuple):
    """What the passes of a batch depend on.

    Attributes:
        layers: of the model.
        classes: labels of the task.
        shared: tokens of the demonstrations that a seed's prompts share; 0 where each shows its own.
        tokens: of the longest prompt of the batch, without those.
        rows: prompts of the batch.
        columns: different lengths among them.
        anchors: label words and format tokens of the demonstrations.
        mean: tokens of its prompts on average, without the shared ones.
        states: whether the model has recurrent layers, whose states no gradient passes.
    """

    layers: int
    classes: int
    shared: int
    tokens: int
    rows: int
    columns: int
    anchors: int
    mean: int
    states: bool = False

    def asked(self, past: int | None = None, **how: Any) -> Pass:
        """The batch run once, on the shared demonstrations or as many keys as are given."""
        before = self.shared if past is None else past
        return Pass(self.tokens, before, self.rows, columns=self.columns, **how)

    def encoded(self, times: float = 1, edited: int = 0) -> Pass:
        """The shared demonstrations run once, and kept."""
        return Pass(self.shared, times=times, edited=edited, kept=True)


class Costs(NamedTuple):
    """The passes of an analysis.

    Attributes:
        batch: of each batch.
        once: of each seed, before the first batch.
        held: tokens whose keys and values are held while the batches of a seed run.
    """

    batch: tuple[Pass, ...]
    once: tuple[Pass, ...] = ()
    held: float = 0


def costs_of(analysis: "Analysis", sizes: Sizes) -> Costs:
    """What an analysis says that it runs; one that only counts its `passes` answers each batch so often."""
    if (own := getattr(analysis, "costs", None)) is not None:
        return own(sizes)
    once = (sizes.encoded(),) if sizes.shared else ()
    return Costs((sizes.asked(times=getattr(analysis, "passes", 1.0)),), once, sizes.shared)


@runtime_checkable
class Described(Protocol):
    """What a study of prompts says of itself.

    Attributes:
        kind: short name; of its verb and its results, too.
        version: raised whenever its numbers change for the same settings.
        fresh: whether every prompt shows demonstrations of its own, see `anchors.tasks.drawing.Draw`.
    """

    kind: ClassVar[str]
    version: ClassVar[int]
    fresh: ClassVar[bool]


@runtime_checkable
class Analysis(Described, Protocol):
    """What is measured on a prompt. A frozen data class: its fields are its settings.

    The module it stands in imports torch in `prepare`, `once` and `measure` only, so that listing studies and their options
    needs none.

    What it costs is foretold from a method `costs(sizes)`, which gives its `Costs`, or from `passes`: about how many forward passes
    a prompt takes. What a reader must know of its numbers on a model, beside what is said of every one, comes from a method
    `notes(model)`.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def prepare(self, model: "LanguageModel", cell: Cell) -> Any:
        """What the prompts of a seed share, computed once (the demonstrations' cache, a fitted β)."""

    def once(self, model: "LanguageModel", state: Any, cell: Cell) -> list[Record]:
        """What there is to say of a seed as a whole."""

    def measure(
        self, model: "LanguageModel", state: Any, task: "Task", batch: "Sequence[Drawn]"
    ) -> list[list[Record]]:
        """The records of each prompt of a batch."""
