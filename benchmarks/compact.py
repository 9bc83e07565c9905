"""Results as they are committed: rows without what no table reads, in few bytes; pictures in few colours; tables whole.

    uv run benchmarks/compact.py experiments/results/figure3/MODEL …        # folders of results, or pictures; in place

Of rows, values of prompts are kept to as few bits, from 6 to 11, as their tables allow (a relative error of 2⁻⁶ to 2⁻¹¹; those of `diagnose`, whose ranks decide, whole), as float32 whose
bytes are stored apart, zstd; names as dictionaries; rows of the same number lie together; and cells that two experiments share are kept in one of them. Before a file is replaced its tables are made anew from it, and no number
of theirs may be farther from what it was than `FAR`, or a twentieth of its interval's width where that is more. What has few bits is left as it is. Pictures keep their size and what they say of themselves.
"""

import argparse
import json
import os
import tempfile
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, PngImagePlugin

from anchors.collection import Results, gather
from anchors.stats import ENTROPY, PLACE
from anchors.study.results import ELSEWHERE, METADATA_KEY, read_table, store, write_atomic, write_table

FEWEST, BITS, FAR, COLOURS = 6, 11, 5e-3, 64
PAGE = 2**30
"""Bytes and rows of a page, so that a column is one: what repeats itself is found from its beginning to its end."""
UNREAD = {
    "flow": ("tokens", "identity_error", "probability/", "gold", "predicted"),
    "causal": ("follow", "shift"),
}
"""Metrics that no table reads, by kind of rows; a name that ends in / stands for all that begin with it."""
UNREAD_WHEN_CHANGED = ("probability/", "gold", "predicted")
"""Likewise under every condition but `none`."""
EVENNESS = "flow-shots"
"""The experiment that reads how evenly label words share in S_pq."""
WHOLE, SORTED = ("diagnose",), ("flow", "isolate", "readout", "compress", "causal", "classify")
"""Kinds whose values are not rounded, and those whose rows may lie in another order."""
GIVERS = {
    "controls": {"readout": ("figure5",)},
    "order": {"readout": ("figure5",)},
    "patching": {"flow": ("figure3", "figure7")},
}
"""By experiment and kind of rows, experiments of the same model that hold some of them, too: there they are kept."""
PLACED = ["task", "shots", "control", "seed", "number", "condition", "layer", "metric"]
CHANGES = ("isolate", "compress", "causal")
"""Kinds whose other conditions are changes of the same prompts."""


def rounded(values: np.ndarray, bits: int = BITS) -> np.ndarray:
    """Values to so many bits, as float32."""
    mantissa, exponent = np.frexp(values.astype(np.float64))
    return np.ldexp(np.round(np.ldexp(mantissa, bits)), exponent - bits).astype(np.float32)


def needed(rows: pd.DataFrame, kind: str, experiment: str) -> pd.DataFrame:
    """The rows that some table of an experiment reads, those of the same number together where order tells nothing."""
    names = pd.Series(rows["metric"].unique())

    def among(unread: tuple[str, ...]) -> set[str]:
        return {n for n in names if any(n == u or (u.endswith("/") and n.startswith(u)) for u in unread)}

    prompt, metric = rows["number"] >= 0, rows["metric"]
    gone = prompt & metric.isin(among(UNREAD.get(kind, ())))
    if experiment != EVENNESS:
        gone |= metric == ENTROPY
    if kind in CHANGES:
        gone |= prompt & (rows["condition"] != "none") & metric.isin(among(UNREAD_WHEN_CHANGED))
    kept = rows[~gone]
    if kind not in SORTED:
        return kept.reset_index(drop=True)
    first = [name for name in PLACE if name in kept and name not in ("seed", "number")]
    order = pd.DataFrame({name: pd.factorize(kept[name])[0] for name in (*first, "seed")})
    place = order.sort_values([*first, "seed"], kind="stable").index
    return kept.iloc[place].reset_index(drop=True)


def packed(rows: pd.DataFrame, facts: dict, kind: str, bits: int = BITS) -> bytes:
    """A table of rows as it is stored."""
    values = rows["value"].to_numpy().astype(np.float32)
    few = (rows["number"] >= 0).to_numpy() & (kind not in WHOLE)
    small = rows.assign(value=np.where(few, rounded(values, bits), values))
    return stored(small, facts)


