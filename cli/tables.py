"""Tables that no terminal cuts: too wide for it, they are set in several parts below each other."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from textwrap import wrap
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

PROSE = 26
"""What a column of words is given at least, where its words are longer than that."""


class Grid(Table):
    """A table whose cells are never cut.

    Columns are as wide as they need to be; those with `overflow="fold"` hold words, and break between them. Where all do
    not fit beside each other, words of a heading go into lines of their own, then intervals; where that is not enough, the
    table is set in parts, each with the first columns. Title and caption have the width of the terminal.

    Args:
        title, caption: text, not markup.
        keys: how many first columns tell rows apart.
    """

    def __init__(self, title: str = "", *, caption: str = "", keys: int = 1, **how: Any) -> None:
        super().__init__(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), **how)
        self.above, self.below, self.keys = title, caption, keys

    def add_column(self, header: Any = "", *args: Any, **how: Any) -> None:
        """A column, with a heading that is text and not markup."""
        words = how.get("overflow") == "fold"
        how = {"no_wrap": not words, **how, "overflow": "fold"}
        super().add_column(escape(header), *args, **how)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Title, parts and caption."""
        if self.above:
            yield console.render_str(escape(self.above), style="bold", highlight=False)
        yield from self.parts(console, options)
        if self.below:
            yield console.render_str(escape(self.below), style="dim italic", highlight=False)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(options.max_width, options.max_width)

    def parts(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        """What is set below each other: the table itself where it fits."""
        ways = [
            self.columns,
            *([broken(column, cells=both) for column in self.columns] for both in (False, True)),
        ]
        needed = [[need(console, options, column) for column in columns] for columns in ways]
        for columns, widths in zip(ways, needed, strict=True):
            if sum(widths) < options.max_width:
                return iter([self.part(columns)])
        for columns, widths in zip(ways[1:], needed[1:], strict=True):
            room = options.max_width - 1 - sum(widths[: self.keys])
            if max(widths[self.keys :], default=0) <= room:
                return self.cut(columns[: self.keys], columns[self.keys :], widths[self.keys :], room)
        # Keys that leave no room are folded.
        keys = [replace(key, no_wrap=False, _cells=key._cells) for key in self.columns[: self.keys]]
        return self.cut(keys, ways[-1][self.keys :], needed[-1][self.keys :], options.max_width // 2)

    def cut(
        self, keys: Sequence[Column], columns: Sequence[Column], needed: Sequence[int], room: int
    ) -> Iterator[Table]:
        """Parts with as many columns as there is room for."""
        own: list[Column] = []
        used = 0
        for column, width in zip(columns, needed, strict=True):
            if own and used + width > room:
                yield self.part([*keys, *own])
                own, used = [], 0
            own.append(column)
            used += width
        yield self.part([*keys, *own])

    def part(self, columns: Sequence[Column]) -> Table:
        """A plain table of some columns."""
        made = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_header=self.show_header)
        made.columns = [replace(column, _index=n, _cells=column._cells) for n, column in enumerate(columns)]
        made.rows = self.rows
        return made


def broken(column: Column, *, cells: bool) -> Column:
    """The same with a heading no wider than its cells or its longest word, and, on demand, intervals below their estimates."""
    if not column.no_wrap or not isinstance(column.header, str):
        return column
    own = column._cells
    if cells:
        own = [re.sub(r" (\\?\[)", r"\n\1", cell) if isinstance(cell, str) else cell for cell in own]
    lines = [
        line for cell in own if isinstance(cell, str) for line in Text.from_markup(cell).plain.split("\n")
    ]
    room = max(1, *map(cell_len, lines), *map(cell_len, column.header.split()))
    heading = "\n".join(
        wrap(column.header.replace("\n", " "), room, break_long_words=False, break_on_hyphens=False)
    )
    return replace(column, header=heading, _cells=own)


def need(console: Console, options: ConsoleOptions, column: Column) -> int:
    """How wide a column has to be, with its padding."""
    cells = [column.header, *column._cells]
    widths = [
        Measurement.get(console, options, console.render_str(c) if isinstance(c, str) else c) for c in cells
    ]
    natural = max(w.maximum for w in widths)
    return 2 + (
        natural if column.no_wrap else min(natural, max(PROSE, *(min(w.minimum, PROSE) for w in widths)))
    )
