"""Commands of this package: evaluate, search (and what it evaluated), report, dashboard. Heavy imports wait until a command runs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from deploy.targets import Target
    from search.evaluate import Advancing
    from search.found import Child, Found
    from search.loop import Asked
    from search.objective import Objective
    from search.settings import SearchConfig
    from supernet.arch import Arch
    from supernet.console import Display
    from supernet.run import Run

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda: where children are evaluated.")]
BudgetTexts = Annotated[
    list[str] | None,
    typer.Option(
        "--budget",
        help="'latency_ms<=8', 'latency_ms@NAME<=8', 'macs<=8e6', 'params>=1M', 'peak_memory_bytes<=512KiB', "
        "'model_size_bytes<=4MiB', 'resident_bytes<=80MiB', 'load_ms<=50', 'first_ms<=20', 'images_per_s>=100' (these too of a "
        "target NAME). Repeatable: all hold.",
    ),
]
ChildTexts = Annotated[
    list[str] | None,
    typer.Option("--child", help="One more child, the best within 'macs<=50M, params<=2M' and every --budget. Repeatable."),
]
Front = Annotated[int, typer.Option("--front", min=0, max=100, help="Find this many children, spread over the range of costs.")]
Threads = Annotated[int, typer.Option("--threads", min=1, help="Threads that the exported child runs with.")]
SearchName = Annotated[str, typer.Option("--search", help="A search configuration by name or YAML file.")]
SearchSet = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="KEY=VALUE of the search configuration, such as evaluations=200 or options.initial=64. Repeatable."
    ),
]
Targets = Annotated[
    list[str] | None,
    typer.Option(
        "--target",
        help="NAME=local:4, NAME=ssh://user@host?threads=4, ...: a target that budgets name, latency_ms@NAME<=8; or a targets.yaml. "
        "Repeatable.",
    ),
]
LatencyFiles = Annotated[
    list[str] | None,
    typer.Option(
        "--latency", help="NAME=FILE, or FILE for the budgets that name none: a latency model that `nestling profile` wrote."
    ),
]
Precision = Annotated[
    str | None,
    typer.Option("--precision", help="int8: children are scored and timed as they are when quantised. fp32 if left out."),
]
Workers = Annotated[str | None, typer.Option("--workers", help="ray, ray:ACTORS or ray://HOST:PORT: who evaluates children.")]


class _Search(TyperGroup):
    """`nestling search RUN` searches; `show` and `export` look at what searches evaluated."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Without the name of a command, `run` is meant."""
        if args and args[0] in self.commands and Path(args[0]).is_dir() and not any(Path(text).is_dir() for text in args[1:]):
            raise typer.BadParameter(f"{args[0]!r} is a command here: write ./{args[0]} for the directory")
        return super().parse_args(ctx, args if args and args[0] in self.commands else ["run", *args])


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.command(epilog="Example: nestling evaluate runs/digits --arch largest")(evaluate)
    searching = typer.Typer(cls=_Search, help="Find the best children within budgets; or show and export what was evaluated.")
    searching.command("run", epilog="Example: nestling search runs/digits --budget 'latency_ms<=0.08' --budget 'macs<=2e6'. See also: "
                      "nestling search show RUN, nestling search export RUN --out FILE")(search)  # fmt: skip
    searching.command("show", epilog="Example: nestling search show runs/digits --limit 20")(show)
    searching.command("export", epilog="Example: nestling search export runs/digits --out children.csv")(export)
    app.add_typer(searching, name="search")
    app.command(epilog="Example: nestling report runs/digits")(report)
    app.command(epilog="Example: nestling dashboard runs/digits")(dashboard)


