"""What an experiment is: a frozen grid, and what its rows come to. Nothing here imports torch."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from anchors.errors import AnchorsError
from anchors.study.registry import study
from anchors.summaries import Rows, Tables, tables_of
from anchors.tasks.task import Chat, Task, task

if TYPE_CHECKING:
    from anchors.study.analysis import Analysis

TASKS = ("sst2", "trec", "agnews", "emo")
"""The paper's, in its order."""


@dataclass(frozen=True)
class Cells:
    """A block of a grid: one study over some tasks.

    Attributes:
        study: its name, see `anchors.study.registry`.
        settings: of the study.
        tasks: names.
        shots: demonstrations per class, or by task.
        control: see `anchors.tasks.drawing.Draw`.
        labels: other label words than the task's.
        examples: a bound on the experiment's number of examples.
        chat: how prompts go through the model's chat template (`turns` or `one`); None: not at all.
    """

    study: str
    settings: dict[str, Any] = field(default_factory=dict)
    tasks: tuple[str, ...] = TASKS
    shots: int | dict[str, int] = 1
    control: str = "none"
    labels: tuple[str, ...] | None = None
    examples: int | None = None
    chat: Literal["turns", "one"] | None = None

    def make(self) -> "Analysis":
        """The study with its settings."""
        return study(self.study).make(**self.settings)

    def shots_of(self, name: str) -> int:
        return self.shots if isinstance(self.shots, int) else self.shots[name]

    def task(self, name: str) -> Task:
        """The task, with other label words and as a chat if so; the built-in numbers of its classes stay."""
        own = task(name) if self.labels is None else replace(task(name), labels=self.labels)
        return own if self.chat is None else replace(own, chat=Chat(self.chat))


@dataclass(frozen=True)
class Reported:
    """One number that the paper prints."""

    model: str
    task: str
    condition: str
    metric: str
    value: float


@dataclass(frozen=True)
class Experiment:
    """One figure or table of a paper, or a question of ours.

    Attributes:
        name: what `anchors run` calls it.
        title: what it shows.
        finding: what the paper found, in words; for ours, the question.
        cells: the grid.
        seeds, examples: the paper's protocol.
        figure: kind of picture, or None.
        tables: from rows to tables; the first one is printed.
        metrics: what is printed of it.
        paper: the numbers the paper prints.
    """

    name: str
    title: str
    finding: str
    cells: tuple[Cells, ...]
    seeds: tuple[int, ...] = (42, 43, 44, 45, 46)
    examples: int = 1000
    figure: str | None = None
    tables: Callable[[Rows], Tables] = tables_of
    metrics: tuple[str, ...] = ("accuracy",)
    paper: tuple[Reported, ...] = ()

    def kinds(self) -> tuple[str, ...]:
        """Kinds of rows, in order."""
        return tuple(dict.fromkeys(cells.study for cells in self.cells))

    def compare(self, tables: Tables) -> pd.DataFrame:
        """Our numbers beside the paper's: task, condition, metric, ours with low and high, and each model of the paper.

        Raises:
            AnchorsError: the paper prints no number here.
        """
        if not self.paper:
            raise AnchorsError(
                f"The paper prints no number for {self.name}.",
                f"It found: {self.finding}",
                code="unknown-name",
            )
        said = pd.DataFrame([vars(r) for r in self.paper])
        said = said.pivot(
            index=["task", "condition", "metric"], columns="model", values="value"
        ).reset_index()
        ours = next(iter(tables.values()))[["task", "condition", "metric", "value", "low", "high"]]
        return said.merge(ours, on=["task", "condition", "metric"], how="left")
