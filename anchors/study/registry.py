"""The studies there are: one line each, from which verbs, tables, figures and the catalogue's kinds derive.

A line names what belongs to a study and imports none of it, so that listing studies costs nothing. Other packages bring studies
of their own by an entry point of the group `anchors.studies`, whose name is the study's and whose value is such a line:

    [project.entry-points."anchors.studies"]
    attended = "my_package.attended:STUDY"
"""

import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from anchors.errors import AnchorsError, brief, nearest

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from anchors.study.analysis import Analysis

    Tables = dict[str, pd.DataFrame]

PLUGINS = "anchors.studies"
"""The group of entry points by which other packages bring studies."""


@dataclass(frozen=True)
class Study:
    """One line of the registry. What it names is written `module:name` and imported when it is needed.

    Attributes:
        name: of the study, its verb, its rows and its files; the `kind` of its settings class.
        settings: the class whose fields are the settings (`anchors.study.analysis.Analysis`).
        help: what it measures, in one line.
        title: of the table on the console; by default the name.
        tables: from rows to tables, the main one named `summary`; by default the means of `metrics` by condition and layer,
            and how far they are from those of the condition `none`.
        figure: from tables and the model's name to a picture; by default a plain one of `summary`.
        metrics: what the console shows of `summary`, and what it holds where there are no `tables`.
        interval: the metric and column of `summary` whose widest interval says how much is known; by default the first of
            `metrics`, and its value.
        shown: from a report and its `view` to what the console shows instead; strings stand as they are.
        sentences: from tables by name to what they say, in one or two sentences of each task.
        names: from the name of a condition to what it means, in words; empty where there is nothing to say.
        near: another study whose tables the sentences take, by `<its name>_<table>`, where it was measured of the same model.
        beside: another study that is measured on the same prompts unless it is refused, with settings that both have in common;
            the option that refuses it bears the study's name, and this is its help.
        view: a frozen class of options that change no rows, only what is shown and drawn of them.
        task, examples: what is measured on where nothing else is said.
        asked: what it is asked of: prompts of tasks (`anchors.study.analysis.Analysis`), a file of texts, episodes of a model of
            `anchors nsa train`, or suites of `anchors inject`; the settings of these three have `on`, which makes an
            `anchors.study.report.Inquiry` of them.
        units: what its progress counts.
        more: what is kept with its rows, by name; `tables` then takes these by their names and the provenance as `facts`.
        needed: of `more`, what no table can be made without.
        columns: of its rows, where they are not those of prompts; the last one is the value.
        group: of verbs, in which its verb is what its name has after this; by default there is none.
        verb: whether there is a verb of its name.
        within: the study whose verb measures it instead, where an option of its settings is given; by default none.
        home: which package brings it.
        formerly: what names of its tables' files began with in 0.4.0, before a hyphen, where they did not as they do now.
    """

    name: str
    settings: str
    help: str
    title: str = ""
    tables: str | None = None
    figure: str | None = None
    metrics: tuple[str, ...] = ("accuracy",)
    shown: str | None = None
    interval: tuple[str, str] = ("", "value")
    sentences: str | None = None
    names: str | None = None
    near: str = ""
    beside: tuple[str, str] | None = None
    view: str | None = None
    task: str = "sst2"
    examples: int = 60
    asked: Literal["prompts", "texts", "episodes", "suites"] = "prompts"
    units: str = "prompts"
    more: tuple[str, ...] = ()
    needed: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    group: str = ""
    verb: bool = True
    within: str = ""
    home: str = "label-anchors"
    formerly: str = ""

    def resolve(self, reference: str) -> Any:
        """What `module:name` names.

        Raises:
            AnchorsError: it cannot be imported.
        """
        try:
            return pkgutil.resolve_name(reference)
        except Exception as error:
            raise AnchorsError(
                f"The study {self.name!r} of {self.home} cannot be used: {reference!r} cannot be imported: {brief(error)}.",
                f"Mend or uninstall {self.home}.",
                code="study",
            ) from error

    @property
    def command(self) -> str:
        """Its verb, with the group in which it stands, or the option with which another one's verb measures it."""
        if self.within:
            return f"{self.within} --{self.name[len(self.within) + 1 :]} FILE"
        return f"{self.group} {self.name[len(self.group) + 1 :]}" if self.group else self.name

    @property
    def folder(self) -> str:
        """Of its results."""
        return self.name.replace("_", "-") if self.within else self.command.replace(" ", "-")

    @property
    def stems(self) -> dict[str, str]:
        """By kind of rows, the names of their files; those of all its files begin with that of the first."""
        stem = self.name.replace("-", "_")
        beside = {self.beside[0]: f"{stem}_{self.beside[0]}_rows"} if self.beside else {}
        return {self.name: stem, **beside, **{name: f"{stem}_{name}" for name in self.more}}

    def tables_in(self, folder: Path) -> list[Path]:
        """Tables of this study there, those of others left out whose names begin like its own (`flow` and `flow-prompts`)."""
        own = self.stems[self.name]
        others = tuple(
            stem for line in STUDIES.values() if (stem := line.stems[line.name]).startswith(f"{own}_")
        )
        found = sorted(folder.glob(f"{own}_*.parquet"))
        return [
            p for p in found if not any(p.stem == stem or p.stem.startswith(f"{stem}_") for stem in others)
        ]

    def make(self, **settings: Any) -> "Analysis":
        """The study with these settings."""
        return self.resolve(self.settings)(**settings)

    def tabulate(self, rows: "pd.DataFrame", **more: Any) -> "Tables":
        """What its rows come to, with intervals."""
        if self.tables is not None:
            return self.resolve(self.tables)(rows, **more)
        from anchors.stats import summarise

        baseline = "none" if rows["condition"].nunique() > 1 else None
        return {"summary": summarise(rows, self.metrics, baseline=baseline)}

    def say(self, tables: "Tables") -> list[str]:
        """What its tables say; nothing where it has no sentences."""
        return self.resolve(self.sentences)(tables) if self.sentences else []

    @property
    def main(self) -> str:
        """What its main interval is of."""
        metric, column = self.interval
        return metric or (self.metrics[0] if column == "value" else column)

    def width(self, tables: "Tables") -> float:
        """Of the widest of its main intervals; not a number where there is none."""
        summary = next(iter(tables.values()))
        metric, column = self.interval
        if "metric" in summary:
            summary = summary[summary["metric"] == (metric or self.metrics[0])]
        low, high = (f"{column}_low", f"{column}_high") if f"{column}_low" in summary else ("low", "high")
        return float((summary[high] - summary[low]).max())

    def legend(self, tables: "Tables") -> list[str]:
        """The names of conditions in its main table, each with what it means."""
        if self.names is None or "condition" not in (summary := next(iter(tables.values()))):
            return []
        words = self.resolve(self.names)
        told = {name: words(name) for name in dict.fromkeys(map(str, summary["condition"])) if name != "none"}
        return [f"{name}: {said}" for name, said in told.items() if said]

    def draw(self, tables: "Tables", model: str) -> "Figure | dict[str, Figure] | None":
        """The picture of its tables, or several by name; None where the plain picture finds nothing to draw."""
        return self.resolve(self.figure or "anchors.figures.generic:draw")(tables, model)


