"""`anchors nsa bench`: how fast native sparse attention is, beside full attention and other implementations."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from anchors.cli import common, setting
from anchors.cli.common import out
from anchors.cli.tables import Grid

if TYPE_CHECKING:
    import pandas as pd


def bench(
    tokens: Annotated[
        str, typer.Option(help="Lengths of text, with commas.")
    ] = "4096,8192,16384,32768,65536",
    shapes: Annotated[
        str, typer.Option(help="Heads and widths, with semicolons, e.g. '64/4 D128; 32/8 D128'.")
    ] = "64/4 D128",
    patterns: Annotated[
        str, typer.Option(help="Which blocks are selected: chosen, random, shared, hot; with commas.")
    ] = "chosen,random,shared,hot",
    implementations: Annotated[
        str | None,
        typer.Option(
            help="Of ours, sdpa-flash, sdpa-cudnn, flash-3, flash-4, flex, fla, xunhaolai, scalable-flash-nsa, cudnn-nsa, eager; all by default."
        ),
    ] = None,
    l: Annotated[int, typer.Option("--l", help="Tokens of a compression block.")] = 32,
    d: Annotated[int, typer.Option("--d", help="Stride of the compression blocks.")] = 16,
    lp: Annotated[int, typer.Option("--lp", help="Tokens of a selection block, l'.")] = 64,
    n: Annotated[int, typer.Option("--n", help="Selected blocks.")] = 16,
    w: Annotated[int, typer.Option("--w", help="Tokens of the sliding window.")] = 512,
    backward: Annotated[bool, typer.Option(help="Gradients, too.")] = True,
    decode: Annotated[
        bool, typer.Option(help="One-token decoding under CUDA graphs, too; of the first shape.")
    ] = True,
    batches: Annotated[str, typer.Option(help="Batch sizes of decoding, with commas.")] = "1,4,16,64",
    repeats: Annotated[int, typer.Option(min=1, help="Turns that count; the median is taken.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Of the tensors.")] = 0,
    to: Annotated[Path, typer.Option("--out", "-o", help="Folder of the tables.")] = Path(
        "results/nsa-bench"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print the tables as JSON.")] = False,
) -> None:
    """Time NSA against full attention and its peers, in one process on one CUDA GPU, each beside its error.

    What disagrees with the equations is not timed, but named. Rows are written as they come.
    """
    with common.reporting():
        from anchors.nsa.geometry import Geometry
        from anchors.nsa.speed import bench as benchmark
        from anchors.study.results import plain, require_writable

        require_writable(to)
        geometry = Geometry(l, d, lp, n, w)
        lengths, names = setting.numbers(tokens, "--tokens"), tuple(s.strip() for s in shapes.split(";"))
        chosen = (
            tuple(benchmark.IMPLEMENTATIONS)
            if implementations is None
            else common.words(implementations, "--implementations")
        )
        say = common.err.print
        tables = {
            "nsa-bench": benchmark.bench(
                names,
                lengths,
                common.words(patterns, "--patterns"),
                chosen,
                backward=backward,
                say=say,
                geometry=geometry,
                repeats=repeats,
                seed=seed,
                out=to,
            )
        }
        if decode:
            sizes = setting.numbers(batches, "--batches")
            tables["nsa-decode"] = benchmark.bench_decode(
                names[0], lengths, sizes, say=say, geometry=geometry, repeats=repeats, out=to
            )
        from anchors.figures.nsa_bench import draw
        from anchors.figures.style import save

        files = [to / f"{name}.parquet" for name in tables]
        if tables["nsa-bench"]["ms"].notna().any():
            files += save(draw(tables["nsa-bench"], names[0]), to / "nsa-bench")
        if as_json:
            common.print_json({name: plain(table) for name, table in tables.items()})
            return
        for name, table in tables.items():
            out.print(_shown(name, table))
        common.print_files(files)


COLUMNS = (
    "implementation", "part", "direction", "tokens", "batch", "pattern", "ms", "us", "iqr", "tflops", "gigabytes",
    "error", "deterministic",
)  # fmt: skip


def _shown(name: str, table: "pd.DataFrame") -> Grid:
    noted = table.to_dict("records") if "note" in table else []
    notes = [f"{row['implementation']}, {row['part']}: {row['note']}" for row in noted if row["note"]]
    shown = Grid(name, caption="\n".join(dict.fromkeys(notes)), keys=4)
    columns = [column for column in COLUMNS if column in table]
    for column in columns:
        shown.add_column(column)
    for row in table[columns].itertuples(index=False):
        cells = ["" if x != x or x is None else f"{x:.3g}" if isinstance(x, float) else str(x) for x in row]
        shown.add_row(*(escape(cell) for cell in cells))
    return shown
