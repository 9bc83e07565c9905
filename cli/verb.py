"""The verb of a study, derived from its line in the registry and the fields of its settings."""

import inspect
from collections.abc import Iterable, Iterator
from copy import copy
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup

from anchors.cli import common
from anchors.cli.common import out
from anchors.cli.options import Option, options_of
from anchors.cli.setting import SETTINGS, Always
from anchors.errors import AnchorsError
from anchors.study.docstring import prose
from anchors.study.registry import BUILT_IN, Study, plugins, study

if TYPE_CHECKING:
    from rich.console import RenderableType

    from anchors.study.analysis import Analysis
    from anchors.study.prompted import Prompted
    from anchors.study.report import Report


class Verb(TyperCommand):
    """A study's verb. Its settings are imported when it is called, not when verbs are listed."""

    def __init__(self, line: Study) -> None:
        super().__init__(name=line.command.split()[-1], help=escape(line.help), rich_markup_mode="rich")
        self.line = line

    @cached_property
    def whole(self) -> TyperCommand:
        """The command with its options."""
        alone = typer.Typer(add_completion=False)
        alone.command(self.name, help=escape(_help(self.line)))(command_of(self.line))
        return cast(TyperCommand, typer.main.get_command(alone))

    def make_context(self, info_name: str | None, args: list[str], *given: Any, **more: Any) -> Any:
        with common.reporting():
            whole = self.whole
        return whole.make_context(info_name, args, *given, **more)


def add_verbs(group: TyperGroup, name: str = "") -> None:
    """Put the verbs of studies of a group before the others."""
    verbs = [Verb(line) for line in BUILT_IN.values() if line.verb and not line.within and line.group == name]
    group.commands = {str(verb.name): verb for verb in verbs} | dict(group.commands)


class Verbs(TyperGroup):
    """Verbs of studies before the others, those that other packages bring after them."""

    def __init__(self, *, commands: dict[str, Any], **more: Any) -> None:
        super().__init__(commands=commands, **more)
        add_verbs(self)
        self.complete = False

    def list_commands(self, ctx: Any) -> list[str]:
        self.add_plugins()
        return list(self.commands)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in self.commands:
            self.add_plugins()
        return super().get_command(ctx, cmd_name)

    def add_plugins(self) -> None:
        """Add the verbs of other packages, once; of those that cannot be used, say why."""
        if self.complete:
            return
        self.complete = True
        found, refused = plugins()
        taken = {
            name: f"The study {name!r} of {line.home} has no verb: there is another one of that name."
            for name, line in found.items()
            if line.verb and name in self.commands
        }
        common.print_notes([*refused.values(), *taken.values()])
        self.commands.update(
            {n: Verb(line) for n, line in found.items() if line.verb and n not in self.commands}
        )


def _help(line: Study) -> str:
    return f"{line.help}\n\n{prose(line.resolve(line.settings))}".replace("`", "")


def command_of(line: Study) -> Any:
    """The function of a verb: options of the study, of what is shown, and of every measurement of prompts.

    Raises:
        AnchorsError: a setting that cannot be an option, or whose option every verb has.
    """
    own = options_of(line.resolve(line.settings))
    view = options_of(line.resolve(line.view), "Output") if line.view else []
    kind = SETTINGS[line.asked]
    places = inspect.signature(kind).parameters.values()
    last = inspect.signature(Always).parameters
    shared = [_shared(line, place) for place in sorted(places, key=lambda p: p.name in last)]
    inner = next((one for one in BUILT_IN.values() if one.within == line.name), None)
    theirs = [] if inner is None else options_of(inner.resolve(inner.settings), "Any prompts")
    _refuse_doubles(line, [*own, *theirs, *view], shared)

    def command(**given: Any) -> None:
        with common.reporting():
            common.demand_bounded(given)
            other = {o.field: o.read(given.pop(o.field)) for o in theirs}
            if inner is not None and any(value is not None for value in other.values()):
                usual = {place.name: place.default for place in (*shared, *(o.parameter for o in view))}
                _measure_within(inner, other, given, usual)
                return
            setting = kind(**{p.name: given.pop(p.name) for p in shared})
            settings, seen = ({o.field: o.read(given.pop(o.field)) for o in part} for part in (own, view))
            look = line.resolve(line.view)(**seen) if line.view else None
            measure(line, setting, _analyses(line, settings, beside=any(given.values())), look)

    every = [*(o.parameter for o in (*own, *theirs)), *_beside(line)]
    every += [*(o.parameter for o in view), *shared]
    vars(command)["__signature__"] = inspect.Signature(every)
    command.__annotations__ = {p.name: p.annotation for p in every}
    command.__name__ = line.name.replace("-", "_")
    return command