LOYALTIES = ("accuracy", "label_loyalty", "word_loyalty")
_TABLES, _FIGURES, _CLI = "anchors.summaries", "anchors.figures", "anchors.cli"
_SAID = "anchors.summaries.sentences"
_WORDS = f"{_SAID}:explained"

BUILT_IN: dict[str, Study] = {
    study.name: study
    for study in (
        Study(
            "flow",
            "anchors.analyses.flow:InformationFlow",
            "Measure S_wp, S_pq and S_ww by layer; write a table, a figure and a page to click through.",
            tables=f"{_TABLES}:flow_tables",
            figure=f"{_FIGURES}.flow:draw",
            shown=f"{_CLI}.flow:shown",
            view=f"{_CLI}.flow:View",
            sentences=f"{_SAID}:flow",
            interval=("s_pq", "share"),
        ),
        Study(
            "flow_prompts",
            "anchors.analyses.targets:TargetFlow",
            "Measure which tokens flow into the last one of any prompts, by layer, when the model predicts a token that is named.",
            tables=f"{_TABLES}.targets:target_tables",
            figure=f"{_FIGURES}.flow_prompts:draw",
            shown=f"{_CLI}.flow_prompts:shown",
            view=f"{_CLI}.flow:View",
            sentences=f"{_SAID}:flow_prompts",
            metrics=("s_tq", "first_token", "entropy"),
            asked="texts",
            within="flow",
        ),
        Study(
            "map",
            "anchors.analyses.flow:FlowMap",
            "The flow between all tokens of single prompts.",
            tables=f"{_TABLES}:map_tables",
            figure=f"{_FIGURES}.map:draw",
            sentences=f"{_SAID}:flow_map",
            verb=False,
        ),
        Study(
            "classify",
            "anchors.analyses.classification:Classification",
            "Answer test examples by in-context learning: accuracy, per-class scores, confusion matrix.",
            tables=f"{_TABLES}:classification_summary",
            figure=f"{_FIGURES}.classify:draw",
            shown=f"{_CLI}.classify:shown",
            examples=100,
            sentences=f"{_SAID}:classify",
            names=_WORDS,
        ),
        Study(
            "isolate",
            "anchors.analyses.isolation:Isolation",
            "Isolate label words in the first or last k layers: label loyalty, word loyalty, accuracy.",
            "Isolation",
            figure=f"{_FIGURES}.isolate:draw",
            metrics=LOYALTIES,
            sentences=f"{_SAID}:isolate",
            interval=("label_loyalty", "value"),
            names=_WORDS,
        ),
        Study(
            "words",
            "anchors.analyses.isolation:TopWords",
            "The most probable next words of single prompts, with and without isolated label words.",
            tables=f"{_TABLES}:word_tables",
            figure=f"{_FIGURES}.words:draw",
            sentences=f"{_SAID}:top_words",
            verb=False,
        ),
        Study(
            "readout",
            "anchors.analyses.readout:Readout",
            "AUCROC_l and R_l: how well each layer's attention to the label words tells the model's own prediction.",
            tables=f"{_TABLES}:readout_tables",
            figure=f"{_FIGURES}.readout:draw",
            shown=f"{_CLI}.readout:shown",
            examples=100,
            sentences=f"{_SAID}:readout",
            interval=("aucroc", "value"),
        ),
        Study(
            "reweight",
            "anchors.analyses.reweighting:Reweighting",
            "Fit β on a few extra examples and apply it: accuracy against vanilla in-context learning.",
            "Re-weighting",
            f"{_TABLES}:reweighting_summary",
            f"{_FIGURES}.reweight:draw",
            ("accuracy", "loss"),
            examples=100,
            sentences=f"{_SAID}:reweight",
            names=_WORDS,
        ),
        Study(
            "compress",
            "anchors.analyses.compression:Compression",
            "Keep only label words and format tokens of the demonstrations: loyalties, accuracy, measured speed-up.",
            "Compression",
            f"{_TABLES}:compression_summary",
            f"{_FIGURES}.compress:draw",
            LOYALTIES,
            f"{_CLI}.compress:shown",
            beside=("speed", "Measure the speed-up, too."),
            sentences=f"{_SAID}:compress",
            interval=("label_loyalty", "value"),
            names=_WORDS,
        ),
        Study(
            "speed",
            "anchors.analyses.compression:Speed",
            "Seconds per prompt on whole demonstrations and on their anchors.",
            tables=f"{_TABLES}:speed_summary",
            figure=f"{_FIGURES}.speed:draw",
            verb=False,
        ),
        Study(
            "diagnose",
            "anchors.analyses.diagnosis:Diagnosis",
            "Foretell from the keys at the label words which labels are confused, and compare with what is.",
            tables=f"{_TABLES}:diagnosis_tables",
            figure=f"{_FIGURES}.diagnose:draw",
            shown=f"{_CLI}.diagnose:shown",
            task="trec",
            examples=100,
            sentences=f"{_SAID}:diagnose",
            interval=("", "correlation"),
            names=_WORDS,
            near="classify",
        ),
        Study(
            "causal",
            "anchors.analyses.causal:Causal",
            "In which layers does the prediction take what it needs from the label words?",
            tables=f"{_TABLES}:causal_tables",
            figure=f"{_FIGURES}.causal:draw",
            shown=f"{_CLI}.causal:shown",
            beside=("flow", "Measure the saliency's S_pq on as many prompts, to compare."),
            examples=40,
            sentences=f"{_SAID}:causal",
            interval=("follow", "value"),
            names=_WORDS,
        ),
        Study(
            "nsa_probe",
            "anchors.nsa.study:NSAProbe",
            "Are label words still anchors when attention is sparse?",
            tables="anchors.nsa.probing.tables:all_tables",
            figure=f"{_FIGURES}.nsa_probe:draw",
            shown=f"{_CLI}.nsa_probe:shown",
            view=f"{_CLI}.nsa_probe:View",
            asked="episodes",
            more=("identity",),
            columns=("seed", "number", "condition", "layer", "group", "head", "place", "metric", "value"),
            group="nsa",
            sentences="anchors.nsa.probing.sentences:said",
            names="anchors.nsa.probing.sentences:explained",
        ),
        Study(
            "inject-sweep",
            "anchors.injection.study:InjectSweep",
            "Which method injects how much of a skill, and what the VLM forgets meanwhile.",
            tables="anchors.injection.sweeping.tables:all_tables",
            figure=f"{_FIGURES}.inject_sweep:draw",
            shown=f"{_CLI}.inject_sweep:shown",
            sentences="anchors.injection.sweeping.sentences:said",
            asked="suites",
            units="settings",
            more=("settings", "guessing"),
            needed=("settings",),
            columns=(
                "seed",
                "scenario",
                "setting",
                "mask",
                "condition",
                "split",
                "kind",
                "number",
                "correct",
            ),
            group="inject",
        ),
        Study(
            "inject-flow",
            "anchors.injection.study:InjectFlow",
            "Split the information flow by its source (images, text) and see what an injection does to it.",
            tables="anchors.injection.image_flow.choice:all_tables",
            figure=f"{_FIGURES}.inject_flow:draw_all",
            shown=f"{_CLI}.inject_flow:shown",
            sentences="anchors.injection.image_flow.sentences:said",
            asked="suites",
            units="settings",
            more=("ratios", "guessing"),
            needed=("ratios",),
            columns=(
                "seed",
                "expert",
                "scenario",
                "labels",
                "strength",
                "number",
                "layer",
                "metric",
                "value",
            ),
            group="inject",
            formerly="flow",
        ),
    )
}
"""The studies that come along, by name."""


