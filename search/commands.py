"""Commands of this package: evaluate, search, report. Heavy imports wait until a command runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from search.found import Child, Found
    from search.loop import SearchConfig
    from supernet.console import Display
    from supernet.run import Run

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda: where children are evaluated.")]
BudgetTexts = Annotated[
    list[str] | None,
    typer.Option(
        "--budget",
        help="'latency_ms<=8', 'macs<=8e6', 'params<=2M', 'peak_memory_bytes<=512KiB'. Repeatable.",
    ),
]
Threads = Annotated[int, typer.Option("--threads", min=1, help="Threads that the exported child runs with.")]
SearchName = Annotated[str, typer.Option("--search", help="A search configuration by name or YAML file.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.command(epilog="Example: nestling evaluate runs/digits --arch largest")(evaluate)
    app.command(epilog="Example: nestling search runs/digits --budget 'latency_ms<=0.08' --budget 'macs<=2e6'")(search)
    app.command(epilog="Example: nestling report runs/digits")(report)


def evaluate(
    run: RunPath,
    arch: Annotated[str, typer.Option("--arch", help="smallest, largest, or a JSON file.")],
    split: Annotated[
        str, typer.Option("--split", help="search_val, confirm, or test (each read of test is counted).")
    ] = "search_val",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Calibrate one child and score it (accuracy, or the metric of the run's task)."""
    from supernet import device as devices
    from supernet.console import print_json
    from supernet.costs import arch_costs
    from supernet.run import Run
    from supernet.space import read_arch

    found = Run.open(run)
    chosen = read_arch(found.space, arch)
    images = found.test_images(f"evaluate {chosen.key}") if split == "test" else found.dataset.split(split)
    estimate = found.task.estimate(found.evaluator(devices.choose(device)).evaluate(chosen, images))
    metric = found.task.metric
    result = {"key": chosen.key, "split": split, "images": estimate.images, metric: estimate.value, f"{metric}_low": estimate.low,
              f"{metric}_high": estimate.high, **arch_costs(found.space, chosen), "test_reads": found.test_reads}  # fmt: skip
    if as_json:
        print_json(result)
    else:
        show = found.task.show
        print(f"{chosen.key}: {metric} {show(estimate.value)} ({show(estimate.low)} to {show(estimate.high)}) on "
              f"{estimate.images} {split} images, "
              f"{result['macs']:,} macs; the test split was read {found.test_reads} times")  # fmt: skip


def search(
    run: RunPath, budget: BudgetTexts = None, threads: Threads = 1, search_config: SearchName = "default", device: Device = "auto",
    as_json: Json = False,
) -> None:  # fmt: skip
    """Find the best child that meets every budget, by measurement on this machine. Without a budget, the best child."""
    from search.loop import load_search_config
    from supernet import device as devices
    from supernet.console import Display, print_json, print_table
    from supernet.run import Run

    display, opened = Display(), Run.open(run)
    found = search_shown(opened, budget or [], load_search_config(search_config), threads, devices.choose(device), display)
    if as_json:
        print_json(found.as_dict())
        return
    print_table(
        rows_of(found, opened.task.show), f"budgets: {', '.join(found.budgets) or 'none'}; {found.evaluated} children evaluated"
    )
    for note in found.notes:
        print(note)
    print(f"Next: nestling export {run}")


def search_shown(
    run: Run, budgets: list[str], settings: SearchConfig, threads: int, device: str, display: Display
) -> Found:  # fmt: skip
    """Search with a progress line."""
    from deploy.targets import Local
    from search.loop import search as search_run

    with display.stage("search") as stage:
        return search_run(run, budgets, settings=settings, target=Local(threads), device=device,
                          progress=lambda event: stage.update(event.done, event.total, event.doing))  # fmt: skip


def rows_of(found: Found, show: Callable[[float], str]) -> list[dict[str, Any]]:
    """A row for the chosen child and the ends of the space; scores of the search-val and confirm images, written by `show`."""
    three = (("chosen", found.best), ("smallest", found.smallest), ("largest", found.largest))
    return [_row(name, child, show) for name, child in three]


def _row(name: str, child: Child, show: Callable[[float], str]) -> dict[str, Any]:
    latency = child.latency
    return {
        "child": name, "key": child.key, "search_val": show(child.search_score),
        "confirm": show(child.confirm_score) if child.confirm_score is not None else "-",
        "macs": int(child.costs["macs"]), "params": int(child.costs["params"]),
        "predicted ms": child.predicted_latency_ms if child.predicted_latency_ms is not None else "-",
        "latency_ms": f"{latency.latency_ms:.4g} ({latency.low:.4g} to {latency.high:.4g})" if latency else "-",
    }  # fmt: skip


def report(
    run: RunPath, out: Annotated[Path | None, typer.Option("--out", help="RUN/report.html if left out.")] = None
) -> None:
    """Write the report: one HTML file with training curves, accuracy against latency, and the chosen child."""
    from search.report.content import report_of
    from supernet.run import Run

    print(report_of(Run.open(run), out or run / "report.html"))