def evaluate(
    run: RunPath,
    arch: Annotated[
        str,
        typer.Option("--arch", help="best (of the latest search), smallest, largest, a key of `search show`, or a JSON file."),
    ],
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

    found = Run.open(run)
    chosen = _arch(found, arch)
    images = found.test_images(f"evaluate {chosen.key}") if split == "test" else found.dataset.split(split)
    estimate = found.task.estimate(found.evaluator(devices.choose(device)).evaluate(chosen, images))
    metric = found.task.metric
    result = {"key": chosen.key, "split": split, "images": estimate.images, metric: estimate.value, f"{metric}_low": estimate.low,
              f"{metric}_high": estimate.high, **arch_costs(found.space, chosen), "test_reads": found.test_reads}  # fmt: skip
    if as_json:
        print_json(result)
    else:
        text = found.task.show
        print(f"{chosen.key}: {metric} {text(estimate.value)} ({text(estimate.low)} to {text(estimate.high)}) on "
              f"{estimate.images} {split} images, "
              f"{result['macs']:,} macs; the test split was read {found.test_reads} times")  # fmt: skip


def _arch(run: Run, text: str) -> Arch:
    """The arch that a user means: by name, by file, or by the key of a child that a search evaluated."""
    from search.found import Found
    from search.store import Store, latest_store
    from supernet.errors import InputError
    from supernet.space import read_arch

    if text == "best":
        return Found.load(run).best.arch
    if re.fullmatch("[0-9a-f]{12}", text) and not Path(text).exists():
        with Store.existing(latest_store(run.path)) as store:
            row = next((row for row in store.rows(samples=False) if row.key == text), None)
        if row is None:
            raise InputError(
                f"no search of {run.path} evaluated a child {text}: see the keys with `nestling search show {run.path}`"
            )
        return run.space.arch(json.loads(row.arch), f"child {text}")
    return read_arch(run.space, text, "'best', 'smallest', 'largest', a key of `nestling search show RUN`")


def search(
    run: RunPath, budget: BudgetTexts = None, child: ChildTexts = None, front: Front = 0, threads: Threads = 1, target: Targets = None,
    latency: LatencyFiles = None, search_config: SearchName = "default", set_: SearchSet = None, workers: Workers = None,
    device: Device = "auto", precision: Precision = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Find the best child that meets every budget, by measurement on the targets. Without a budget, the best child."""
    from search.loop import Asked
    from search.report.tables import objective_of
    from search.settings import load_search_config
    from supernet import device as devices
    from supernet.console import Display, print_json, print_table
    from supernet.errors import InputError
    from supernet.recipe import parse_overrides
    from supernet.run import Run

    if precision not in (None, "fp32", "int8"):
        raise InputError(f"--precision is fp32 or int8, but got {precision[:40]!r}")
    given = parse_overrides(set_ or []) | ({"precision": precision} if precision else {})
    settings = load_search_config(search_config, given)
    asked = Asked(tuple(budget or ()), tuple(child or ()), front, settings, targets_of(target or (), threads, settings.precision),
                  latency=latency_files(latency or ()))  # fmt: skip
    display, opened = Display(), Run.open(run)
    found = search_shown(opened, asked, devices.choose(device), display, workers)
    if found is None:  # a process that only helped
        return
    if as_json:
        print_json(found.as_dict())
        return
    text = objective_of(opened, found).show
    print_table(
        rows_of(found, text),
        f"budgets: {', '.join(found.budgets) or 'none'}; scores: {found.objective}; {found.evaluated} children evaluated",
    )
    if len(found.answers) > 1:
        print_table([{"for": answer.name, **_row("", answer.child, text)} for answer in found.answers[1:]], "further children")
    for note in found.notes:
        print(note)
    print(
        f"Next: nestling export {run}"
        + (f" --front {front}" if front else "")
        + (" --format int8" if precision == "int8" else "")
    )


def search_shown(run: Run, asked: Asked, device: str, display: Display, workers: str | None = None) -> Found | None:
    """Search with a progress line and the front so far; None in the processes of a job that only evaluate for the main one."""
    from search.live import LiveFront
    from search.loop import search as search_run

    with evaluating(run, asked.settings, device, workers) as advancing:
        if advancing is None:
            return None
        with LiveFront(display, show=_writer(run, asked), metric=asked.settings.objective or run.task.metric) as live:
            return search_run(run, asked, device=device, advancing=advancing,
                              progress=lambda event: live.update(event.front, event.done, event.total, event.doing))  # fmt: skip


def _writer(run: Run, asked: Asked) -> Callable[[float], str]:
    from search.objective import objective_named

    return (asked.objective or objective_named(asked.settings.objective, run.task)).show


@contextmanager
def evaluating(run: Run, settings: SearchConfig, device: str, workers: str | None) -> Iterator[Advancing | None]:
    """What evaluates children: this process, a Ray cluster (`--workers`), or all processes of `torchrun`.

    None in those processes that are not the main one: they evaluate for it until it is done.
    """
    from search.cluster import RayEvaluator, Workers
    from search.evaluate import SharedEvaluator
    from search.loop import steps_of
    from search.processes import spread
    from supernet.distributed import world

    steps = steps_of(run, settings)
    if workers is not None:
        with RayEvaluator(run, "search_val", steps, Workers.parse(workers), device=device) as cluster:
            yield cluster
        return
    with world(device) as processes:
        own = SharedEvaluator(run.evaluator(processes.device), run.dataset.split("search_val"), steps)
        with spread(processes, own, run, steps) as together:
            yield together


def targets_of(texts: Sequence[str], threads: int, precision: str = "fp32") -> Mapping[str | None, Target]:
    """The targets of `--target`: NAME=TARGET, or a YAML file of several; this machine at `threads` threads without a name."""
    from deploy.places import parse_targets, read_targets
    from supernet.errors import InputError

    files = [text for text in texts if text.endswith((".yaml", ".yml")) and "=" not in text]
    found: dict[str | None, Target] = dict(
        parse_targets([text for text in texts if text not in files], threads=threads, precision=precision)
    )
    for file in files:
        for name, target in read_targets(Path(file), precision=precision).items():
            if name in found:
                raise InputError(f"every target has a name of its own, but {name!r} of {file} was given before: rename one")
            found[name] = target
    return found


def latency_files(texts: Sequence[str]) -> Mapping[str | None, Path]:
    """Files of latency models by the targets' names; one without a name is that of budgets that name none. Raises `InputError`."""
    from supernet.errors import InputError

    found: dict[str | None, Path] = {}
    for text in texts:
        name, equals, file = text.rpartition("=")
        key = name if equals else None
        if not file or key == "" or key in found:
            raise InputError(
                f"a latency model is given as NAME=FILE, one for each target, or FILE alone, but got {text[:200]!r}"
            )
        found[key] = Path(file)
    return found


def rows_of(found: Found, text: Callable[[float], str]) -> list[dict[str, Any]]:
    """A row for the chosen child and the ends of the space; scores of the search-val and confirm images, written by `text`."""
    three = (("chosen", found.best), ("smallest", found.smallest), ("largest", found.largest))
    return [{"child": name, **_row(name, child, text)} for name, child in three]


def _row(name: str, child: Child, text: Callable[[float], str]) -> dict[str, Any]:
    estimate, timed = child.estimate, child.latencies.items()
    return {
        "key": child.key, "search_val": text(child.search_score),
        "confirm": text(child.confirm_score) if child.confirm_score is not None else "-",
        "expected": f"{text(estimate.value)} ({text(estimate.low)} to {text(estimate.high)})" if estimate else "-",
        "macs": int(child.costs["macs"]), "params": int(child.costs["params"]),
        "predicted ms": child.predicted_latency_ms if child.predicted_latency_ms is not None else "-",
        **({target: f"{each.latency_ms:.4g} ({each.low:.4g} to {each.high:.4g})" for target, each in timed} or {"latency_ms": "-"}),
        **{name: f"{middle:.4g} ({low:.4g} to {high:.4g})" for name, (low, middle, high) in child.weights.items()},
    }  # fmt: skip


def report(
    run: RunPath, out: Annotated[Path | None, typer.Option("--out", help="RUN/report.html if left out.")] = None
) -> None:
    """Write the report: one HTML file with training curves, accuracy against latency, and the chosen child."""
    from search.report.content import report_of
    from supernet.run import Run

    print(report_of(Run.open(run), out or run / "report.html"))


def show(
    run: RunPath,
    stage: Annotated[
        str | None, typer.Option("--stage", help="Only children of a stage of the search, such as coarse.")
    ] = None,
    budget: BudgetTexts = None,
    sort: Annotated[
        str | None, typer.Option("--sort", help="A column to sort by; the best of each zone of costs if left out.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Rows shown.")] = 20,
    as_json: Json = False,
) -> None:
    """Show the children that searches of a run evaluated: the best of each zone of costs, or sorted by a column."""
    from search import table as tables
    from search.budget import parse_all
    from search.store import Store, latest_store
    from supernet.console import print_json, print_table
    from supernet.run import Run

    opened = Run.open(run)
    objective = _other_objective(opened)
    with Store.existing(latest_store(run)) as store:
        rows = tables.children(store, opened.task.columns if objective else None)
    if objective:
        rows = tables.scored(rows, objective, opened.dataset.split("search_val").labels, len(opened.classes))
    chosen = tables.chosen(rows, stage=stage, budgets=parse_all(budget or []), sort=sort or "score")
    shown = chosen[:limit] if sort else tables.best_by_zone(chosen, zones=min(limit, tables.ZONES))
    if as_json:
        print_json(shown)
        return
    order = (
        f"sorted by {sort}"
        if sort
        else "the best of each zone of macs, * where none cheaper is as good; --sort score lists all"
    )
    what = f"score is {opened.task.title}" + (f", the latest search was for {objective.title}" if objective else "")
    print_table(
        tables.for_terminal(shown, opened.task.show), f"{len(rows)} children evaluated, {len(chosen)} match; {order}; {what}"
    )


def _other_objective(run: Run) -> Objective | None:
    """The objective of the latest search, where that is not the task's own metric, and known by its name alone."""
    from search.found import Found
    from search.objective import objective_named
    from supernet.errors import InputError

    try:
        name = Found.load(run).objective
        found = objective_named(name, run.task) if name != run.task.metric else None
        return found if found and len(run.dataset.split("search_val")) else None
    except InputError:  # not searched, an objective of the user's own, or the data are not here
        return None


def export(
    run: RunPath,
    out: Annotated[Path, typer.Option("--out", help="A file that ends with .csv, .parquet or .json.")],
    samples: Annotated[
        bool, typer.Option("--samples", help="Also what each child did on every image (.parquet, .json).")
    ] = False,
) -> None:
    """Write the children that searches of a run evaluated to a file, a row each."""
    from search import table as tables
    from search.store import Store, latest_store
    from supernet.run import Run

    opened = Run.open(run)
    objective = _other_objective(opened)
    with Store.existing(latest_store(run)) as store:
        rows = tables.children(store, opened.task.columns if samples or objective else None)
    if objective:
        rows = tables.scored(rows, objective, opened.dataset.split("search_val").labels, len(opened.classes), keep=samples)
    print(f"{tables.export(rows, out)}: {len(rows)} children")


def dashboard(
    run: RunPath, port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any that is free.")] = 8080
) -> None:
    """Mirror the search of a run into an Optuna journal and open optuna-dashboard on it, on this machine alone."""
    from search import dashboard as dashboards
    from supernet.run import Run

    dashboards.dashboard(Run.open(run), port=port)
