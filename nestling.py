"""Nestling's front door: train one supernet, find a child for a budget, ship it.

    run = nestling.train("photos/", out="runs/photos")
    found = nestling.search(run, budgets=["latency_ms<=8"])
    bundle = nestling.export(found.best, out="my-model")
    probabilities = bundle.predict(["photo.jpg"])

The command line joins the commands of the three packages and adds `run` (the whole way) and `demo` (`run` on handwritten digits).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deploy import commands as deploy_commands
from search import commands as search_commands
from search.commands import BudgetTexts, SearchName, Threads
from supernet import commands as supernet_commands
from supernet.commands import Data, Device, Download, Epochs, Init, Json, Out, Recipe, Root, Set, SpaceName, Workers

if TYPE_CHECKING:
    from deploy.bundle import Bundle
    from deploy.targets import Target
    from search.found import Child, Found
    from search.objective import Objective
    from search.whole import Whole
    from supernet.run import Run

__version__ = "0.1.0"
__all__ = ["export", "main", "open_bundle", "open_run", "run", "search", "train"]

app = typer.Typer(
    name="nestling", help=__doc__.splitlines()[0], no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip


# --- from Python ---


def train(
    data: str | Path, *, out: str | Path, space: str | None = None, recipe: str | None = None, epochs: int | None = None,
    overrides: Mapping[str, Any] | None = None, init: str | None = None, data_root: str | Path | None = None, download: bool = False,
    device: str = "auto", workers: int = 0, resume: bool = False,
) -> Run:  # fmt: skip
    """Train a supernet on a folder of images, an .npz file or a known set; returns the run in the directory `out`.

    `init` names weights to begin with: timm:NAME, a safetensors file or another run's directory. With `resume`, a run that is in
    `out` already is continued, bit-equal on a CPU, with what its recipe allows to change (`supernet.recipe.OnResume`) as `overrides`
    and `epochs` say. Raises `supernet.InputError`.
    """
    from supernet import device as devices
    from supernet import start as starting
    from supernet.run import Run
    from supernet.train import train as train_run

    where, path = devices.choose(device), Path(out)
    if resume and (path / "config.json").exists():
        starting.refuse_other(Run.open(path), str(data), space=space, recipe=recipe, init=init, overrides=overrides)
        begun = starting.resume(path, {**(overrides or {}), **({"epochs": epochs} if epochs is not None else {})})
    else:
        begun = starting.start(str(data), path, space=space, recipe=recipe, epochs=epochs, overrides=overrides,
                               root=Path(data_root) if data_root else None, download=download, device=where, init=init)  # fmt: skip
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
    run: Run | str | Path, budgets: str | Sequence[str] = (), *, children: Sequence[str] = (), front: int = 0,
    objective: Objective | str | None = None, targets: Mapping[str, Target | str] | None = None,
    latency: Mapping[str | None, str | Path] | None = None, threads: int = 1, device: str = "auto", settings: str = "default",
    overrides: Mapping[str, Any] | None = None,
) -> Found:  # fmt: skip
    """The best child of a run that meets every budget by measurement on this machine; more of them in `Found.answers`.

    `children`: for each text such as "macs<=50M, params<=2M" the best child that meets these too; `front`: so many, spread over the
    range of costs. `objective`: what is to be largest, where that is not the settings' (`search.objective`). `targets`: where budgets
    such as "latency_ms@NAME<=8" are measured, objects or texts such as "ssh://pi@board"; `latency`: files of latency models that were
    measured before, by target (None: this machine). `settings` and `overrides`: a search configuration. Raises `supernet.InputError`.
    """
    from deploy.places import parse_target
    from deploy.targets import Local
    from search.loop import Asked
    from search.loop import search as search_loop
    from search.settings import load_search_config
    from supernet import device as devices
    from supernet.run import Run

    texts = (budgets,) if isinstance(budgets, str) else tuple(budgets)
    if isinstance(objective, str):
        overrides, objective = {**(overrides or {}), "objective": objective}, None
    given = (targets or {}).items()
    places: dict[str | None, Target] = {name: parse_target(at) if isinstance(at, str) else at for name, at in given}
    places[None] = Local(threads)
    files = {name: Path(path) for name, path in (latency or {}).items()}
    asked = Asked(texts, tuple(children), front, load_search_config(settings, overrides), places, objective, files)
    return search_loop(run if isinstance(run, Run) else Run.open(Path(run)), asked, device=devices.choose(device))


def export(child: Child, out: str | Path, *, split: str = "test") -> Bundle:
    """Export a child that a search found; verified on image files. Raises `deploy.verify.VerificationError` on any mismatch."""
    from deploy.ship import ship
    from supernet.run import Run

    latencies = [latency.as_dict() for latency in child.latencies.values()]
    return ship(Run.open(child.run), child.arch, Path(out), split=split, latencies=latencies)


def run(
    data: str | Path, *, out: str | Path, budgets: str | Sequence[str] = (), space: str | None = None, recipe: str | None = None,
    epochs: int | None = None, overrides: Mapping[str, Any] | None = None, init: str | None = None,
    data_root: str | Path | None = None, download: bool = False, device: str = "auto", workers: int = 0, threads: int = 1,
    settings: str = "default",
) -> dict[str, Any]:  # fmt: skip
    """The whole way: train, search, export, verify, report; returns the content of `out/result.json`.

    Called again with the same arguments, it continues where it stopped. Raises `supernet.InputError`.
    """
    from search.whole import Whole, walk

    root, texts = Path(data_root) if data_root else None, (budgets,) if isinstance(budgets, str) else tuple(budgets)
    way = Whole(
        str(data), Path(out), texts, space, recipe, epochs, overrides, root, download, device, workers, threads, settings, init
    )  # fmt: skip
    return walk(way)


# --- from the command line ---


def _whole_way(way: Whole, as_json: bool) -> None:
    from search.whole import walk
    from supernet.console import Display, print_json, print_table
    from supernet.task import task_named

    result = walk(way, Display())
    if as_json:
        print_json(result)
        return
    rows, metric, show = [], result["metric"], task_named(result["task"]).show
    for name in ("chosen", "smallest", "largest"):
        child = result[name]
        predicted = child["predicted_latency_ms"]
        rows.append({
            "child": name,
            f"{metric} (test)": f"{show(child[metric])} ({show(child[f'{metric}_low'])} to {show(child[f'{metric}_high'])})",
            "macs": child["macs"], "params": child["params"], "predicted ms": f"{predicted:.4g}" if predicted is not None else "-",
            "measured latency_ms": f"{child['latency_ms']:.4g} ({child['latency_ms_low']:.4g} to {child['latency_ms_high']:.4g})",
        })  # fmt: skip
    print_table(rows, f"budgets: {', '.join(result['budgets']) or 'none'}; {result['images']} test images; intervals at 95 %")
    for note in result["notes"]:
        print(note)
    print(f"bundle: {way.out / 'bundle'}   report: {way.out / 'report.html'}   figures: {way.out / 'result.json'}")
    print("stages: " + ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in result["seconds"].items()))


@app.command("run", epilog="Example: nestling run --data photos/ --budget 'latency_ms<=8' --out runs/photos")
def run_command(
    data: Data, out: Out, budget: BudgetTexts = None, space: SpaceName = None, recipe: Recipe = None, epochs: Epochs = None,
    set_: Set = None, init: Init = None, data_root: Root = None, download: Download = False, device: Device = "auto",
    workers: Workers = 0, threads: Threads = 1, search_config: SearchName = "default", as_json: Json = False,
) -> None:  # fmt: skip
    """The whole way: train, search within the budgets, export, verify, report. Run again, it continues where it stopped."""
    from search.whole import Whole
    from supernet.recipe import parse_overrides

    _whole_way(
        Whole(data, out, tuple(budget or ()), space, recipe, epochs, parse_overrides(set_ or []), data_root, download, device, workers,
              threads, search_config, init),
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
    from search.whole import Whole

    _whole_way(Whole("digits", out, tuple(budget or ()), epochs=epochs, device=device, middle=not budget), as_json)


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


for package in (supernet_commands, search_commands, deploy_commands):
    package.register(app)


def main() -> None:
    """The command `nestling`: exit code 0, 2 for the user's mistake (one line), 1 for a bug of ours (a traceback)."""
    from supernet.errors import InputError, say

    try:
        app()
    except (InputError, OSError) as error:
        say(error)
        sys.exit(2)


if __name__ == "__main__":
    main()
