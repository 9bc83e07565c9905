"""`anchors inject`: put an expert language model's skill into a vision-language model, by weights alone."""

import copy
import difflib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from anchors.cli import common, inject_demo, inject_show
from anchors.cli.common import err, out
from anchors.cli.progress import GOES_ON
from anchors.cli.verb import add_verbs
from anchors.errors import AnchorsError, parsed

if TYPE_CHECKING:
    from anchors.injection.merging.checkpoint import Checkpoint
    from anchors.injection.merging.recipe import Recipe
    from anchors.injection.merging.sources import Sources

DEFAULT = "merge"
SHARD_SIZE = "1GB"


class MergeOrCommand(TyperGroup):
    """A group that merges when what follows is none of its commands, and whose help shows the merge's options, too."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        add_verbs(self, "inject")

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and not Path(args[0]).exists():
            shown = [name for name, command in self.commands.items() if not command.hidden]
            if close := difflib.get_close_matches(args[0], shown, 1, 0.7):
                ctx.fail(f"No such command {args[0]!r}. Did you mean {close[0]!r}?")
        if args and args[0] not in self.commands:
            args = ["--help"] if set(args) & set(ctx.help_option_names) else [DEFAULT, *args]
        return super().parse_args(ctx, args)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return ["VLM EXPERT --base LLM --out DIR | COMMAND ..."]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        shown, merging = copy.copy(self), self.commands[DEFAULT]
        shown.params, shown.help = merging.params, merging.help
        TyperGroup.format_help(shown, ctx, formatter)


app = typer.Typer(
    cls=MergeOrCommand,
    help="Put an expert's skill into a vision-language model, measure it, and look inside.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_show_locals=False,
)


app.command("demo")(inject_demo.demo)


@app.command(DEFAULT, hidden=True)
def merge(
    vlm: Annotated[
        str | None,
        typer.Argument(
            metavar="VLM",
            show_default=False,
            help="Vision-language model: directory or hub id, ID@REVISION for a branch, tag or commit.",
        ),
    ] = None,
    expert: Annotated[
        str | None,
        typer.Argument(
            metavar="EXPERT",
            show_default=False,
            help="Language model with the skill, or a LoRA folder that makes one: the same.",
        ),
    ] = None,
    base: Annotated[
        str | None,
        common.option(
            "Models",
            "Language model that both were made from: the same. A LoRA folder may name it itself.",
            "--base",
            "-b",
        ),
    ] = None,
    method: Annotated[
        str,
        common.option("Method", "How task vectors become one tower; `--method help` lists all.", "--method"),
    ] = "task-arithmetic",
    strength: Annotated[
        float | None,
        common.option(
            "Method",
            "λ_e, of the expert's task vector; default: the method's own, 1 for most.",
            "--strength",
            "-s",
        ),
    ] = None,
    vlm_strength: Annotated[
        float, common.option("Method", "λ_v, of the vision-language model's task vector.", "--vlm-strength")
    ] = 1.0,
    density: Annotated[
        float | None,
        common.option(
            "Method", "Share of a task vector that is kept; default: the method's own.", min=0, max=1
        ),
    ] = None,
    seed: Annotated[int, common.option("Method", "Of random masks.", min=0)] = 0,
    option: Annotated[
        list[str] | None,
        common.option(
            "Method", "The method's own, e.g. convention=paper or rescale=none; may be repeated.", "--option"
        ),
    ] = None,
    layers: Annotated[
        str | None,
        common.option(
            "Where", "Inject only there, e.g. 8-15; norm, embedding and head then stay.", "--layers"
        ),
    ] = None,
    per_layer: Annotated[
        str | None,
        common.option(
            "Where",
            "λ_e of each layer: numbers with commas, or a file of them; the rest then takes --strength, 0 unless given.",
            "--per-layer",
            metavar="LIST",
        ),
    ] = None,
    embeddings: Annotated[
        str,
        common.option(
            "Where",
            "keep (the VLM's embedding and head), shared-rows (merge rows of equal number) or by-token "
            "(rows of equal token string).",
            "--embeddings",
        ),
    ] = "keep",
    to: Annotated[
        Path | None, common.option("Output", "Folder of the merged model; must not be there.", "--out", "-o")
    ] = None,
    inspect: Annotated[
        bool, common.option("Output", "Only compare the task vectors by layer; write nothing.", "--inspect")
    ] = False,
    dry_run: Annotated[
        bool,
        common.option(
            "Output", "Only show what belongs to what and what would change; write nothing.", "--dry-run"
        ),
    ] = False,
    shard_size: Annotated[
        str, common.option("Output", "Largest file of weights, e.g. 500MB.", "--shard-size")
    ] = SHARD_SIZE,
    force: Annotated[
        bool,
        common.option("Output", "Merge even models that look unrelated to --base.", "--force"),
    ] = False,
    as_json: Annotated[
        bool, common.option("Output", "Print what was found or done as JSON.", "--json")
    ] = False,
) -> None:
    """Put an expert's skill into a vision-language model by merging its weights into the language tower.

    Task vectors τ_v = VLM − LLM and τ_e = EXPERT − LLM are combined, LLM being the model that both were made from
    (--base). Tensors are streamed from safetensors to safetensors, in float32 arithmetic; a broken-off merge goes on
    where it was. Nothing is written unless every tensor of the language models is found exactly once in the tower, with
    its shape, and unless both came from --base. Look at --inspect first: it warns of what is less plain.
    """
    with common.reporting():
        if method == "help":
            _methods(as_json)
            return
        named = base or ((expert and (Path(expert) / "adapter_config.json").is_file()) or None)
        missing = {"VLM": vlm, "EXPERT": expert, "--base": named, "--out": to or inspect or dry_run or None}
        absent = [name for name, value in missing.items() if value is None]
        if vlm is None or expert is None or absent:
            raise AnchorsError(
                f"{' and '.join(absent)} must be given.",
                "For example: anchors inject VLM EXPERT --base LLM --out DIR; anchors inject --help lists all.",
                code="option-value",
            )
        if inspect and dry_run:
            raise AnchorsError(
                "--inspect and --dry-run are two different things.",
                "Give one of them.",
                code="options-together",
            )
        with err.status("loading torch"):
            from anchors.injection.merging.base import require_base
            from anchors.injection.merging.recipe import Recipe
            from anchors.injection.merging.sources import Sources
        recipe = Recipe(
            method=method,
            strength=strength,
            vlm_strength=vlm_strength,
            density=density,
            seed=seed,
            layers=None if layers is None else common.span(layers, "--layers"),
            per_layer=None if per_layer is None else _numbers(per_layer),
            embeddings=embeddings,
            options=tuple(_pair(text) for text in option or ()),
        )
        with err.status("opening the models"):
            below = None if base is None else _opened(base)
            models = _opened(vlm), _opened(expert, below, expert=True), below
            sources = Sources.open(*models, embeddings=embeddings if dry_run else "keep")
            models = models[0], models[1], sources.base
        recipe.require_depth(sources.n_layers)
        if inspect:
            if to is not None or shard_size != SHARD_SIZE:
                common.print_notes(["--inspect writes nothing: --out and --shard-size are for merging."])
            _inspect(models, recipe, as_json)
            return
        if dry_run:
            if not force:
                require_base(sources)
            common.print_notes(list(sources.expert.notes))
            _dry_run(sources, recipe, as_json)
        elif to is not None:
            _merge(models, recipe, to, shard_size, force, as_json)


def _opened(source: str, base: "Checkpoint | None" = None, expert: bool = False) -> "Checkpoint":
    """A directory, a hub id, or a hub id with a revision; an expert may be an adapter of a base."""
    from anchors.injection.merging.adapter import open_expert
    from anchors.injection.merging.checkpoint import Checkpoint

    name, at, revision = source.rpartition("@")
    if not at or Path(source).is_dir():
        name, revision = source, None
    return open_expert(name, base, revision) if expert else Checkpoint.open(name, revision)


def _numbers(text: str) -> tuple[float, ...]:
    """Numbers with commas, or in a file with commas or spaces between them (JSON lists, too)."""
    path = Path(text)
    try:
        listed = path.read_text(encoding="utf-8") if path.is_file() else text
        return tuple(float(word) for word in re.split(r"[\s,]+", listed.strip(" \t\r\n[],")))
    except (ValueError, OSError) as error:
        raise AnchorsError(
            f"--per-layer {text!r} is neither a list of numbers nor a file of them: {error}.",
            "For example: --per-layer 0,0,0.5,1",
            code="option-value",
        ) from error


def _pair(text: str) -> tuple[str, Any]:
    """`name=value`, the value as JSON where it is JSON."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise AnchorsError(
            f"--option {text!r} is not of the form name=value.",
            "For example: convention=paper",
            code="option-value",
        )
    try:
        return name, parsed(value)
    except ValueError:
        return name, value


