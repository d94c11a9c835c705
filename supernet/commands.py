"""Commands of this package: spaces, describe, train. Heavy imports wait until a command runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from supernet.data import commands as data_commands

if TYPE_CHECKING:
    from supernet.console import Display
    from supernet.distributed import World
    from supernet.run import Run
    from supernet.start import Start

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Out = Annotated[Path, typer.Option("--out", help="Directory of the run.")]
Data = Annotated[
    str,
    typer.Option(
        "--data",
        help="A folder (FOLDER/class/*.jpg), .tar or .parquet files, what datasets saved, an .npz file, torchvision:NAME, digits, "
        "mnist, fashion-mnist, cifar10 or cifar100 (docs/data.md).",
    ),
]
SpaceName = Annotated[
    str | None,
    typer.Option("--space", help="A space by name (nestling spaces) or YAML file; chosen from the data if left out."),
]
Recipe = Annotated[
    str | None, typer.Option("--recipe", help="A recipe by name or YAML file; chosen from the data if left out.")
]
Epochs = Annotated[int | None, typer.Option("--epochs", min=1, help="Passes over the training images.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Change a key of the recipe: key=value, with dots for nested keys.")
]
Root = Annotated[Path | None, typer.Option("--data-root", help="Where torchvision's sets lie.")]
Download = Annotated[bool, typer.Option("--download", help="Allow torchvision to download its set into --data-root.")]
Init = Annotated[
    str | None,
    typer.Option(
        "--init", help="Begin with trained weights: timm:NAME (fetched by timm), a .safetensors file, or another run."
    ),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Workers = Annotated[int, typer.Option("--workers", min=0, help="Processes that decode training images.")]


MOST_LISTED = 6
"""Choices that a table names one by one."""


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.command(epilog="Example: nestling spaces --json")(spaces)
    app.command(epilog="Example: nestling describe --space attentivenas --arch smallest")(describe)
    app.command(epilog="Example: nestling train --data digits --out runs/digits --epochs 10")(train)
    app.add_typer(data_commands.app)


def spaces(as_json: Json = False) -> None:
    """List the search spaces: how many children, and their range of costs."""
    from supernet import config
    from supernet.console import number_of, print_json, print_table
    from supernet.costs import arch_costs
    from supernet.space import load_space

    rows: list[dict[str, Any]] = []
    for name in config.names("spaces"):
        space = load_space(name)
        ends = [arch_costs(space, arch) for arch in (space.smallest, space.largest)]
        resolutions = next(dimension.choices for dimension in space.dimensions if dimension.name == "resolution")
        rows.append(
            {
                "space": name,
                "family": space.family.config.family,
                "archs": space.size,
                "resolution": list(resolutions),
                "macs": [end["macs"] for end in ends],
                "params": [end["params"] for end in ends],
                "source": space.family.config.source,
            }
        )
    if as_json:
        print_json(rows)
        return
    shown: dict[str, Callable[[Any], str]] = {"archs": number_of, "resolution": _listed, "macs": _range, "params": _range}
    print_table([{name: shown.get(name, str)(value) for name, value in row.items()} for row in rows])


def describe(
    space: Annotated[str, typer.Option("--space", help="A space by name or YAML file.")],
    arch: Annotated[
        str | None, typer.Option("--arch", help="smallest, largest, or a JSON file (ours, or a paper's table entry).")
    ] = None,
    classes: Annotated[int | None, typer.Option("--classes", min=1, help="Number of classes, if not the space's own.")] = None,
    recount: Annotated[bool, typer.Option("--recount", help="Also count the arch with fvcore, on the network itself.")] = False,
    as_json: Json = False,
) -> None:
    """Show a space, or one arch of it, as a table of its stages with macs, params, peak memory and key."""
    from supernet.console import number_of, print_json, print_table
    from supernet.costs import arch_costs
    from supernet.errors import InputError
    from supernet.space import load_space, read_arch

    found = load_space(space, classes=classes)
    if arch is None and recount:
        raise InputError("--recount counts one arch: name it with --arch (smallest, largest or a JSON file)")
    if arch is None:
        ends = {
            name: {"key": end.key, **arch_costs(found, end)}
            for name, end in (("smallest", found.smallest), ("largest", found.largest))
        }
        result = {"space": found.name, "key": found.key, "archs": found.size,
                  "dimensions": {dimension.name: list(dimension.choices) for dimension in found.dimensions}, **ends}  # fmt: skip
        rows = found.family.rows({dimension.name: dimension.choices for dimension in found.dimensions})
        title, end_rows = f"{found.name}: {number_of(found.size)} archs", [{"arch": name, **end} for name, end in ends.items()]
    else:
        chosen = read_arch(found, arch)
        result = {"space": found.name, "key": chosen.key, **arch_costs(found, chosen), "arch": chosen.as_dict()}
        if recount:
            from supernet.recount import recount as count

            result["fvcore"] = count(found, chosen)
        rows = found.family.rows({name: (choice,) for name, choice in chosen})
        title, end_rows = f"{found.name}: {arch}", [{"key": chosen.key, **arch_costs(found, chosen)}]
    if as_json:
        print_json(result)
        return
    print_table(rows, title)
    print_table(end_rows)
    if "fvcore" in result:
        print(f"fvcore counts {result['fvcore']}")
    print("macs: multiply-accumulates (the papers' FLOPs); peak memory: live fp32 activations; all at batch 1")


def train(
    out: Out, data: Data = "", space: SpaceName = None, recipe: Recipe = None, epochs: Epochs = None, set_: Set = None,
    init: Init = None, data_root: Root = None, download: Download = False, device: Device = "auto", workers: Workers = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out from its last whole checkpoint; --epochs and "
                                         "--set change what may change.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell memory, work and time from a few steps; write nothing.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write the curves for TensorBoard.")] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Train a supernet: every child of the space at once, in one set of weights. Several processes: start it by torchrun."""
    from supernet import device as devices
    from supernet import start as starting
    from supernet.console import Display, print_json
    from supernet.costs import arch_costs
    from supernet.distributed import world as joined
    from supernet.errors import InputError
    from supernet.recipe import parse_overrides

    where, changes = devices.choose(device), parse_overrides(set_ or [])
    if resume and (data or space or recipe or init or data_root or download or dry_run):
        raise InputError("--resume continues the run as it was configured: leave out --data, --data-root, --download, --space, "
                         "--recipe, --init and --dry-run")  # fmt: skip
    if not (resume or data):
        raise InputError("give the images with --data (a folder, an .npz file, or the name of a known set), or --resume")

    def begin(path: Path) -> starting.Start:
        if resume:
            return starting.resume(path, {**changes, **({"epochs": epochs} if epochs is not None else {})})
        return starting.start(data, path, space=space, recipe=recipe, epochs=epochs, overrides=changes, root=data_root,
                              download=download, device=where, init=init)  # fmt: skip

    if dry_run and int(os.environ.get("RANK", "0")):
        return  # of several processes, one tells
    if dry_run:
        _rehearsed(out, begin, where, workers, as_json)
        return
    devices.keep_memory()
    with joined(where) as world:
        display = Display(quiet=not world.main)
        begun = starting.together(world, out, lambda: begin(out))
        for reason in begun.reasons:
            display.say(reason)
        train_shown(begun.run, world.device, workers, display, world=world, tensorboard=tensorboard)
        if not world.main:
            return
        if as_json:
            print_json({"run": str(out), "space": begun.run.space.key, "weights_sha256": begun.run.weights_hash})
        else:
            ends = [arch_costs(begun.run.space, arch)["macs"] for arch in (begun.run.space.smallest, begun.run.space.largest)]
            display.say(f"trained: {out}. Next: nestling search {out} --budget 'macs<={sum(ends) / 2e6:.3g}M'")


