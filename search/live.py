"""The front while a search goes on: a small table and a scatter plot in the terminal; lines of text where there is none."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from supernet.console import Display, number_of

ROWS = 8
"""Children in the table."""
REFRESHES = 4
"""Refreshes of the terminal, a second."""
LINE_S, STAGE_S = 10.0, 1.0
"""Shortest time between two lines where there is no terminal, in seconds; and where the search does something else."""
PLOT = (60, 10)
"""Most columns and lines of the plot."""
LEAST_PLOT = (20, 4)
"""Fewest columns and lines with which there is a plot."""
TOP, MARK = "●", "·"
PLAIN = str.maketrans({TOP: "*", MARK: ".", "│": "|", "└": "+", "─": "-"})
"""For terminals that know ASCII alone."""


class LiveFront:
    """Shows the children that no other surpasses, as far as the search has come. A context manager.

        with LiveFront(display, show=task.show, metric=task.metric) as live:
            live.update([{"score": .93, "macs": 1.2e6, "latency_ms": .1, "stage": "coarse"}], 12, 64, "coarse")

    A row has `score` (larger is better) and `macs`, and may have `latency_ms`, `stage` and `front` (False: another child, which only
    the plot shows). The cursor is never hidden, so nothing has to be put right after Ctrl-C or a kill.
    """

    def __init__(
        self, display: Display, *, show: Callable[[float], str] = "{:.4g}".format, metric: str = "score",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.console, self.show, self.metric, self.clock = display.console, show, metric, clock
        self._began, self._told, self._stage = clock(), -math.inf, ""
        self._rows: tuple[Mapping[str, Any], ...] = ()
        self._line = ""
        moving = self.console.is_terminal and not self.console.is_dumb_terminal and not self.console.quiet
        self._live = (
            Live(self, console=self.console, refresh_per_second=REFRESHES, vertical_overflow="crop", redirect_stdout=False)
            if moving
            else None
        )

    def __enter__(self) -> Self:
        self._began = self.clock()
        if self._live is not None:
            self._live.start()
            self.console.show_cursor(True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()
        elif kind is None and self._line:
            self._say(self._stage)

    def update(self, front_rows: Sequence[Mapping[str, Any]], done: int, total: int | None, doing: str) -> None:
        """Say what the front is now, how many children were evaluated of how many, and what the search does."""
        rows = [row for row in front_rows if math.isfinite(row["score"]) and math.isfinite(row["macs"])]
        self._rows = tuple(sorted(rows, key=lambda row: (-row["score"], row["macs"])))
        self._line = f"{done} of {total} children" if total else f"{done} children"
        self._line += f": {doing}" if doing else ""
        if self._live is None and self.clock() >= self._told + (LINE_S if doing == self._stage else STAGE_S):
            self._say(doing)

    def say(self, text: str) -> None:
        """Print a line, above what is live."""
        self.console.print(escape(text), soft_wrap=True)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Drawn anew at every refresh, for the width and the height that the terminal has then."""
        width, height = options.max_width, console.height
        parts: list[Any] = [Text(f"{self._line}  {self._passed()}", no_wrap=True, overflow="ellipsis")]
        room = height - 2  # this line, and one for the cursor
        front = self._front()
        if front and room >= 4:
            rows = min(ROWS, len(front), room - 2)
            parts.append(self._table(front, rows, width))
            room -= rows + 2
        columns, lines = min(PLOT[0], width - 2), min(PLOT[1], room - 3)
        if len(self._rows) > 1 and columns >= LEAST_PLOT[0] and lines >= LEAST_PLOT[1]:
            drawn = "\n".join(plot(self._rows, columns, lines, self.show))
            parts.append(Text(drawn.translate(PLAIN) if options.ascii_only else drawn, no_wrap=True, overflow="crop"))
        yield Group(*parts)

    def _front(self) -> list[Mapping[str, Any]]:
        return [row for row in self._rows if row.get("front", True)]

    def _table(self, front: Sequence[Mapping[str, Any]], rows: int, width: int) -> Table:
        """The best child, the cheapest, and others evenly between; columns as far as the terminal is wide."""
        step = (len(front) - 1) / max(1, rows - 1)
        chosen = [front[round(place * step)] for place in range(rows)]
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column(escape(self.metric), justify="right", no_wrap=True)
        table.add_column("macs", justify="right", no_wrap=True)
        timed = width >= 32 and any(row.get("latency_ms") is not None for row in chosen)
        if timed:
            table.add_column("latency_ms", justify="right", no_wrap=True)
        staged = width >= 50 and any(row.get("stage") for row in chosen)
        if staged:
            table.add_column("stage", no_wrap=True, overflow="ellipsis")
        for row in chosen:
            cells = [self.show(row["score"]), number_of(int(row["macs"]))]
            latency = row.get("latency_ms")
            cells += [f"{latency:.4g}" if latency is not None else "-"] if timed else []
            table.add_row(*cells, *([escape(str(row.get("stage", "")))] if staged else []))
        return table

    def _passed(self) -> str:
        minutes, seconds = divmod(int(self.clock() - self._began), 60)
        return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"

    def _say(self, doing: str) -> None:
        """A line where there is no terminal."""
        front = self._front()
        best = f"; best {self.show(front[0]['score'])} at {number_of(int(front[0]['macs']))} macs" if front else ""
        self._told, self._stage = self.clock(), doing
        self.say(self._line + best + (f", {len(front)} on the front" if front else ""))


def plot(rows: Sequence[Mapping[str, Any]], columns: int, lines: int, show: Callable[[float], str]) -> list[str]:
    """Score over macs (logarithmic) in characters: at most `columns` wide, `lines` high, and a line for the macs."""
    scores, places = [row["score"] for row in rows], [math.log(max(1.0, row["macs"])) for row in rows]
    high, low = show(max(scores)), show(min(scores))
    margin = max(len(high), len(low)) + 1
    wide = columns - margin - 1
    if wide < 2:
        return []
    grid = [[" "] * wide for _ in range(lines)]
    for row, score, place in sorted(zip(rows, scores, places, strict=True), key=lambda each: bool(each[0].get("front", True))):
        line = round((1 - _part(score, scores)) * (lines - 1))
        grid[line][round(_part(place, places) * (wide - 1))] = TOP if row.get("front", True) else MARK
    labels = [high, *[""] * (lines - 2), low]
    drawn = [f"{label:>{margin - 1}} │{''.join(cells)}" for label, cells in zip(labels, grid, strict=True)]
    least, most = (number_of(int(value)) for value in (min(row["macs"] for row in rows), max(row["macs"] for row in rows)))
    axis = f"{least}{'macs'.center(max(0, wide - len(least) - len(most)))}{most}" if len(least + most) + 6 <= wide else "macs"
    return [*drawn, f"{'':>{margin}}└{'─' * wide}", f"{'':>{margin}} {axis}"]


def _part(value: float, values: Sequence[float]) -> float:
    """Where a value lies between the least and the largest, 0..1."""
    least, most = min(values), max(values)
    return (value - least) / (most - least) if most > least else 0.5