def _merge(
    models: "tuple[Checkpoint, ...]", recipe: "Recipe", to: Path, shard_size: str, force: bool, as_json: bool
) -> None:
    from anchors.injection.merging.merge import merge as stream

    with common.progress_bar("tensors", "finished files of weights are kept; " + GOES_ON + ".") as progress:
        report = stream(
            *models,
            recipe,
            to,
            shard_size=shard_size,
            force=force,
            report=lambda done, total, _: progress(done, total),
        )
    common.print_notes(list(report.notes))
    if as_json:
        from anchors.study.results import plain

        facts = ("changed", "kept", "relative", "seconds", "memory")
        common.print_json(
            {"out": str(report.out), "recipe": recipe.as_dict()}
            | {name: getattr(report, name) for name in facts}
            | {"modules": plain(report.by_module())}
        )
        return
    out.print(inject_show.changes(report))
    common.print_files([report.out])


def _dry_run(sources: "Sources", recipe: "Recipe", as_json: bool) -> None:
    rows = inject_show.plan(sources, recipe)
    kept = [name for name in sources.vlm.apart.shapes if name not in sources.pairs]
    if as_json:
        common.print_json({"recipe": recipe.as_dict(), "tower": rows, "kept": kept})
        return
    out.print(inject_show.plan_table(rows, recipe))
    changing = sum(row["change"] != "no" for row in rows)
    err.print(
        f"{changing} of the {len(rows)} tensors of the tower would change; {len(kept)} outside it stay. "
        "Nothing was written."
    )


def _inspect(models: "tuple[Checkpoint, ...]", recipe: "Recipe", as_json: bool) -> None:
    from anchors.injection.merging.inspection import inspect as compare

    with common.progress_bar("tensors", "nothing is kept; --inspect begins anew.") as progress:
        found = compare(
            *models, embeddings=recipe.embeddings, report=lambda done, total, _: progress(done, total)
        )
    if as_json:
        import pandas as pd

        from anchors.study.results import plain

        tables = {name: plain(getattr(found, name)) for name in ("layers", "rows")}
        common.print_json(
            tables | {"total": plain(pd.DataFrame([found.total]))[0], "warnings": list(found.warnings)}
        )
        return
    out.print(inject_show.inspection(found, f"{models[0].name}, {models[1].name}"))
    for warning in found.warnings:
        err.print(f"[yellow]warning:[/] {escape(warning)}")


def _methods(as_json: bool) -> None:
    with err.status("loading torch"):
        from anchors.injection.merging.methods import METHODS
    if as_json:
        common.print_json(
            {
                name: {"strength": own.strength, "parameters": dict(own.defaults), "source": own.source}
                for name, own in METHODS.items()
            }
        )
        return
    out.print(inject_show.methods(METHODS))