def _measure_within(
    line: Study, settings: dict[str, Any], given: dict[str, Any], usual: dict[str, Any]
) -> None:
    """Measure a study by another one's verb.

    Args:
        line: the study.
        settings: its own.
        given: the verb's other options, of which it takes those that it knows.
        usual: their defaults.

    Raises:
        AnchorsError: an option is given that the study does not take.
    """
    kind = SETTINGS[line.asked]
    taken = inspect.signature(kind).parameters
    view = options_of(line.resolve(line.view), "Output") if line.view else []
    seen = {o.field: o.read(given.pop(o.field)) for o in view}
    if lost := [name for name in given if name not in taken and given[name] != usual[name]]:
        raise AnchorsError(
            f"--{lost[0].replace('_', '-')} is not for `anchors {line.command}`.",
            "Leave it out.",
            code="options-together",
        )
    setting = kind(**{name: value for name, value in given.items() if name in taken})
    look = line.resolve(line.view)(**seen) if line.view else None
    measure(line, setting, [line.make(**settings)], look)


def _shared(line: Study, place: inspect.Parameter) -> inspect.Parameter:
    """An option of every measurement, with this study's default and name."""
    how = copy(place.annotation.__metadata__[0])
    how.help = how.help.replace("@task", line.task).replace("@folder", line.folder)
    return place.replace(
        default=line.examples if place.name == "examples" else place.default,
        kind=inspect.Parameter.KEYWORD_ONLY,
        annotation=Annotated[place.annotation.__origin__, how],
    )


def _beside(line: Study) -> list[inspect.Parameter]:
    """The option that refuses what is measured beside a study."""
    if line.beside is None:
        return []
    name, said = line.beside
    how = typer.Option(f"--{name}/--no-{name}", help=escape(said))
    return [
        inspect.Parameter(
            f"beside_{name}", inspect.Parameter.KEYWORD_ONLY, default=True, annotation=Annotated[bool, how]
        )
    ]


def _refuse_doubles(line: Study, own: Iterable[Option], shared: Iterable[inspect.Parameter]) -> None:
    everywhere = {"--help", "-h"}
    for place in shared:
        named = place.annotation.__metadata__[0].param_decls
        everywhere |= {*named} if named else {"--" + place.name.replace("_", "-")}
        everywhere.add(place.name)
    for option in own:
        if twice := everywhere & {option.field, *option.names}:
            raise AnchorsError(
                f"The study {line.name!r} of {line.home} has a setting {min(twice)!r}, as every verb has.",
                'Give the field another name, or the metadata {"option": ...}.',
                code="study",
            )


def _analyses(line: Study, settings: dict[str, Any], *, beside: bool) -> "list[Analysis]":
    """The study with its settings, and what is measured beside it, with those that both have."""
    main = line.make(**settings)
    if not beside or line.beside is None:
        return [main]
    other = study(line.beside[0])
    common_fields = {f.name for f in fields(main)} & {f.name for f in fields(other.resolve(other.settings))}
    return [main, other.make(**{name: getattr(main, name) for name in common_fields})]


def measure(line: Study, setting: Any, studies: "list[Analysis]", view: Any) -> None:
    """Measure and print, or tell what is left to do."""
    from anchors.study.results import require_writable

    folder = setting.out or Path("results") / line.folder
    require_writable(folder)
    inquiry = setting.inquiry(line, studies)
    from anchors.study.prompted import steps_ahead, until_narrow

    width = getattr(setting, "until_width", None)  # only settings of prompts have this option
    if setting.dry_run:
        common.print_outlook({line.name: inquiry.outlook(folder)}, as_json=setting.as_json)
        if width:
            common.print_notes([steps_ahead(cast("Prompted", inquiry), width)])
        return
    from anchors.study.report import conclude

    look = {} if view is None else view.of(inquiry.model)
    with setting.elsewhere(inquiry) as inquiry, common.progress_bar(line.units) as progress:
        enough = []
        if width:
            inquiry, told = until_narrow(cast("Prompted", inquiry), width, folder, progress)
            enough = [told]
        result = conclude(inquiry, out=folder, csv=setting.csv, progress=progress, said=enough, **look)
    common.print_notes(result.notes)
    if setting.as_json:
        common.print_json(result.as_json())
        return
    for part in line.resolve(line.shown)(result, view) if line.shown else plainly_shown(line, result):
        out.print(part, markup=not isinstance(part, str))
    for told in (*line.legend(result.tables), *result.sentences):
        out.print(told, markup=False)
    common.print_files(result.files)


def plainly_shown(line: Study, result: "Report") -> "Iterator[RenderableType]":
    """Of every task, the metrics that the study's line names: by condition, and by layer where they have layers."""
    for task, part in result.tables["summary"].groupby("task", sort=False):
        title = f"{line.title or line.name}: {task}, {result.title}, {part['examples'].iloc[0]} examples"
        part = part[part["metric"].isin(line.metrics)]
        layered = part["layer"].notna()
        if not layered.all():
            whole = part[~layered]
            yield common.summary_table(whole, [m for m in line.metrics if m in set(whole["metric"])], title)
        if layered.any():
            yield common.layer_table(part[layered], title)
