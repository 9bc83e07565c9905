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


@runtime_checkable
class Analysis(Protocol):
    """What is measured on a prompt. A frozen data class: its fields are its settings.

    The module it stands in imports torch in `prepare`, `once` and `measure` only, so that listing studies and their options
    needs none.

    Attributes:
        kind: short name; of its verb and its results, too.
        version: raised whenever its numbers change for the same settings.
        fresh: whether every prompt shows demonstrations of its own, see `anchors.tasks.drawing.Draw`.
        passes: about how many forward passes a prompt costs, for foretelling the time.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    kind: ClassVar[str]
    version: ClassVar[int]
    fresh: ClassVar[bool]

    @property
    def passes(self) -> float: ...

    def prepare(self, model: "LanguageModel", cell: Cell) -> Any:
        """What the prompts of a seed share, computed once (the demonstrations' cache, a fitted β)."""

    def once(self, model: "LanguageModel", state: Any, cell: Cell) -> list[Record]:
        """What there is to say of a seed as a whole."""

    def measure(
        self, model: "LanguageModel", state: Any, task: "Task", batch: "Sequence[Drawn]"
    ) -> list[list[Record]]:
        """The records of each prompt of a batch."""