@cache
def plugins() -> tuple[dict[str, Study], dict[str, str]]:
    """The studies of other packages by name; and of those that cannot be used, the reason in one sentence."""
    found: dict[str, Study] = {}
    refused: dict[str, str] = {}
    for point in sorted(entry_points(group=PLUGINS), key=lambda p: (p.name, p.value)):
        home = point.dist.name if point.dist is not None else point.value
        said = f"The study {point.name!r} of {home} is left out: "
        if point.name in BUILT_IN or point.name in found:
            other = (BUILT_IN | found)[point.name].home
            refused[f"{point.name} of {home}"] = said + f"{other} has a study of that name."
            continue
        try:
            found[point.name] = _line(point, home)
        except Exception as error:  # noqa: BLE001 - whatever a plugin does, the others go on
            refused[point.name] = said + brief(error).rstrip(".") + "."
    return found, refused


def _line(point: EntryPoint, home: str) -> Study:
    line = point.load()
    if not isinstance(line, Study):
        raise TypeError(f"{point.value!r} is no anchors.study.registry.Study")
    if line.name != point.name:
        raise ValueError(f"{point.value!r} calls itself {line.name!r}")
    return replace(line, home=home)


def study(name: str) -> Study:
    """The study of a name.

    Raises:
        AnchorsError: there is none, or the package that brings it is broken.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    found, refused = plugins()
    if name in refused:
        raise AnchorsError(refused[name], "Mend or uninstall that package.", code="study")
    if name not in found:
        raise AnchorsError(
            f"There is no study {name!r}.", nearest(name, [*BUILT_IN, *found]), code="unknown-name"
        )
    return found[name]


class Studies(Mapping[str, Study]):
    """All studies by name, those of other packages included; these are looked for when they are needed."""

    def __getitem__(self, name: str) -> Study:
        return BUILT_IN[name] if name in BUILT_IN else plugins()[0][name]

    def __iter__(self) -> Iterator[str]:
        return iter([*BUILT_IN, *plugins()[0]])

    def __len__(self) -> int:
        return len(BUILT_IN) + len(plugins()[0])

    def __contains__(self, name: object) -> bool:
        return name in BUILT_IN or name in plugins()[0]


STUDIES: Mapping[str, Study] = Studies()


class Summaries(Mapping[str, "Callable[[pd.DataFrame], Tables]"]):
    """By kind of study: from its rows to tables. The main one is `summary`, save for single prompts (`map`, `words`)."""

    def __getitem__(self, kind: str) -> "Callable[[pd.DataFrame], Tables]":
        return STUDIES[kind].tabulate

    def __iter__(self) -> Iterator[str]:
        return (name for name, study in STUDIES.items() if study.asked != "suites")

    def __len__(self) -> int:
        return sum(1 for _ in self)
