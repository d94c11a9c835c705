"""Commands about data. Heavy imports wait until a command runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from supernet.data.check import Report

app = typer.Typer(name="data", help="Look at data before training on it.", no_args_is_help=True)

MOST_ROWS = 20
"""Classes that a table lists; of more, the smallest and the largest."""


@app.callback()
def _group() -> None:
    """Look at data before training on it."""


@app.command("check", epilog="Example: nestling data check photos/")
def check(
    data: Annotated[str, typer.Argument(help="What `nestling train --data` takes.")],
    data_root: Annotated[Path | None, typer.Option("--data-root", help="Where torchvision's sets lie.")] = None,
    skip_unreadable: Annotated[
        float, typer.Option("--skip-unreadable", min=0, max=1, help="Fraction of the images that may be unreadable.")
    ] = 0.0,
    batch_size: Annotated[int | None, typer.Option("--batch-size", min=1, help="The recipe's, to see whether it fits.")] = None,
    most: Annotated[int | None, typer.Option("--images", min=1, help="Decode so many images at most, spread evenly.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Decode every image and tell counts, sizes, damage, duplicates and leaks, and what the splits will be. Exits with 1 on errors."""
    from supernet.console import Display, print_json
    from supernet.data.check import check as look
    from supernet.data.sources import open_source

    source = open_source(data, root=data_root)
    with Display().stage("check") as stage:
        report = look(source, skip_unreadable=skip_unreadable, batch_size=batch_size, most=most, progress=stage.update)
    if as_json:
        print_json(report.to_json_dict())
    else:
        _print(report)
    if report.errors:
        raise typer.Exit(1)


def _print(report: Report) -> None:
    from supernet.console import print_table

    print_table(
        _rows(report), f"{report.source}: {report.images} images of {report.channels} channels, {len(report.classes)} classes"
    )
    if report.sizes:
        print_table(
            [{"": name, "least": each.least, "median": each.median, "most": each.most} for name, each in report.sizes.items()]
        )
    print(f"modes: {', '.join(f'{mode} {count}' for mode, count in report.modes.items())}")
    if report.looked_at < report.images:
        print(f"decoded: {report.looked_at} of {report.images} images")
    for flaw in report.unreadable[:MOST_ROWS]:
        print(f"unreadable: {flaw.identity}: {flaw.reason}")
    for same in report.duplicates[:MOST_ROWS]:
        print(
            f"same pixels: {', '.join(f'{name} ({split})' for name, split in zip(same.identities, same.splits, strict=True))}"
        )
    for kind, found in (("unreadable images", report.unreadable), ("groups of the same pixels", report.duplicates)):
        if len(found) > MOST_ROWS:
            print(f"... and {len(found) - MOST_ROWS} more {kind} (--json lists all)")
    for text in report.errors:
        print(f"error: {text}")
    for text in report.warnings:
        print(f"warning: {text}")
    if not report.errors:
        print("this data can be trained on")


def _rows(report: Report) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"class": label} | counts for label, counts in report.classes.items()]
    rows.sort(key=lambda row: -sum(value for value in row.values() if isinstance(value, int)))
    if len(rows) > MOST_ROWS:
        rows = [*rows[: MOST_ROWS // 2], {"class": f"({len(rows) - MOST_ROWS} more)"}, *rows[-MOST_ROWS // 2 :]]
    total = {name: sum(counts[name] for counts in report.classes.values()) for name in next(iter(report.classes.values()))}
    return [{name or "images": value for name, value in row.items()} for row in [*rows, {"class": "all"} | total]]
