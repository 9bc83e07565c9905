"""A sheet of every figure, and of every table that a verb prints, at 80 and at 120 columns; all from made rows.

uv run python docs/contact_sheet.py [FOLDER]
"""

import sys
from io import BytesIO
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from rich.console import Console

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))
import made_tables  # noqa: E402

WIDTH, COLUMNS, COLOURS = 720, 2, 64


def figure_sheet(figures: dict[str, Figure]) -> Image.Image:
    """All figures in columns, each put where most room is, with its name above."""
    heights, placed = [0] * COLUMNS, []
    for name, figure in figures.items():
        drawn = BytesIO()
        figure.savefig(drawn, format="png", dpi=100)
        picture = Image.open(drawn).convert("RGB")
        scale = min(1, WIDTH / picture.width)
        picture = picture.resize(
            (round(scale * picture.width), round(scale * picture.height)), Image.Resampling.LANCZOS
        )
        column = heights.index(min(heights))
        placed.append((name, picture, column * WIDTH, heights[column]))
        heights[column] += picture.height + 34
    sheet = Image.new("RGB", (COLUMNS * WIDTH, max(heights)), "white")
    pen = ImageDraw.Draw(sheet)
    for name, picture, left, top in placed:
        pen.text((left + 6, top + 4), name, fill="black", font_size=16)
        sheet.paste(picture, (left, top + 26))
    return sheet.quantize(COLOURS, dither=Image.Dither.NONE)


def table_sheet(shown: dict[str, list]) -> str:
    """What every verb prints, as it stands in a terminal of either width."""
    parts = [
        "# Every table of every verb",
        "",
        "From made rows, by `uv run python docs/contact_sheet.py`; the figures are in",
        "[one picture](contact-sheet.png).",
        "",
    ]
    for verb, printed in shown.items():
        parts += [f"## {verb}", ""]
        for width in (80, 120):
            console = Console(width=width, no_color=True, highlight=False)
            with console.capture() as caught:
                for part in printed[:4]:
                    console.print(part, markup=not isinstance(part, str))
            lines = [line.rstrip() for line in caught.get().splitlines()]
            parts += [
                f"{width} columns:",
                "",
                "```text",
                *(lines if len(lines) <= MOST else [*lines[:MOST], "…"]),
                "```",
                "",
            ]
    return "\n".join(parts)


MOST = 90
"""Lines of a verb that are shown."""


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    figure_sheet(made_tables.figures()).save(folder / "contact-sheet.png", optimize=True)
    (folder / "contact-sheet.md").write_text(table_sheet(made_tables.shown()), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
