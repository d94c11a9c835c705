"""The command profile: what the blocks and children of a space take on a target, as a latency model in a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from supernet import durable
from supernet.errors import InputError

if TYPE_CHECKING:
    from deploy.latency import LatencyModel
    from supernet.space import Space


def profile(
    space: Annotated[str, typer.Argument(metavar="SPACE|RUN", help="A search space by name or YAML file, or a run directory.")],
    target: Annotated[
        str, typer.Option("--target", help="local, local:4, ssh://user@host?threads=4, adb:SERIAL?..., or kit: a zip to run.")
    ] = "local",
    out: Annotated[Path | None, typer.Option("--out", help="The model's file; in a RUN, where its searches look for it.")] = None,
    precision: Annotated[str, typer.Option("--precision", help="fp32 or int8: of the models that are timed.")] = "fp32",
    children: Annotated[int, typer.Option("--children", min=2, help="Whole children that the model is fitted to.")] = 20,
    held_out: Annotated[int, typer.Option("--held-out", min=2, help="Other whole children, that prove its error.")] = 20,
    blocks: Annotated[bool, typer.Option("--blocks/--no-blocks", help="Time every distinct block too (minutes).")] = True,
    kit: Annotated[Path | None, typer.Option("--kit", help="With --import: the kit that was run.")] = None,
    import_: Annotated[Path | None, typer.Option("--import", help="The results.json that a kit's run wrote.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:  # fmt: skip
    """Time every distinct block of a space, and whole children, on a target; a model of their latencies, with its proven error.

    Cut off, the same command goes on where it was. With `--target kit` it writes a zip to be run elsewhere (`python kit.zip`); what
    that run wrote is taken with `--import results.json --kit kit.zip`.
    """
    from deploy.kit import Kit
    from deploy.places import parse_target
    from deploy.plan import Plan
    from deploy.profiling import imported, write_profile_kit

    found, run = _space(space)
    kits = target.partition("?")[0] == "kit" and import_ is None
    if out is not None or kits:
        _refuse_other(out or Path("kit.zip"), kit=kits)
    if (kit is None) != (import_ is None):
        raise InputError(
            "--import RESULTS and --kit KIT belong together: give the zip that was run and the results.json of its run"
        )
    if kit is not None and import_ is not None:
        _tell(found, imported(found, kit, import_), out, run, as_json)
        return
    place = parse_target(target, precision=precision)
    if isinstance(place, Kit):
        zipped = out or Path("kit.zip")
        count = write_profile_kit(Plan(found, children, held_out, 0, blocks, precision), place, zipped)
        print(f"{zipped}: {count} models. Run it there with `python3 {zipped.name}`, bring results.json back, then: "
              f"nestling profile {space} --kit {zipped} --import results.json")  # fmt: skip
        return
    from deploy.profiling import profile as measured
    from supernet.console import Display

    fingerprint = place.fingerprint()
    path = out or _usual(run, fingerprint["hash"])
    with Display().stage("timing") as stage:
        model = measured(found, place, children=children, held_out=held_out, blocks=blocks, log=path.with_suffix(".log"),
                         progress=lambda text: stage.update(0, None, text))  # fmt: skip
    _tell(found, model, path, run, as_json)
    path.with_suffix(".log").unlink(missing_ok=True)


def _space(text: str) -> tuple[Space, Path | None]:
    """A space, and the run that it is of, if any."""
    from supernet.run import Run
    from supernet.space import load_space

    path = Path(text)
    return (Run.open(path).space, path) if path.is_dir() else (load_space(text), None)


def _refuse_other(out: Path, *, kit: bool) -> None:
    """Raise `InputError` where a file at `out` that is something else would be lost, or nothing can be written there."""
    import json
    import zipfile

    durable.refuse_unwritable(out.parent)
    if out.suffix == ".log":
        raise InputError(f"timings are kept in a file that ends in .log until they are done: choose another --out than {out}")
    if not out.parent.is_dir():
        raise InputError(f"{out.parent} is no folder: make it, or choose another --out")
    if not out.exists():
        return
    try:
        if kit:
            with zipfile.ZipFile(out) as zipped:
                ours = "job.json" in zipped.namelist()
        else:
            ours = "coefficients" in json.loads(out.read_text())
    except (OSError, ValueError, TypeError, zipfile.BadZipFile):
        ours = False
    if not ours:
        what = "kit" if kit else "latency model"
        raise InputError(f"{out} exists and is no {what}, so that it would be lost: choose another --out")


def _usual(run: Path | None, hash_: str) -> Path:
    """Where a model goes that is given no file."""
    if run is None:
        return Path(f"{hash_}.latency.json")
    (run / "search").mkdir(exist_ok=True)
    return run / "search" / f"latency-{hash_}.json"


def _tell(space: Space, model: LatencyModel, out: Path | None, run: Path | None, as_json: bool) -> None:
    """Save the model and say how good it is."""
    from deploy.latency import COVERAGE, GATE
    from supernet.console import print_json

    path = out or _usual(run, model.target["hash"])
    model.save(path)
    if as_json:
        print_json({"file": str(path), "mape": model.mape, "worst": model.worst, "spearman": model.spearman, "trusted": model.trusted,
                    "held_out": len(model.held_out), "blocks": len(model.blocks), "smallest_ms": model.smallest_ms,
                    "largest_ms": model.largest_ms, "drift": model.drift, "minutes": model.minutes,
                    "target": model.target})  # fmt: skip
        return
    print(f"{path}: {model.target['processor']}, {model.target['runtime']}, {model.target['threads']} thread(s), "
          f"{model.target['precision']}; {model.smallest_ms:.4g} to {model.largest_ms:.4g} ms")  # fmt: skip
    print(f"{model.summary()}; {COVERAGE:.0%} of children lie within -{1 - model.lower_factor:.1%} to +{model.upper_factor - 1:.1%} of "
          "what is predicted")  # fmt: skip
    if model.drift > 1.2:
        print(f"the device was {model.drift:.2f} times as slow at its slowest as at its fastest while it was measured (heat, other "
              "programs); that is taken out of the times")  # fmt: skip
    if not model.trusted:
        print(f"the error is above {GATE:.0%}: {model.suspect(space)}; a search measures its candidates directly then")
