"""Nestling's front door: train one supernet, find a child for a budget, ship it.

    run = nestling.train("photos/", out="runs/photos")
    found = nestling.search(run, budgets=["latency_ms<=8"])
    bundle = nestling.export(found.best, out="my-model")
    probabilities = bundle.predict(["photo.jpg"])

The command line joins the commands of the three packages and adds `run` (the whole way) and `demo` (`run` on handwritten digits).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deploy import commands as deploy_commands
from search import commands as search_commands
from search.commands import BudgetTexts, SearchName, Threads
from supernet import commands as supernet_commands
from supernet.commands import Data, Device, Download, Epochs, Json, Out, Recipe, Root, Set, SpaceName, Workers

if TYPE_CHECKING:
    from deploy.bundle import Bundle
    from search.found import Child, Found
    from supernet.console import Display
    from supernet.run import Run
    from supernet.task import Estimate

__version__ = "0.1.0"
__all__ = ["export", "main", "open_bundle", "open_run", "run", "search", "train"]

app = typer.Typer(
    name="nestling", help=__doc__.splitlines()[0], no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip


# --- from Python ---


def train(
    data: str | Path, *, out: str | Path, space: str | None = None, recipe: str | None = None, epochs: int | None = None,
    overrides: Mapping[str, Any] | None = None, data_root: str | Path | None = None, download: bool = False, device: str = "auto",
    workers: int = 0, resume: bool = False,
) -> Run:  # fmt: skip
    """Train a supernet on a folder of images, an .npz file or a known set; returns the run in the directory `out`.

    With `resume`, a run that is in `out` already is continued, bit-equal on a CPU. Raises `supernet.InputError`.
    """
    from supernet import device as devices
    from supernet import start as starting
    from supernet.train import train as train_run

    where, path = devices.choose(device), Path(out)
    if resume and (path / "config.json").exists():
        begun = starting.resume(path)
    else:
        begun = starting.start(str(data), path, space=space, recipe=recipe, epochs=epochs, overrides=overrides,
                               root=Path(data_root) if data_root else None, download=download, device=where)  # fmt: skip
    train_run(begun.run, device=where, workers=workers)
    return begun.run


def open_run(path: str | Path) -> Run:
    """A run directory. Raises `supernet.InputError` where it is none."""
    from supernet.run import Run

    return Run.open(Path(path))


def open_bundle(path: str | Path) -> Bundle:
    """An exported bundle, its hashes verified. Raises `supernet.InputError` where something in it changed."""
    from deploy.bundle import Bundle

    return Bundle.open(path)


def search(
    run: Run, budgets: Sequence[str] = (), *, threads: int = 1, device: str = "auto", settings: str = "default"
) -> Found:
    """The best child of a run that meets every budget by measurement on this machine. Raises `supernet.InputError`."""
    from deploy.targets import Local
    from search.loop import load_search_config
    from search.loop import search as search_loop
    from supernet import device as devices

    return search_loop(
        run, budgets, settings=load_search_config(settings), target=Local(threads), device=devices.choose(device)
    )


def export(child: Child, out: str | Path, *, split: str = "test") -> Bundle:
    """Export a child that a search found; verified on image files. Raises `deploy.verify.VerificationError` on any mismatch."""
    from deploy.ship import ship
    from supernet.run import Run

    latencies = [child.latency.as_dict()] if child.latency else []
    return ship(Run.open(child.run), child.arch, Path(out), split=split, latencies=latencies)


@dataclass(frozen=True)
class Whole:
    """How the whole way is to be walked."""

    data: str
    out: Path
    budgets: tuple[str, ...]
    """Budgets, or ("middle",): the middle between the measured latencies of the smallest and the largest child."""
    space: str | None = None
    recipe: str | None = None
    epochs: int | None = None
    overrides: Mapping[str, Any] | None = None
    data_root: Path | None = None
    download: bool = False
    device: str = "auto"
    workers: int = 0
    threads: int = 1
    search: str = "default"


def run(way: Whole, display: Display | None = None) -> dict[str, Any]:
    """Train, search, export, verify, report; returns the content of `OUT/result.json`. Run again, it continues where it stopped."""
    from supernet import device as devices
    from supernet.console import Display

    return _Way(way, devices.choose(way.device), display or Display(quiet=True)).go()


class _Way:
    """The whole way, stage by stage. Every stage leaves its files in the run and is not done again."""

    def __init__(self, way: Whole, device: str, display: Display) -> None:
        from deploy.targets import Local

        self.way, self.device, self.display, self.target = way, device, display, Local(way.threads)
        self.seconds: dict[str, float] = {}

    def go(self) -> dict[str, Any]:
        from search.loop import load_search_config
        from search.report.content import report_of
        from supernet import durable

        settings = load_search_config(self.way.search)
        self._check_budgets()
        with self._timed("train"):
            run = self._trained()
        budgets = self._budgets(run)
        with self._timed("search"):
            found = search_commands.search_shown(run, budgets, settings, self.way.threads, self.device, self.display)
        with self._timed("export"):
            bundle = self._exported(run, found)
        with self._timed("test"):
            tested = self._tested(run, found, bundle)
        result = _result(run, found, tested, self.seconds)
        durable.write_json(run.path / "result.json", result)
        with self._timed("report"):
            report_of(run, run.path / "report.html")
        durable.write_json(run.path / "result.json", {**result, "seconds": self.seconds})
        return {**result, "seconds": self.seconds}

    def _check_budgets(self) -> None:
        """A budget that cannot be read is an error before anything is trained."""
        from search.budget import parse_all

        if self.way.budgets != ("middle",):
            parse_all(list(self.way.budgets))

    def _trained(self) -> Run:
        from search.budget import parse_all
        from search.feasible import refuse_impossible
        from search.loop import smallest_latency_ms
        from supernet import start as starting
        from supernet.errors import InputError

        way = self.way
        if (way.out / "config.json").exists():
            begun = starting.resume(way.out)
            given = (way.data, way.space, way.recipe, way.epochs, dict(way.overrides or {}))
            if _asked(begun.run) not in (None, [*given]):
                raise InputError(
                    f"{way.out} holds a run of other data or options: choose another --out, or repeat the command that began it"
                )
        else:
            begun = starting.start(
                way.data, way.out, space=way.space, recipe=way.recipe, epochs=way.epochs, overrides=way.overrides, root=way.data_root,
                download=way.download, device=self.device,
            )  # fmt: skip
            _remember(begun.run, [way.data, way.space, way.recipe, way.epochs, dict(way.overrides or {})])
        for reason in begun.reasons:
            self.display.say(reason)
        if way.budgets != ("middle",):  # impossible ones end here, before hours of training
            latency = (
                smallest_latency_ms(begun.run.space, self.target) if any("latency" in text for text in way.budgets) else None
            )
            refuse_impossible(begun.run.space, parse_all(list(way.budgets)), latency)
        supernet_commands.train_shown(begun.run, self.device, way.workers, self.display)
        return begun.run

    def _budgets(self, run: Run) -> list[str]:
        from deploy.latency import LatencyModel, profile
        from search.loop import latency_file

        if self.way.budgets != ("middle",):
            return list(self.way.budgets)
        path = latency_file(run, self.target)
        with self.display.stage("profile"), self._timed("profile"):
            if path.exists():
                model = LatencyModel.load(path, run.space, self.target)
            else:
                model = profile(run.space, self.target)
                path.parent.mkdir(exist_ok=True)
                model.save(path)
        middle = (model.smallest_ms + model.largest_ms) / 2
        self.display.say(
            f"latency of the space here: {model.smallest_ms:.4g} to {model.largest_ms:.4g} ms; budget: {middle:.4g} ms, the middle"
        )
        return [f"latency_ms<={middle:.4g}"]

    def _exported(self, run: Run, found: Found) -> Bundle:
        from deploy.ship import ship

        latencies = [found.best.latency.as_dict()] if found.best.latency else []
        with self.display.stage("export"):
            return ship(run, found.best.arch, run.path / "bundle", evaluator=run.evaluator(self.device), latencies=latencies)

    def _tested(self, run: Run, found: Found, bundle: Bundle) -> dict[str, Estimate]:
        """Test accuracy: the chosen child's as exported, of the others as extracted."""
        from supernet.task import Estimate

        counted = bundle.manifest["accuracy"]
        tested = {"chosen": Estimate(counted[run.task.metric], counted["low"], counted["high"], counted["images"])}
        evaluator = run.evaluator(self.device)
        with self.display.stage("test"):
            images = run.test_images("smallest and largest child, final table")
            for name, child in (("smallest", found.smallest), ("largest", found.largest)):
                tested[name] = run.task.estimate(evaluator.evaluate(child.arch, images))
        return tested

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.seconds[stage] = round(time.monotonic() - start, 2)


