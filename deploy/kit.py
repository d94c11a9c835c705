"""Kits: one file that measures models on a machine that nothing here can reach, and the results that come back from it.

A kit is a zip with the models, `job.json`, the two files that measure and a README. `python kit.zip` runs it, and so does
`python FOLDER` where it was unpacked; `results.json` appears beside it. Nothing that comes back is ever run.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from deploy import far, runner, timing
from deploy.far import machine_of
from deploy.targets import CLOCKS, MOST_SECONDS, Each, Machine, Model, fingerprinted
from deploy.timing import WIDTH, Timing
from supernet import durable
from supernet.errors import InputError

MOST_BYTES = 64 << 20
"""Results are some hundred bytes a model; a larger file is something else."""

MAIN = f'''"""Times the models of this kit on this machine."""

import os
import sys

if sys.version_info < {far.OLDEST}:
    found = (sys.executable, sys.version.split()[0])
    sys.exit("error: this kit needs Python {far.OLDEST[0]}.{far.OLDEST[1]} or later, but %s is %s" % found)
here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, here)
from deploy import kit_runner

sys.exit(kit_runner.main(here))
'''

README = f"""This kit times neural networks on the machine where it is run.

It needs Python {far.OLDEST[0]}.{far.OLDEST[1]} or later with numpy and %(runtime)s:

    python3 -m pip install numpy %(runtime)s

Run it, with nothing else running beside it:

    python3 kit.zip

or unpack it and run its folder: python3 FOLDER. It reads only what is in the kit and writes only results.json, beside the zip or into
the folder. Stopped in the middle and run again, it goes on where it was. Bring results.json back.

It holds %(models)d models, %(threads)d thread(s), the clock "%(clock)s", and takes at most about %(minutes)d minutes.
"""


@dataclass(frozen=True)
class Kit(Machine):
    """A machine that somebody runs a kit on. It is measured by `write_kit` and `read_results`, not by `measure`."""

    kind: ClassVar[str] = "kit"

    def fingerprint(self) -> dict[str, Any]:
        """Raises `InputError`: only the results of a kit know it."""
        raise self._elsewhere()

    def measure(
        self, models: Sequence[Model], *, width: float = WIDTH, most_seconds: float = MOST_SECONDS, each: Each | None = None
    ) -> list[Timing]:
        """Raises `InputError`: nothing here reaches the machine."""
        raise self._elsewhere()

    def command(self, arguments: Sequence[str]) -> list[str]:
        """Raises `InputError`: nothing here starts a Python there."""
        raise self._elsewhere()

    def _elsewhere(self) -> InputError:
        return InputError(
            f"{self.name} is a machine that nothing here reaches: write a kit, run it there, and import its results.json"
        )


@dataclass(frozen=True)
class Results:
    """What came back: the machine's fingerprint as that of a target, and the timing of each model by its position."""

    fingerprint: Mapping[str, Any]
    timings: Mapping[int, Timing]


def write_kit(
    path: Path, models: Iterable[tuple[Model, Mapping[str, Any]]], settings: Machine, *, about: Mapping[str, Any] | None = None,
    width: float = WIDTH, most_seconds: float = MOST_SECONDS,
) -> dict[str, Any]:  # fmt: skip
    """Write a kit that times models as `settings` says, a group of them for at most `most_seconds`; gives back its job.

    With each model come notes of its own for the job, such as the "group" that it is timed in (`runner.timed`); `about` are notes on
    the whole. Models are taken one at a time, so there may be more than fit in memory, and one of the same bytes is stored once.
    Raises `InputError` without models, `durable.WriteError` where it cannot be written.
    """
    job: dict[str, Any] = {"format": runner.FORMAT, "runtime": settings.runtime, "threads": settings.threads, "clock": settings.clock,
                           "precision": settings.precision, "width": width, "most_seconds": most_seconds, "about": dict(about or {}),
                           "models": []}  # fmt: skip
    part = path.with_name(f".{path.name}.part")
    stored: dict[str, str] = {}
    try:
        with (
            durable.writing(path),
            part.open("wb") as file,
            zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as zipped,
        ):
            for at, (model, notes) in enumerate(models):
                digest = hashlib.sha256(model.data).hexdigest()
                if digest not in stored:
                    stored[digest] = f"models/{at:05d}.onnx"
                    _add(zipped, stored[digest], model.data)
                job["models"].append({"file": stored[digest], "sha256": digest, "shapes": [model.input_shape], **notes})
            if not job["models"]:
                raise InputError("a kit holds models to time, but got none: choose children first")
            job["hash"] = hash_of(job)
            for name, data in _texts(job).items():
                _add(zipped, name, data)
        with durable.writing(path):
            with part.open("rb") as whole:
                os.fsync(whole.fileno())
            part.replace(path)
            durable.sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)
    return job


