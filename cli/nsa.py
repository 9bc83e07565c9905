"""`anchors nsa`: train models with Native Sparse Attention, and look inside them."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from anchors.cli import common, nsa_bench
from anchors.cli.common import out as console
from anchors.cli.tables import Grid
from anchors.cli.verb import add_verbs
from anchors.errors import AnchorsError

if TYPE_CHECKING:
    from anchors.nsa.config import NSAConfig
    from anchors.nsa.training.data import Corpus
    from anchors.nsa.training.train import Trained, Training, Watch


class NSAVerbs(TyperGroup):
    """With the verbs of studies."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        add_verbs(self, "nsa")


app = typer.Typer(
    cls=NSAVerbs,
    help="Native Sparse Attention: train small models and look inside them.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_show_locals=False,
)
app.command("bench")(nsa_bench.bench)


@app.command("train")
def train(
    out: Annotated[
        Path, common.option("Output", "Folder of the model; the same command goes on there.", "--out", "-o")
    ],
    attention: Annotated[str, common.option("Model", "nsa or full.")] = "nsa",
    layers: Annotated[int, common.option("Model", "Layers.", min=1)] = 6,
    width: Annotated[int, common.option("Model", "Size of the residual stream.", min=1)] = 256,
    hidden: Annotated[
        int | None, common.option("Model", "Size of the MLPs; twice the width by default.", min=1)
    ] = None,
    heads: Annotated[int, common.option("Model", "Query heads.", min=1)] = 4,
    groups: Annotated[
        int | None, common.option("Model", "Key-value heads; half the query heads by default.", min=1)
    ] = None,
    head_dim: Annotated[
        int | None, common.option("Model", "Size of a head; width / heads by default.", min=1)
    ] = None,
    rope_theta: Annotated[float, common.option("Model", "Base of the rotary embedding.")] = 10000.0,
    bias: Annotated[
        bool, common.option("Model", "Biases in the projections of attention.", "--bias")
    ] = False,
    init: Annotated[float, common.option("Model", "Standard deviation of new weights.")] = 0.02,
    l: Annotated[int, common.option("NSA", "Tokens of a compression block.", "--l")] = 32,
    d: Annotated[int, common.option("NSA", "Stride of the compression blocks.", "--d")] = 16,
    lp: Annotated[int, common.option("NSA", "Tokens of a selection block, l'.", "--lp")] = 64,
    n: Annotated[int, common.option("NSA", "Selected blocks, those that always are included.", "--n")] = 16,
    w: Annotated[int, common.option("NSA", "Tokens of the sliding window.", "--w")] = 512,
    n_init: Annotated[int, common.option("NSA", "First blocks, always selected.")] = 1,
    n_local: Annotated[int, common.option("NSA", "Last blocks, always selected.")] = 2,
    phi: Annotated[
        str, common.option("NSA", "How keys and values are compressed: mean, linear or mlp.")
    ] = "mlp",
    backend: Annotated[str, common.option("NSA", "auto, reference or triton.")] = "auto",
    text: Annotated[
        Path | None,
        common.option("Data", "Train on windows of this text file instead of episodes.", "--text"),
    ] = None,
    tokenizer: Annotated[
        str | None, common.option("Data", "For --text: directory or hub id; a token per byte by default.")
    ] = None,
    tokens: Annotated[int, common.option("Data", "Length of a sequence.", "--tokens", "-T", min=2)] = 1024,
    classes: Annotated[
        str, common.option("Data", "Classes of an episode: a number, or a range as 4-8.")
    ] = "4-8",
    words: Annotated[str, common.option("Data", "Words of a text: a number or a range.")] = "5-8",
    keywords: Annotated[int, common.option("Data", "Words that make a class.", min=1)] = 4,
    keyword_rate: Annotated[
        float, common.option("Data", "Share of a text's words that are its class's.")
    ] = 0.5,
    burstiness: Annotated[
        float, common.option("Data", "Probability that a text has the class of one of the last ones.")
    ] = 0.0,
    recent: Annotated[int, common.option("Data", "How many texts back that one may stand.", min=1)] = 8,
    skew: Annotated[float, common.option("Data", "Zipf exponent of the classes' frequencies.")] = 0.0,
    label_words: Annotated[int, common.option("Data", "Words that can name a class.")] = 32,
    vocabulary: Annotated[int, common.option("Data", "Words that texts are made of.")] = 256,
    steps: Annotated[int, common.option("Optimisation", "Steps.", min=1)] = 2000,
    batch: Annotated[int, common.option("Optimisation", "Sequences per step.", "--batch", "-b", min=1)] = 32,
    lr: Annotated[float, common.option("Optimisation", "Highest learning rate.")] = 1e-3,
    last_lr: Annotated[float, common.option("Optimisation", "Share of it that is left at the end.")] = 0.1,
    warmup: Annotated[int, common.option("Optimisation", "Steps of warm-up.", min=0)] = 100,
    weight_decay: Annotated[float, common.option("Optimisation", "On matrices.")] = 0.1,
    clip: Annotated[float, common.option("Optimisation", "Longest gradient.")] = 1.0,
    text_weight: Annotated[
        float, common.option("Optimisation", "Weight of the tokens that are no label words, in episodes.")
    ] = 0.1,
    begin: Annotated[
        Path | None,
        common.option("Optimisation", "Folder of a model to begin with, for a curriculum.", "--from"),
    ] = None,
    seed: Annotated[int, common.option("Optimisation", "Of weights and data.", min=0)] = 0,
    grow: Annotated[
        float,
        common.option(
            "Optimisation", "Share of the steps in which episodes grow from easy to what is asked."
        ),
    ] = 0.4,
    device: common.Device = "auto",
    every: Annotated[int, common.option("Output", "Steps between rows of the log.", min=1)] = 20,
    evaluate: Annotated[int, common.option("Output", "Steps between evaluations.", min=1)] = 200,
    save: Annotated[int, common.option("Output", "Steps between checkpoints.", min=1)] = 500,
    held_out: Annotated[int, common.option("Output", "Held-out sequences of an evaluation.", min=1)] = 64,
    half: Annotated[bool, common.option("Output", "Publish the weights in bfloat16.", "--half")] = False,
    as_json: Annotated[bool, common.option("Output", "Print the result as JSON.", "--json")] = False,
) -> None:
    """Train a small causal model, with NSA or full attention, on episodes of few-shot classification or on a text.

    Every episode has classes, keywords and label words of its own, so nothing can be learnt by heart. Run the same
    command again to go on after a break. Several GPUs: accelerate launch --num_processes 2 $(which anchors) nsa train …; each
    takes its share of every batch, and the curve is the same.
    """
    given = dict(locals())
    with common.reporting():
        _train(given)