def _asked(run: Run) -> list[Any] | None:
    """What `nestling run` was asked for when it began this run; None for a run that `nestling train` began."""
    import json

    path = run.path / "asked.json"
    return list(json.loads(path.read_text())) if path.is_file() else None


def _remember(run: Run, asked: list[Any]) -> None:
    from supernet import durable

    durable.write_json(run.path / "asked.json", asked)


def _result(run: Run, found: Found, tested: Mapping[str, Estimate], seconds: Mapping[str, float]) -> dict[str, Any]:
    metric = run.task.metric
    children = {}
    for name, child in (("chosen", found.best), ("smallest", found.smallest), ("largest", found.largest)):
        estimate, latency = tested[name], child.latency
        assert latency is not None
        children[name] = {
            "key": child.key, metric: estimate.value, f"{metric}_low": estimate.low, f"{metric}_high": estimate.high,
            "macs": int(child.costs["macs"]), "params": int(child.costs["params"]),
            "peak_memory_bytes": int(child.costs["peak_memory_bytes"]), "predicted_latency_ms": child.predicted_latency_ms,
            "latency_ms": latency.latency_ms, "latency_ms_low": latency.low, "latency_ms_high": latency.high,
        }  # fmt: skip
    return {
        "format": 1, **children, "budget": list(found.budgets), "images": tested["chosen"].images, "evaluated": found.evaluated,
        "test_reads": run.test_reads, "notes": list(found.notes), "seconds": dict(seconds),
    }  # fmt: skip


