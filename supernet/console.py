"""What a person sees: progress with the time that is left, tables; and JSON for programs. Progress goes to standard error."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table


class Display:
    """A line for every stage: bar, counts, time passed and left. Without a terminal, a line of text when a stage begins."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False)
        if not self.console.is_terminal:
            self.console.width = 120  # a pipe has no width
        columns = (
            TextColumn("[bold]{task.description:<8}"), BarColumn(bar_width=24), MofNCompleteColumn(),
            TextColumn("took"), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
        )  # fmt: skip
        self._progress = Progress(*columns, console=self.console)

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Show a stage while the block runs."""
        if not self.console.is_terminal:
            self.console.print(f"{name} ...")
        self._progress.start()
        task = self._progress.add_task(name, total=None, note="")
        try:
            yield Stage(self._progress, task)
            total = self._progress.tasks[self._progress.task_ids.index(task)].total
            self._progress.update(task, total=total or 1, completed=total or 1)
        finally:
            self._progress.stop()
            self._progress.remove_task(task)

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(escape(text), soft_wrap=True)


class Stage:
    """The line of one stage."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def update(self, done: int, total: int | None, note: str = "") -> None:
        """Say how far it is."""
        self._progress.update(self._task, completed=done, total=total or None, note=escape(note))


def print_json(value: Any) -> None:
    """Print a result for programs, on standard output."""
    print(json.dumps(value, indent=1, allow_nan=False))


def print_table(rows: Sequence[Mapping[str, object]], title: str = "") -> None:
    """Print rows as a table, on standard output; columns in the order of their first appearance."""
    table = Table()
    columns = list(dict.fromkeys(column for row in rows for column in row))
    for column in columns:
        numeric = all(isinstance(row.get(column, 0), int | float) for row in rows)
        table.add_column(escape(column), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(shown(row.get(column, ""))) for column in columns))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200  # a pipe has no width: do not break lines
    if title:
        console.print(f"[italic]{escape(title)}[/]", soft_wrap=True)  # a table's own title breaks at its width
    if table.columns and Measurement.get(console, console.options.update(max_width=10_000), table).maximum > console.width:
        console.print(*_records(rows), sep="\n")
    else:
        console.print(table)


def _records(rows: Sequence[Mapping[str, object]]) -> list[Table]:
    """Rows that are too wide for the terminal, each as lines of name and value."""
    found = []
    for row in rows:
        lines = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        for column, value in row.items():
            lines.add_row(escape(column), escape(shown(value)))
        lines.add_row("", "")
        found.append(lines)
    return found


def number_of(count: int) -> str:
    """A whole number of any size: all digits below a million, else three."""
    return f"{count:,}" if count < 1_000_000 else f"{Decimal(count):.3g}".lower()


def shown(value: object) -> str:
    """A value as a person writes it."""
    if isinstance(value, tuple) and len(set(value)) > 1:  # block by block
        return ", ".join(str(item) for item in value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        values = value if isinstance(value, list | tuple) else [value]
        return ", ".join(str(item) for item in dict.fromkeys(values))
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
