"""An Android device as a target, through the user's own adb. Experimental: tried with a scripted adb only.

Either the user's `onnxruntime_perf_test` for the device is pushed and run on each model, or a Python on the device talks with us as any
runner does. `adb shell` gives what it is told to a shell on the device, so all of it is quoted; files there have names of our own.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import secrets
import shlex
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from deploy import grammar
from deploy.far import one_line
from deploy.targets import MOST_SECONDS, Each, Machine, Model, Weight
from deploy.timing import THROTTLED, WIDTH, Timing
from supernet.errors import InputError

FOLDER = "/data/local/tmp"
WAIT_SECONDS, PUSH_SECONDS, RUN_SECONDS = 60.0, 600.0, 600.0
"""After which a command, a copy and a run are given up."""
ROUNDS = 5
FIRST_RUNS, LEAST_RUNS, MOST_RUNS = 10, 20, 2000
ROUND_MS = 1000.0

_AVERAGE = re.compile(r"^Average inference time cost(?: total)?: ([0-9.eE+-]+) ms", re.MULTILINE)
_LATENCY = re.compile(r"^(Min|Max|P[0-9]+) Latency: ([0-9.eE+-]+) s", re.MULTILINE)


@dataclass(frozen=True)
class Adb(Machine):
    """A device by its serial number (left out: the only one), with either of `binary` (a path here) and `python` (a path there)."""

    serial: str = ""
    binary: str | None = None
    python: str | None = None

    kind: ClassVar[str] = "adb"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.serial:
            grammar.serial(self.serial)
        if (self.binary is None) == (self.python is None):
            raise InputError(
                "a target behind adb needs one of ?binary=PATH (onnxruntime_perf_test, here) and ?python=PATH (on the device)"
            )
        if self.binary is not None:
            grammar.local_path(self.binary, "onnxruntime_perf_test")
        if self.python is not None:
            grammar.far_path(self.python, "the device's Python")

    @property
    def name(self) -> str:
        """The serial number, with what the target was told."""
        return (f"adb:{self.serial}" if self.serial else "adb") + super().name.removeprefix(self.kind)

    @property
    def clock(self) -> str:
        """The wall clock: a perf test knows no other, and both ways shall give the same figure."""
        return "wall"

    def command(self, arguments: Sequence[str]) -> list[str]:
        """The adb that runs the device's Python with these arguments."""
        assert self.python is not None
        return ["adb", "-s", self._device(), "shell", "-T", f"exec {shlex.join([self.python, *arguments])}"]

    def measure(
        self, models: Sequence[Model], *, width: float = WIDTH, most_seconds: float = MOST_SECONDS, each: Each | None = None
    ) -> list[Timing]:
        """Timings of all models by the wall clock, one after the other, each for at most about `most_seconds`. Raises `InputError`."""
        if self.binary is None:
            return super().measure(models, width=width, most_seconds=most_seconds, each=each)
        found: list[Timing] = []
        with self._folder() if models else contextlib.nullcontext("") as folder:
            for at, model in enumerate(models):
                found.append(self._measured(folder, at, model, width, most_seconds))
                if each:
                    each(at, found[-1])
        return found

    def weigh(self, models: Sequence[Model], *, batch: int = 8, seconds: float = 1.0) -> list[Weight]:
        """As of any runner. Raises `InputError` where a perf test measures, which weighs nothing."""
        if self.binary is not None:
            raise InputError(
                f"{self.name} measures by onnxruntime_perf_test, which weighs nothing: give ?python= in place of ?binary="
            )
        return super().weigh(models, batch=batch, seconds=seconds)

    def conditions(self) -> dict[str, Any]:
        """As of any runner; unknown where a perf test measures."""
        unknown = dict.fromkeys(("governor", "frequency_mhz", "temperature_c", "load"))
        return super().conditions() if self.binary is None else unknown

    def _hello(self) -> dict[str, Any]:
        facts = {name: self._shell("getprop", f"ro.{name}") for name in ("product.model", "board.platform", "product.cpu.abi")}
        processor = one_line(f"{facts['product.model']} ({facts['board.platform']})", 200)
        if self.binary is None:
            return {**super()._hello(), "processor": processor}
        cores = self._shell("nproc").strip()
        if not cores.isdigit() or not 1 <= int(cores) <= 1 << 20:
            raise InputError(f"{self.name} says that it has {cores[:40]!a} cores: see what `adb shell nproc` says")
        digest = hashlib.sha256(self._binary().read_bytes()).hexdigest()[:12]
        return {"processor": processor, "machine": one_line(facts["product.cpu.abi"], 100), "cores": int(cores),
                "runtime": f"onnxruntime_perf_test {digest}"}  # fmt: skip

    def _binary(self) -> Path:
        path = Path(self.binary or "")
        if not path.is_file():
            raise InputError(
                f"{self.name}: {self.binary!r} is no file: correct ?binary=, the onnxruntime_perf_test for the device"
            )
        return path.resolve()

    @contextlib.contextmanager
    def _folder(self) -> Iterator[str]:
        """A fresh folder on the device that holds the perf test, and goes in any case."""
        folder = f"{FOLDER}/nestling-{secrets.token_hex(8)}"
        binary = self._binary()
        self._shell("mkdir", "-m", "700", folder)
        try:
            self._adb("push", str(binary), f"{folder}/perf_test", seconds=PUSH_SECONDS)
            self._shell("chmod", "700", f"{folder}/perf_test")
            yield folder
        finally:
            with contextlib.suppress(InputError):  # where the device is gone, what ended the measurement says so
                self._shell("rm", "-rf", folder)

    def _measured(self, folder: str, at: int, model: Model, width: float, most_seconds: float) -> Timing:
        there = f"{folder}/{at}.onnx"
        with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
            file.write(model.data)
            file.flush()
            self._adb("push", file.name, there, seconds=PUSH_SECONDS)
        end, rounds = time.monotonic() + most_seconds, list[dict[str, float]]()
        try:
            first = self._round(folder, there, FIRST_RUNS)
            runs = min(MOST_RUNS, max(LEAST_RUNS, round(ROUND_MS / first["mean"])))
            while not rounds or (len(rounds) < ROUNDS and time.monotonic() < end):
                rounds.append(self._round(folder, there, runs))
        finally:
            with contextlib.suppress(InputError):
                self._shell("rm", "-f", there)
        return timing_of(rounds, runs, width)

    def _round(self, folder: str, model: str, runs: int) -> dict[str, float]:
        said = self._shell(f"{folder}/perf_test", "-e", "cpu", "-m", "times", "-r", str(runs), "-x", str(self.threads), "-I", model,
                           seconds=RUN_SECONDS)  # fmt: skip
        try:
            return parse_perf_test(said)
        except ValueError as error:
            raise InputError(
                f"{self.name}: onnxruntime_perf_test gave no latency ({error}): see that it runs by hand there"
            ) from error

    def _shell(self, *arguments: str, seconds: float = WAIT_SECONDS) -> str:
        return self._adb("shell", "-T", shlex.join(arguments), seconds=seconds).strip()

    def _adb(self, *arguments: str, seconds: float) -> str:
        return self._run(["adb", "-s", self._device(), *arguments], seconds)

    def _device(self) -> str:
        """The serial number of the device that is meant. Raises `InputError` where it is not there, not ready, or one of several."""
        rows = [line.split() for line in self._run(["adb", "devices"], WAIT_SECONDS).splitlines() if "\t" in line]
        states = {row[0]: " ".join(row[1:]) for row in rows if len(row) > 1}
        if not states or (self.serial and self.serial not in states):
            listed = one_line(", ".join(states), 200) or "none"
            raise InputError(f"{self.name}: there is no such device (adb lists {listed}): connect it, with USB debugging on")
        if not self.serial and len(states) > 1:
            raise InputError(
                f"{self.name}: there are several devices ({one_line(', '.join(states), 200)}): name one, as adb:SERIAL"
            )
        serial = self.serial or next(iter(states))
        if states[serial] != "device":
            raise InputError(
                f"{self.name}: the device is {one_line(states[serial], 80)}: unlock it and allow USB debugging from here"
            )
        return grammar.serial(serial)

    def _run(self, command: list[str], seconds: float) -> str:
        try:
            done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=seconds, check=False)
        except subprocess.TimeoutExpired as error:
            raise InputError(
                f"{self.name}: `adb` did not end within {seconds:.0f} s: see whether the device is still there"
            ) from error
        except OSError as error:
            raise InputError(
                f"{self.name}: adb cannot be started ({error.strerror}): install Android's platform tools"
            ) from error
        said = done.stdout.decode(errors="replace")
        if done.returncode:
            words = [line for line in (done.stderr.decode(errors="replace") + said).splitlines() if line.strip()]
            last = one_line(words[-1], 300) if words else f"exit code {done.returncode}"
            advice = "make room there" if "No space" in last else "see that the device is still there"
            raise InputError(f"{self.name}: adb {command[3] if len(command) > 3 else command[1]} failed ({last}): {advice}")
        return said