def stored(rows: pd.DataFrame, facts: dict) -> bytes:
    """A parquet file, without what only queries of parts of it would read."""
    table, buffer = pa.Table.from_pandas(rows, preserve_index=False), BytesIO()
    apart = [name for name in table.column_names if pa.types.is_floating(table.schema.field(name).type)]
    categories = any(pa.types.is_dictionary(kind) for kind in table.schema.types)
    store(
        table,
        buffer,
        json.dumps(facts, separators=(",", ":"), ensure_ascii=False),
        compression="zstd",
        compression_level=19,
        use_dictionary=[name for name in table.column_names if name not in apart],
        column_encoding=dict.fromkeys(apart, "BYTE_STREAM_SPLIT"),
        data_page_size=PAGE,
        max_rows_per_page=PAGE,
        write_statistics=False,
        store_schema=categories,  # only Arrow's own schema says that words are categories
    )
    return buffer.getvalue()


def facts_of(path: Path) -> str:
    """The facts of a table, with those that `read_table` uses up."""
    return (pq.read_metadata(path).metadata or {}).get(METADATA_KEY, b"{}").decode()


def shrink_table(path: Path) -> None:
    """A table in fewer bytes, in place, with the same rows and facts."""
    rows, facts = pq.read_table(path).to_pandas(), json.loads(facts_of(path))
    content = stored(rows, facts)
    if len(content) < path.stat().st_size and rows.equals(pq.read_table(BytesIO(content)).to_pandas()):
        write_atomic(path, lambda draft: draft.write_bytes(content))


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


def has_few_bits(rows: pd.DataFrame) -> bool:
    """Whether the values of prompts have been rounded."""
    values = rows.loc[rows["number"] >= 0, "value"].to_numpy().astype(np.float32)
    return np.array_equal(rounded(values), values, equal_nan=True)


@dataclass(frozen=True)
class Held:
    """What a file holds, and what it leaves to others."""

    file: Path
    kind: str
    rows: pd.DataFrame
    facts: dict
    others: list[dict]

    def packed(self, bits: int) -> bytes:
        """As it is stored."""
        facts = self.facts | ({ELSEWHERE: self.others} if self.others else {})
        return packed(self.rows, facts, self.kind, bits)


def left(held: Held, giver: Held) -> Held:
    """Without the rows that the giver holds, too: of the same tasks, shots, controls and seeds all of them, no more, and of equal values."""
    columns = ["task", "shots", "control", "seed"]
    same = held.rows[columns].apply(tuple, axis=1).isin(set(giver.rows[columns].apply(tuple, axis=1)))
    only = {name: sorted(held.rows.loc[same, name].unique().tolist()) for name in columns}
    offered = giver.rows[
        np.logical_and.reduce([giver.rows[name].isin(values) for name, values in only.items()])
    ]
    taken, given = (rows.set_index(PLACED)["value"].sort_index() for rows in (held.rows[same], offered))
    if (
        not len(taken)
        or not taken.index.equals(given.index)
        or not np.allclose(taken, given, 2**-BITS, 0, equal_nan=True)
    ):
        return held
    other = {"file": os.path.relpath(giver.file, held.file.parent), "only": only}
    return replace(held, rows=held.rows[~same].reset_index(drop=True), others=[*held.others, other])


def shrink_rows(group: list[Results], *, again: bool) -> None:
    """Rows of results that have cells in common, in place; what has few bits only where `again`.

    Raises:
        ValueError: a table would say something else.
    """
    every = {own.name: own for own in group}
    read = {name: {kind: read_table(file) for kind, file in own.files.items()} for name, own in every.items()}
    rounded_already = [
        has_few_bits(rows)
        for kinds in read.values()
        for kind, (rows, _) in kinds.items()
        if kind not in WHOLE
    ]
    if not again and all(rounded_already):
        return
    held = {
        (name, kind): Held(every[name].files[kind], kind, needed(rows, kind, name), facts, [])
        for name, kinds in read.items()
        for kind, (rows, facts) in kinds.items()
    }
    for (name, kind), own in held.items():
        for giver in GIVERS.get(name, {}).get(kind, ()):
            if (giver, kind) in held:
                own = left(own, held[giver, kind])
        held[name, kind] = own
    tables = {
        name: own.tables({kind: rows for kind, (rows, _) in read[name].items()})
        for name, own in every.items()
    }
    root = Path(os.path.commonpath([own.folder for own in group]))
    for bits in range(FEWEST, BITS + 1):
        small = {key: own.packed(bits) for key, own in held.items()}
        with tempfile.TemporaryDirectory() as place:
            for key, content in small.items():
                draft = Path(place, "results", held[key].file.relative_to(root))
                draft.parent.mkdir(parents=True, exist_ok=True)
                draft.write_bytes(content)
            gap = max(
                farthest(
                    tables[name],
                    own.tables(
                        {
                            kind: read_table(Path(place, "results", file.relative_to(root)))[0]
                            for kind, file in own.files.items()
                        }
                    ),
                )
                for name, own in every.items()
            )
        if gap <= 1:
            break
    else:
        raise ValueError(
            f"{', '.join(every)} in {root}: a number of their tables would move {gap:.2g} times too far."
        )
    for (name, kind), content in small.items():
        file = held[name, kind].file
        size = file.stat().st_size
        write_atomic(file, lambda draft, content=content: draft.write_bytes(content))
        print(
            f"{file}: {size} → {len(content)} bytes, {bits} bits; tables move by {gap:.1e} of what they may",
            flush=True,
        )