def _rehearsed(out: Path, begin: Callable[[Path], Start], device: str, workers: int, as_json: bool) -> None:
    """Begin the run in a folder that goes away, make a few steps, tell what the whole of it takes."""
    import tempfile

    from supernet.console import Display, print_json
    from supernet.errors import InputError
    from supernet.rehearse import rehearse

    if (out / "config.json").exists():
        raise InputError(f"{out} holds a run already: --dry-run is for one that is not begun; choose another --out")
    display = Display()
    with tempfile.TemporaryDirectory() as folder:
        begun = begin(Path(folder) / "run")
        for reason in begun.reasons:
            display.say(reason)
        found = rehearse(begun.run, device=device, workers=workers)
    if as_json:
        print_json(found.as_dict())
        return
    held = ", ".join(f"{name} {size / 2**20:,.1f}" for name, size in found.memory_bytes.items() if size)
    print(f"memory: about {sum(found.memory_bytes.values()) / 2**20:,.1f} MiB ({held})")
    print(
        f"work: {found.macs_per_step / 1e6:,.4g} million multiply-accumulates a step of {found.images_per_step} images, "
        f"{found.steps:,} steps"
    )
    speed = found.images_per_step / found.seconds_per_step
    print(
        f"time: about {_duration(found.seconds)} ({found.seconds_per_step:.3g} s a step, {speed:,.0f} images/s, median of "
        f"{found.timed_steps}; checkpoints and looks at held-out images not counted)"
    )
    print("nothing was written")


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86_400.0), ("hours", 3_600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def train_shown(
    run: Run, device: str, workers: int, display: Display, *, world: World | None = None, tensorboard: bool = False
) -> None:  # fmt: skip
    """Train with a progress line: images/s, time left, how the largest and the smallest child do."""
    from supernet import checkpoint
    from supernet.board import Board
    from supernet.train import Progress
    from supernet.train import train as train_run

    if run.finished:
        display.say(f"{run.path} has all of its {run.recipe.epochs} epochs; more of them (--epochs) make it longer")
        return
    board = Board(run.path) if tensorboard and (world is None or world.main) else None
    show = run.task.show
    with display.stage("train") as stage:
        speed = doing = ""

        def progress(now: Progress) -> None:
            nonlocal speed, doing
            for event in now.events:
                display.say(event)
            line = now.line or {}
            if "images_per_s" in line:
                speed = f"{line['images_per_s']:,.0f} images/s"
            if "validation" in line:  # of held-out images; until there is one, of the batch
                doing = "held out: " + ", ".join(f"{role} {show(value)}" for role, value in line["validation"].items())
            elif "children" in line and not doing.startswith("held out"):
                doing = ", ".join(f"{role} {show(child[run.task.metric])}" for role, child in line["children"].items())
            if board is not None and line:
                board.add(line)
            stage.update(now.step, now.steps, f"{speed}  {doing}")

        try:
            train_run(run, device=device, workers=workers, progress=progress, world=world)
        except KeyboardInterrupt:
            newest = checkpoint.latest(run.checkpoints)
            kept = f"its newest checkpoint is of step {checkpoint.step_of(newest)}" if newest else "it has no checkpoint yet"
            display.say(f"interrupted: {kept}; nestling train --resume --out {run.path} goes on from there")
            raise typer.Exit(130) from None
        finally:
            if board is not None:
                board.close()


def _range(ends: list[int]) -> str:
    low, high = (f"{end / 1e6:,.2f}" for end in ends)
    return f"{low} M" if low == high else f"{low} to {high} M"


def _listed(choices: list[int]) -> str:
    """The choices, or, of many, the ends and how many."""
    if len(choices) > MOST_LISTED:
        return f"{choices[0]} to {choices[-1]} ({len(choices)})"
    return ", ".join(map(str, choices))