def parse_perf_test(text: str) -> dict[str, float]:
    """What onnxruntime_perf_test printed, in ms: mean, Min and P50, P90, ... Raises `ValueError` where that is no measurement."""
    average = _AVERAGE.search(text)
    found = {name: 1e3 * float(value) for name, value in _LATENCY.findall(text)}
    if average is None or not {"Min", "P50", "P95"} <= set(found):
        raise ValueError(f"it printed {one_line(text, 80)!a}")
    found["mean"] = float(average[1])
    if not 0 < found["Min"] <= found["P50"] <= found["P95"] < float("inf") or not 0 < found["mean"] < float("inf"):
        raise ValueError(f"least {found['Min']:g} ms, median {found['P50']:g} ms, mean {found['mean']:g} ms cannot be")
    return found


def timing_of(rounds: Sequence[dict[str, float]], runs: int, width: float) -> Timing:
    """A timing of several launches of a perf test, `runs` inferences each.

    The latency is the least time. Only quantiles are known, so the upper end is the least median: half of a launch was as quick.
    """
    least, quiet = min(each["Min"] for each in rounds), min(each["P50"] for each in rounds)
    median = statistics.median(each["P50"] for each in rounds)
    mean = statistics.fmean(each["mean"] for each in rounds)
    stable, throttled = quiet - least <= width * least, mean > THROTTLED * median
    said = (
        f"half of the times are {100 * (quiet - least) / least:.1f} % above the least or more, {100 * width:.3g} % is asked for"
    )
    why = "" if stable else said + (": the device is throttled" if throttled else ": the times vary")
    p95 = max(median, statistics.median(each["P95"] for each in rounds))
    return Timing(latency_ms=least, low_ms=least, high_ms=quiet, min_ms=least, median_ms=median, mean_ms=mean, p95_ms=p95,
                  wall_min_ms=least, wall_median_ms=median, wall_mean_ms=mean, samples=runs * len(rounds), stable=stable,
                  throttled=throttled, why=why, clock="wall", load=0.0, steal=0.0)  # fmt: skip