def grouped(every: list[Results]) -> list[list[Results]]:
    """Those of one model that have cells in common together; what is no experiment is left out."""
    together: dict[tuple, list[Results]] = {}
    for own in every:
        if own.tables is None:
            continue
        model = own.folder.name if own.folder.name != own.name else ""
        takers = {taker: givers for taker, kinds in GIVERS.items() for givers in kinds.values()}
        first = next(
            (givers[0] for taker, givers in takers.items() if own.name in (taker, *givers)), own.name
        )
        together.setdefault((first, model), []).append(own)
    return list(together.values())


def forget(folder: Path, names: dict[str, str]) -> None:
    """Paths of a machine become names in the facts of all tables of a folder, in them and beside them, in their rows, and in
    what its pictures say of themselves."""

    def told(text: str) -> str:
        for path, name in names.items():
            text = text.replace(path, name)
        return text

    for path in sorted(folder.rglob("*.json")):
        before = path.read_text(encoding="utf-8")
        if before != (text := told(before)):
            write_atomic(path, lambda draft, text=text: draft.write_text(text, encoding="utf-8"))
    for path in sorted(folder.rglob("*.parquet")):
        facts = facts_of(path)
        if facts == told(facts):
            continue
        rows = pq.read_table(path).to_pandas()
        if "model" in rows:
            rows = rows.assign(model=rows["model"].map({name: told(name) for name in rows["model"].unique()}))
        parsed = json.loads(told(facts))
        rest = {"seed", "number", "value"} <= set(rows)
        content = packed(rows, parsed, WHOLE[0]) if rest else None
        if content is None:
            write_table(path, rows, parsed)
        else:
            write_atomic(path, lambda draft, content=content: draft.write_bytes(content))
    for path in sorted(folder.rglob("*.png")):
        picture = Image.open(path)
        texts = _texts(picture)
        if texts != (new := {key: told(text) for key, text in texts.items()}):
            content = _png(picture, picture, new)
            write_atomic(path, lambda draft, content=content: draft.write_bytes(content))


def _texts(picture: Image.Image) -> dict[str, str]:
    return {key: text for key, text in picture.info.items() if isinstance(text, str)}


def _png(pixels: Image.Image, of: Image.Image, texts: dict[str, str]) -> bytes:
    told = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        told.add_text(key, text)
    buffer = BytesIO()
    pixels.save(buffer, "png", optimize=True, pnginfo=told, dpi=of.info.get("dpi"))
    return buffer.getvalue()


def shrink_picture(path: Path) -> None:
    """A picture in few colours, in place, where that is smaller."""
    picture = Image.open(path)
    few = picture.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    content, before = _png(few, picture, _texts(picture)), path.stat().st_size
    if len(content) < 0.9 * before:
        write_atomic(path, lambda draft: draft.write_bytes(content))
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
    parser.add_argument("--again", action="store_true", help="also what has few bits already")
    asked = parser.parse_args()
    folders = [place for place in asked.places if place.is_dir()]
    for place in folders:
        forget(place, dict(pair.split("=", 1) for pair in asked.forget))
    for group in grouped(list(gather(folders))):
        shrink_rows(group, again=asked.again)
    for path in (path for place in folders for path in sorted(place.rglob("*.parquet"))):
        shrink_table(path)
    pictures = [place for place in asked.places if place.suffix == ".png"]
    for path in [*pictures, *(path for place in folders for path in sorted(place.rglob("*.png")))]:
        shrink_picture(path)


if __name__ == "__main__":
    main()