# --- from the command line ---


def _whole_way(way: Whole, as_json: bool) -> None:
    from supernet.console import Display, print_json, print_table

    display = Display()
    result = run(way, display)
    if as_json:
        print_json(result)
        return
    rows = []
    for name in ("chosen", "smallest", "largest"):
        child = result[name]
        predicted = child["predicted_latency_ms"]
        rows.append({
            "child": name, "top1 (test)": f"{child['top1']:.2%} ({child['top1_low']:.2%} to {child['top1_high']:.2%})",
            "macs": child["macs"], "params": child["params"], "predicted ms": f"{predicted:.4g}" if predicted is not None else "-",
            "measured latency_ms": f"{child['latency_ms']:.4g} ({child['latency_ms_low']:.4g} to {child['latency_ms_high']:.4g})",
        })  # fmt: skip
    print_table(rows, f"budget: {', '.join(result['budget']) or 'none'}; {result['images']} test images; intervals at 95 %")
    for note in result["notes"]:
        print(note)
    print(f"bundle: {way.out / 'bundle'}   report: {way.out / 'report.html'}   figures: {way.out / 'result.json'}")
    print("stages: " + ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in result["seconds"].items()))


@app.command("run", epilog="Example: nestling run --data photos/ --budget 'latency_ms<=8' --out runs/photos")
def run_command(
    data: Data, out: Out, budget: BudgetTexts = None, space: SpaceName = None, recipe: Recipe = None, epochs: Epochs = None,
    set_: Set = None, data_root: Root = None, download: Download = False, device: Device = "auto", workers: Workers = 0,
    threads: Threads = 1, search_config: SearchName = "default", as_json: Json = False,
) -> None:  # fmt: skip
    """The whole way: train, search within the budgets, export, verify, report. Run again, it continues where it stopped."""
    from supernet.recipe import parse_overrides

    _whole_way(
        Whole(data, out, tuple(budget or ()), space, recipe, epochs, parse_overrides(set_ or []), data_root, download, device, workers,
              threads, search_config),
        as_json,
    )  # fmt: skip


@app.command(epilog="Example: nestling demo --out runs/demo")
def demo(
    out: Out = Path("runs/demo"),
    budget: BudgetTexts = None,
    epochs: Epochs = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """The whole way on handwritten digits, in a few minutes on a CPU; nothing is downloaded."""
    _whole_way(Whole("digits", out, tuple(budget or ("middle",)), epochs=epochs, device=device), as_json)


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


for package in (supernet_commands, search_commands, deploy_commands):
    package.register(app)


def main() -> None:
    """The command `nestling`: exit code 0, 2 for the user's mistake (one line), 1 for a bug of ours (a traceback)."""
    from supernet.errors import InputError

    try:
        app()
    except (InputError, OSError) as error:
        print(f"nestling: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
