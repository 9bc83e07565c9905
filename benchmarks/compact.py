"""Results as they are committed: rows without what no table reads, in few bytes; pictures in few colours; tables whole.

    uv run benchmarks/compact.py experiments/results/figure3/MODEL …        # folders of results, or pictures; in place

Of rows, values of prompts are kept to 11 bits (a relative error of 2⁻¹¹ at the most; those of `diagnose`, whose ranks decide, whole), as float32 whose bytes are stored apart, zstd; names
as dictionaries; and rows of the same number lie together. Before a file is replaced its tables are made anew from it, and no number
of theirs may be farther from what it was than `FAR`, or a twentieth of its interval's width where that is more. Pictures keep their size and what they say of themselves.
"""

import argparse
import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, PngImagePlugin

from anchors.collection import Results, gather
from anchors.stats import PLACE
from anchors.study.results import METADATA_KEY, read_table, write_atomic, write_table

BITS, FAR, COLOURS = 11, 5e-3, 64
UNREAD = {
    "flow": ("tokens", "identity_error", "probability/", "gold", "predicted"),
    "causal": ("follow", "shift"),
}
"""Metrics that no table reads, by kind of rows; a name that ends in / stands for all that begin with it."""
UNREAD_WHEN_CHANGED = ("probability/", "gold", "predicted")
"""Likewise under every condition but `none`."""
WHOLE, SORTED = ("diagnose",), ("flow", "isolate", "readout", "compress", "causal", "classify")
"""Kinds whose values are not rounded, and those whose rows may lie in another order."""
CHANGES = ("isolate", "compress", "causal")
"""Kinds whose other conditions are changes of the same prompts."""


def rounded(values: np.ndarray, bits: int = BITS) -> np.ndarray:
    """Values to so many bits, as float32."""
    mantissa, exponent = np.frexp(values.astype(np.float64))
    return np.ldexp(np.round(np.ldexp(mantissa, bits)), exponent - bits).astype(np.float32)


def needed(rows: pd.DataFrame, kind: str) -> pd.DataFrame:
    """The rows that some table reads, those of the same number together where order tells nothing."""
    names = pd.Series(rows["metric"].unique())

    def among(unread: tuple[str, ...]) -> set[str]:
        return {n for n in names if any(n == u or (u.endswith("/") and n.startswith(u)) for u in unread)}

    prompt, metric = rows["number"] >= 0, rows["metric"]
    gone = prompt & metric.isin(among(UNREAD.get(kind, ())))
    if kind in CHANGES:
        gone |= prompt & (rows["condition"] != "none") & metric.isin(among(UNREAD_WHEN_CHANGED))
    kept = rows[~gone]
    if kind not in SORTED:
        return kept.reset_index(drop=True)
    first = [name for name in PLACE if name in kept and name not in ("seed", "number")]
    order = pd.DataFrame({name: pd.factorize(kept[name])[0] for name in (*first, "seed")})
    place = order.sort_values([*first, "seed"], kind="stable").index
    return kept.iloc[place].reset_index(drop=True)


def packed(rows: pd.DataFrame, facts: dict, kind: str) -> bytes:
    """A table of rows as it is stored."""
    values = rows["value"].to_numpy().astype(np.float32)
    few = (rows["number"] >= 0).to_numpy() & (kind not in WHOLE)
    small = rows.assign(value=np.where(few, rounded(values), values))
    table = pa.Table.from_pandas(small, preserve_index=False)
    text = json.dumps(facts, indent=1, ensure_ascii=False).encode()
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), METADATA_KEY: text})
    buffer = BytesIO()
    pq.write_table(
        table,
        buffer,
        compression="zstd",
        compression_level=19,
        use_dictionary=[name for name in table.column_names if name != "value"],
        column_encoding={"value": "BYTE_STREAM_SPLIT"},
    )
    return buffer.getvalue()