def job_of(path: Path) -> dict[str, Any]:
    """The job of a kit that was written. Raises `InputError` for what is none."""
    try:
        with zipfile.ZipFile(path) as zipped:
            if zipped.getinfo("job.json").file_size > MOST_BYTES:
                raise ValueError("its job is too large")
            job = json.loads(zipped.read("job.json"))
        if job["format"] != runner.FORMAT or job["hash"] != hash_of(job):
            raise ValueError("its job is of another version, or was changed")
        return dict(job)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, zipfile.BadZipFile, NotImplementedError) as error:
        raise InputError(f"{path} is no kit of this version ({error}): give the zip that was run there") from error


def _texts(job: Mapping[str, Any]) -> dict[str, bytes]:
    """All of a kit but its models."""
    count, seconds = len(job["models"]), job["most_seconds"]
    words = {"runtime": runner.MODULES[job["runtime"]], "models": count, "threads": job["threads"], "clock": CLOCKS[job["clock"]],
             "minutes": 1 + count * seconds // runner.AT_ONCE // 60}  # fmt: skip
    here = Path(timing.__file__).parent
    code = {f"deploy/{name}.py": (here / f"{name}.py").read_bytes() for name in ("timing", "runner", "kit_runner")}
    return {"__main__.py": MAIN.encode(), "README.txt": (README % words).encode(), "job.json": json.dumps(job, indent=1).encode(),
            "deploy/__init__.py": b"", **code}  # fmt: skip


def _add(zipped: zipfile.ZipFile, name: str, data: bytes) -> None:
    entry = zipfile.ZipInfo(name)  # of no date: the same kit has the same bytes
    entry.compress_type = zipfile.ZIP_DEFLATED
    zipped.writestr(entry, data, compresslevel=1)


def hash_of(job: Mapping[str, Any]) -> str:
    """By which results are known to be a kit's: of all of its job but the hash itself."""
    plain = {name: value for name, value in job.items() if name != "hash"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def read_results(path: Path, job: Mapping[str, Any], *, partly: bool = False) -> Results:
    """The results of a kit with this job; all of them, or `partly` those that are there.

    Raises `InputError` for another kit's results, damaged ones, and missing models.
    """
    value = _read(path)
    if value.get("format") != runner.FORMAT:
        raise InputError(
            f"{path} has format {_shown(value.get('format'))}, this version reads {runner.FORMAT}: run its own version's kit"
        )
    if value.get("job") != job["hash"]:
        raise InputError(
            f"{path} is of another kit ({_shown(value.get('job'))}) than this one ({job['hash']}): bring this kit's results.json"
        )
    count, given = len(job["models"]), value.get("timings")
    try:
        machine = machine_of(value.get("fingerprint"))
        if machine["runtime"].split(" ")[0] != job["runtime"]:
            raise ValueError(f"it is of the runtime {machine['runtime']}")
        if not isinstance(given, dict):
            raise ValueError("there are no timings")
        timings = {_position(key, count): _timing(each, job["clock"]) for key, each in given.items()}
    except ValueError as error:
        raise InputError(
            f"{path} holds what no kit writes ({error}): run the kit again, without changing its results"
        ) from error
    if len(timings) < count and not partly:
        raise InputError(
            f"{path} holds {len(timings)} of {count} models, {count - len(timings)} are missing: run the kit again, it goes on"
        )
    return Results(fingerprinted(machine, _Settings(job["threads"], job["clock"], job["precision"])), timings)


@dataclass(frozen=True)
class _Settings:
    threads: int
    clock: str
    precision: str


def _read(path: Path) -> dict[str, Any]:
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise InputError(
                f"{path} has {size} bytes, but results have at most {MOST_BYTES}: give the results.json of the kit"
            )
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): give the results.json of the kit") from error
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no whole results.json: copy it again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is no results.json: give the one that the kit wrote")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key stands there twice")
    return dict(pairs)


def _position(key: str, count: int) -> int:
    if not (key.isascii() and key.isdigit() and len(key) < 9 and str(int(key)) == key and int(key) < count):
        raise ValueError(f"there is no model {_shown(key)}")
    return int(key)


def _timing(value: Any, clock: str) -> Timing:
    found = Timing.from_dict(value)
    if found.clock != clock:
        raise ValueError(f"a timing is by the clock {found.clock}, not {clock}")
    return found


def _shown(value: Any) -> str:
    return ascii(value)[:60]