@app.command("curves")
def curves(
    folders: Annotated[list[Path], typer.Argument(help="Folders of trainings.")],
    out: Annotated[Path, common.option("Output", "The figure, without its ending.", "--out", "-o")] = Path(
        "results/nsa/curves"
    ),
) -> None:
    """Draw the logs of several trainings together: full beside NSA attention, the seeds of each as a band."""
    with common.reporting():
        import pandas as pd

        from anchors.study.results import read_rows, write_table

        logs, read, alike = [], {}, {}
        for folder in folders:
            log, facts = read_rows(
                folder / "training" / "log.parquet",
                ("step", "split", "metric", "bucket", "value"),
                ("step", "value"),
                dict.fromkeys(("model", "data", "recipe"), dict),
            )
            if "attention" not in facts["model"] or "seed" not in facts["recipe"]:
                raise AnchorsError(
                    f"The log in {str(folder)!r} is not one of `anchors nsa train`.",
                    "Train again.",
                    code="file-unreadable",
                )
            name, seed = f"{facts['model']['attention']} attention", facts["recipe"]["seed"]
            recipe = {**facts, "recipe": {k: v for k, v in facts["recipe"].items() if k != "seed"}}
            for other in alike.setdefault(name, {}):
                _demand_alike(name, folder, recipe, other, alike[name][other], seed)
            alike[name][folder] = (seed, recipe)
            logs.append(log.assign(run=name, seed=seed))
            read[str(folder)] = facts
        table = pd.concat(logs, ignore_index=True)
        from anchors.figures.nsa_train import draw
        from anchors.figures.style import save

        write_table(out.with_suffix(".parquet"), table, {"runs": read})
        common.print_files([out.with_suffix(".parquet"), *save(draw({"log": table}, ""), out)])


def _demand_alike(
    name: str, folder: Path, facts: dict[str, Any], other: Path, known: tuple[int, dict[str, Any]], seed: int
) -> None:
    """The seeds of a curve are averaged: they must be of one training."""
    differ = [part for part in ("model", "data", "recipe") if facts[part] != known[1][part]]
    if differ or seed == known[0]:
        what = f"differ in their {' and '.join(differ)}" if differ else f"are both of seed {seed}"
        raise AnchorsError(
            f"{folder} and {other} are both {name}, but {what}: one curve cannot stand for both.",
            "Draw them one by one.",
            code="mixed",
        )