def farthest(before: dict[str, pd.DataFrame], after: dict[str, pd.DataFrame]) -> float:
    """How far any number of some tables is from what it was, in shares of how far it may be; rows may lie in another order.

    Raises:
        ValueError: another table, row or column, or a number that is missing in one of them alone.
    """
    found = 0.0
    for name, one in before.items():
        other = after[name]
        if list(one.columns) != list(other.columns) or len(one) != len(other):
            raise ValueError(f"The table {name} has other rows or columns.")
        numbers = one.select_dtypes("number").columns
        words = [column for column in one if column not in numbers]
        place = [*words, *(column for column in ("shots", "layer", "seed") if column in numbers)]
        one, other = (
            table.sort_values(place, key=lambda column: column.astype(str), kind="stable", ignore_index=True)
            for table in (one, other)
        )
        if not one[words].astype(str).equals(other[words].astype(str)):
            raise ValueError(f"The table {name} names other things.")
        gap = one[numbers].astype(float).to_numpy() - other[numbers].astype(float).to_numpy()
        if (one[numbers].isna().to_numpy() != other[numbers].isna().to_numpy()).any():
            raise ValueError(f"The table {name} lacks other numbers.")
        width = (
            (one["high"] - one["low"]).fillna(0).to_numpy()
            if {"low", "high"} <= set(numbers)
            else 0 * gap[:, 0]
        )
        allowed = np.maximum(FAR, width / 20)[:, None]
        found = max(found, float(np.nanmax(np.abs(gap) / allowed, initial=0.0)))
    return found


def shrink_rows(own: Results) -> None:
    """Rows of some results, in place; what is small already stays.

    Raises:
        ValueError: a table would say something else.
    """
    read = {kind: read_table(file) for kind, file in own.files.items()}
    small = {kind: packed(needed(rows, kind), facts, kind) for kind, (rows, facts) in read.items()}
    again = {kind: pq.read_table(BytesIO(content)).to_pandas() for kind, content in small.items()}
    tables = own.tables
    if tables is None:
        raise ValueError(f"{own.folder} holds no experiment of the catalogue.")
    gap = farthest(tables({kind: rows for kind, (rows, _) in read.items()}), tables(again))
    if gap > 1:
        raise ValueError(
            f"{own.name} in {own.folder}: a number of its tables would move {gap:.2g} times too far."
        )
    for kind, content in small.items():
        before = own.files[kind].stat().st_size
        if len(content) < before:
            write_atomic(own.files[kind], lambda draft, content=content: draft.write_bytes(content))
        print(
            f"{own.files[kind]}: {before} → {own.files[kind].stat().st_size} bytes; tables move by {gap:.1e} of what they may"
        )


def forget(folder: Path, names: dict[str, str]) -> None:
    """Paths of a machine become names in the facts of all tables of a folder, in them and beside them, and in their rows."""

    def told(text: str) -> str:
        for path, name in names.items():
            text = text.replace(path, name)
        return text

    for path in sorted(folder.rglob("*.json")):
        before = path.read_text(encoding="utf-8")
        if before != (text := told(before)):
            write_atomic(path, lambda draft, text=text: draft.write_text(text, encoding="utf-8"))
    for path in sorted(folder.rglob("*.parquet")):
        table = pq.read_table(path)
        facts = (table.schema.metadata or {}).get(METADATA_KEY, b"").decode()
        if facts == told(facts):
            continue
        rows = table.to_pandas()
        if "model" in rows:
            rows = rows.assign(model=rows["model"].map({name: told(name) for name in rows["model"].unique()}))
        parsed = json.loads(told(facts))
        rest = {"seed", "number", "value"} <= set(rows)
        content = packed(rows, parsed, WHOLE[0]) if rest else None
        if content is None:
            write_table(path, rows, parsed)
        else:
            write_atomic(path, lambda draft, content=content: draft.write_bytes(content))


def shrink_picture(path: Path) -> None:
    """A picture in few colours, in place, where that is smaller."""
    picture = Image.open(path)
    told = PngImagePlugin.PngInfo()
    for key, text in picture.info.items():
        if isinstance(text, str):
            told.add_text(key, text)
    buffer = BytesIO()
    few = picture.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    few.save(buffer, "png", optimize=True, pnginfo=told, dpi=picture.info.get("dpi"))
    before = path.stat().st_size
    if len(buffer.getvalue()) < 0.9 * before:
        write_atomic(path, lambda draft: draft.write_bytes(buffer.getvalue()))
        print(f"{path}: {before} → {path.stat().st_size} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("places", type=Path, nargs="+", help="folders of results, or pictures")
    parser.add_argument(
        "--forget",
        action="append",
        default=[],
        help="PATH=NAME: a path of this machine, and what stands for it",
    )
    asked = parser.parse_args()
    folders = [place for place in asked.places if place.is_dir()]
    for place in folders:
        forget(place, dict(pair.split("=", 1) for pair in asked.forget))
    for own in gather(folders):
        shrink_rows(own)
    pictures = [place for place in asked.places if place.suffix == ".png"]
    for path in [*pictures, *(path for place in folders for path in sorted(place.rglob("*.png")))]:
        shrink_picture(path)


if __name__ == "__main__":
    main()
