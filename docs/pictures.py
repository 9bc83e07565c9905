"""The pictures of these pages, drawn from the committed rows of `experiments/`, small.

uv run python docs/pictures.py [FOLDER]
"""

import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from anchors.experiments import CATALOGUE
from anchors.figures import draw
from anchors.figures.inject_flow import draw_regret
from anchors.figures.inject_sweep import draw as draw_sweep
from anchors.study.results import read_table

HERE = Path(__file__).parent
EXPERIMENTS = HERE.parent / "experiments"
WIDTH, COLOURS = 900, 48


def catalogue(name: str) -> Figure:
    """The picture of an experiment of the catalogue."""
    experiment = CATALOGUE[name]
    read = {
        kind: read_table(EXPERIMENTS / "results" / name / f"{kind}.parquet") for kind in experiment.kinds()
    }
    tables = experiment.tables({kind: rows for kind, (rows, _) in read.items()})
    model = next(iter(read.values()))[1]["model"]
    return draw(experiment.figure, tables, model)


def tables(folder: str, stem: str) -> dict:
    """The tables `STEM_NAME.parquet` of a folder, by name."""
    found = sorted((EXPERIMENTS / folder).glob(f"{stem}_*.parquet"))
    return {path.stem.removeprefix(f"{stem}_"): read_table(path)[0] for path in found}


def regret() -> Figure:
    folder = EXPERIMENTS / "injection" / "flow"
    choices, regrets = (read_table(folder / f"flow-{name}.parquet")[0] for name in ("choices", "regret"))
    return draw_regret(choices, regrets, "four miniatures")


PICTURES: dict[str, Callable[[], Figure]] = {
    "flow": lambda: catalogue("figure3"),
    "isolation": lambda: catalogue("figure4"),
    "readout": lambda: catalogue("figure5"),
    "reweighting": lambda: catalogue("table1"),
    "compression": lambda: catalogue("table2"),
    "diagnosis": lambda: catalogue("figure6"),
    "causal": lambda: catalogue("patching"),
    "nsa": lambda: draw(
        "nsa_probe", tables("nsa/probe/nsa-0", "nsa_probe"), "the NSA model that comes along"
    ),
    "sweep": lambda: draw_sweep(tables("injection/sweep-135m", "inject_sweep"), "SmolLM2-135M with eyes")[
        "pareto"
    ],
    "inject-flow": regret,
}
"""By page: what is drawn."""


def save(figure: Figure, path: Path) -> None:
    """As a PNG of few colours."""
    full = BytesIO()
    figure.savefig(full, format="png", dpi=200)
    picture = Image.open(full).convert("RGB")
    height = round(picture.height * WIDTH / picture.width)
    small = picture.resize((WIDTH, height), Image.Resampling.LANCZOS)
    small.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in PICTURES.items():
        save(make(), folder / f"{name}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "images")