def _train(o: dict[str, Any]) -> None:
    spans = {name: common.span(o[name], f"--{name}") for name in ("classes", "words")}
    ranges = {name: span for name, span in spans.items() if span is not None}
    if o["tokenizer"] is not None and o["text"] is None:
        raise AnchorsError(
            "--tokenizer is for --text; episodes have words of their own.", code="options-together"
        )
    speaks = common.first_of_several()
    with common.err.status("loading torch and transformers"):
        from transformers.utils import logging as transformers_logging

        from anchors.nsa.training.train import train as trained
    transformers_logging.disable_progress_bar()
    data = _data(o, ranges)
    recipe, watch = _recipe(o)
    config = _config(o, len(data.tokenizer()))
    with common.progress_bar(f"{o['attention']} attention") as progress:
        result = trained(
            config,
            data,
            recipe,
            out=o["out"],
            init=o["begin"],
            watch=watch,
            device=o["device"],
            progress=progress,
        )
    if speaks:
        _leave(result, o)


def _data(o: dict[str, Any], ranges: dict[str, tuple[int, int]]) -> "Corpus":
    from anchors.nsa.training.data import Windows
    from anchors.nsa.training.episodes import Episodes
    from anchors.nsa.training.vocabulary import Vocabulary

    if o["text"] is not None:
        return Windows.read(o["text"], o["tokens"], o["tokenizer"])
    own = {k: o[k] for k in ("tokens", "keywords", "keyword_rate", "burstiness", "recent", "skew")}
    return Episodes(**own, **ranges, vocabulary=Vocabulary(o["label_words"], o["vocabulary"]))


def _recipe(o: dict[str, Any]) -> "tuple[Training, Watch]":
    from dataclasses import fields

    import torch

    from anchors.nsa.training.train import Training, Watch

    dtype = torch.bfloat16 if o["half"] else torch.float32
    watch = Watch(**{k: o[k] for k in ("every", "evaluate", "save", "held_out")}, dtype=dtype)
    return Training(**{f.name: o[f.name] for f in fields(Training)}), watch


def _config(o: dict[str, Any], vocabulary: int) -> "NSAConfig":
    from anchors.nsa.config import NSAConfig

    if o["head_dim"] is None and o["width"] % o["heads"]:
        raise AnchorsError(
            f"A width of {o['width']} cannot be divided among {o['heads']} heads.",
            "Give --head-dim.",
            code="geometry",
        )
    for name, option in (("init", "--init"), ("rope_theta", "--rope-theta")):
        if not 0 < o[name] < math.inf:
            raise AnchorsError(
                f"{option} {o[name]} makes no training.",
                "It must be above 0, and finite.",
                code="option-value",
            )
    if o["init"] > 1:
        raise AnchorsError(
            f"--init {o['init']} makes no training.", "Usual is 0.02, and 1 is the most.", code="option-value"
        )
    geometry = {k: o[k] for k in ("l", "d", "lp", "n", "w", "n_init", "n_local")}
    return NSAConfig(
        vocab_size=vocabulary,
        hidden_size=o["width"],
        intermediate_size=o["hidden"] or 2 * o["width"],
        num_hidden_layers=o["layers"],
        num_attention_heads=o["heads"],
        num_key_value_heads=o["groups"] or max(1, o["heads"] // 2),
        head_dim=o["head_dim"] or o["width"] // o["heads"],
        max_position_embeddings=o["tokens"],
        rope_parameters={"rope_type": "default", "rope_theta": o["rope_theta"]},
        initializer_range=o["init"],
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        attention_bias=o["bias"],
        attention=o["attention"],
        phi=o["phi"],
        backend=o["backend"],
        **geometry,
    )


def _leave(result: "Trained", o: dict[str, Any]) -> None:
    """Figure, table, names of the files."""
    from anchors.figures.nsa_train import draw
    from anchors.figures.style import save
    from anchors.study.results import plain

    name = f"{o['attention']} attention"
    files = save(
        draw({"log": result.log.assign(run=name, seed=o["seed"])}, ""), result.folder / "training" / "loss"
    )
    files = [result.folder, result.folder / "training" / "log.parquet", *files]
    if o["as_json"]:
        common.print_json({"log": plain(result.log), "files": [str(f) for f in files]} | result.facts)
        return
    console.print(_table(result, name))
    common.print_files(files)


def _table(result: "Trained", name: str) -> Grid:
    from anchors.summaries.training import held_out

    found = held_out(result.log)
    table = Grid(
        f"{name}, {found['step'].max()} steps, held-out sequences",
        caption="by number of the demonstration; knowable: share of label words that what stands before tells",
    )
    table.add_column("demonstration")
    metrics = [name for name in found if name not in ("run", "seed", "step", "demonstration")]
    for metric in metrics:
        table.add_column(metric.replace("_", " "), justify="right")
    for row in found.to_dict("records"):
        table.add_row(
            str(row["demonstration"]), *("" if row[m] != row[m] else f"{row[m]:.3f}" for m in metrics)
        )
    return table
