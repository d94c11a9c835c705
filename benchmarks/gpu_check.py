"""What can only be seen on a GPU: every check by itself, a row each; nothing else than torch and a checkout is needed.

    python benchmarks/gpu_check.py [--device cuda|cpu] [--quick] [--data FOLDER] [--check NAME ...] [--seconds 480] [--list]

`--data` holds CIFAR-10's train-0.webp (3200 x 3200, a grid of 100 x 100 images by class); without it images are made. A check that
lacks a package or a device is skipped, one that fails or takes too long stops no other. `--device cpu --quick` tries the script.
The last line is JSON with all figures; the exit code is 1 where a check failed.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # a checkout that is not installed

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler tells much, and nothing that is needed

PACKAGES = ("torch", "torchvision", "timm", "huggingface_hub", "numpy", "PIL", "pydantic", "safetensors", "yaml")
"""What training imports; fvcore, onnxruntime, scikit-learn and scipy are not among them."""


@dataclass(frozen=True)
class Check:
    """A function of a module beside this one, and the most seconds that it may take."""

    module: str
    function: str
    seconds: float


CHECKS = {
    "step-attentivenas": Check("step", "step_attentivenas", 100),
    "step-cifar": Check("step", "step_cifar", 60),
    "step-autoformer": Check("step", "step_autoformer", 60),
    "views": Check("views", "views", 60),
    "optimizer": Check("step", "fused_optimizer", 30),
    "evaluation": Check("step", "evaluation", 45),
    "train": Check("run", "train_and_resume", 150),
    "graph": Check("step", "graph", 30),
    "memory": Check("run", "memory_back_off", 60),
    "loader": Check("run", "loader", 60),
    "world": Check("run", "world", 100),
    "compile": Check("step", "compiled", 200),
}


class OutOfTime(BaseException):
    """A check took longer than it may; no `Exception`, so that nothing on the way takes it for an error of its own."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` after so many seconds, between two operations."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise OutOfTime(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    made.add_argument("--quick", action="store_true", help="the smallest of everything: to try the script on a CPU")
    made.add_argument("--data", type=Path, help="folder with train-0.webp")
    made.add_argument("--check", action="append", choices=tuple(CHECKS), help="only this one (may be repeated)")
    made.add_argument("--seconds", type=float, default=480, help="for all checks together")
    made.add_argument("--list", action="store_true", help="name the checks and end")
    return made


def missing() -> list[str]:
    """Packages that are not here."""
    return [name for name in PACKAGES if sys.modules.get(name, ...) is None or importlib.util.find_spec(name) is None]


def one(name: str, given: argparse.Namespace, folder: Path, seconds: float, earlier: dict[str, Any]) -> dict[str, Any]:
    """Make a check, whatever becomes of it: its state, why, how long, and its figures."""
    check, start, figures = CHECKS[name], time.monotonic(), {}
    state, reason = "ok", ""
    try:
        common = importlib.import_module("benchmarks.gpu_checks_common")
        bench = common.Bench(given.device, given.quick, folder / name, given.data, figures, [], earlier)
        bench.folder.mkdir()
        with at_most(min(check.seconds * (2 if given.device == "cpu" else 1), seconds)):
            getattr(importlib.import_module(f"benchmarks.gpu_checks_{check.module}"), check.function)(bench)
        if bench.wrong:
            state, reason = "failed", "; ".join(bench.wrong)
    except ModuleNotFoundError as error:
        state, reason = "skipped", f"there is no package {error.name}"
    except (Exception, OutOfTime) as error:
        skipped = type(error).__name__ == "Skipped"
        state, reason = ("skipped", str(error)) if skipped else ("failed", f"{type(error).__name__}: {_line(error)}")
        if not skipped:
            traceback.print_exc(limit=-6, file=sys.stdout)
    return {"state": state, **({"reason": reason} if reason else {}), "took_s": round(time.monotonic() - start, 1), **figures}


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def row(name: str, found: dict[str, Any]) -> str:
    told = [found["reason"]] if "reason" in found else []
    for key, value in found.items():
        if key not in {"state", "reason", "took_s", "each"}:
            told.append(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}")
    return f"{name:18} {found['state']:8} {found['took_s']:6.1f} s  {', '.join(told)}"


def clean() -> None:
    """Free what a check left on the device, also in the traceback of its error."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        with suppress(RuntimeError):
            torch.cuda.empty_cache()


def usable(device: str) -> bool:
    """Whether the device still computes: after some errors it does not in this process, ever."""
    import torch

    if device == "cpu":
        return True
    try:
        return float(torch.ones(2, device=device).sum()) == 2
    except RuntimeError:
        return False


def elsewhere(names: Sequence[str], given: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Make checks in a fresh process."""
    command = [
        sys.executable,
        __file__,
        "--device",
        given.device,
        "--seconds",
        str(seconds),
        *(["--quick"] if given.quick else []),
    ]
    command += ["--data", str(given.data)] if given.data else []
    command += [word for name in names for word in ("--check", name)]
    print("the device is lost to this process; the others follow from a fresh one", flush=True)
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=seconds + 90, check=False)
        *rows, last = done.stdout.splitlines()
        found: dict[str, Any] = json.loads(last)["checks"]
    except (subprocess.TimeoutExpired, ValueError, KeyError) as error:
        return {
            name: {"state": "failed", "reason": f"a fresh process gave nothing: {_line(error)}", "took_s": 0.0}
            for name in names
        }
    print(*rows, sep="\n", flush=True)
    return found


def run_all(given: argparse.Namespace, results: dict[str, Any]) -> None:
    """Fill `results`, check by check."""
    names = [name for name in CHECKS if name in (given.check or CHECKS)]
    end = time.monotonic() + given.seconds
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for position, name in enumerate(names):
            left = end - time.monotonic()
            if left < 5:
                results[name] = {"state": "skipped", "reason": "no time was left", "took_s": 0.0}
            else:
                results[name] = one(name, given, Path(folder), left, results)
                clean()
            print(row(name, results[name]), flush=True)
            rest = names[position + 1 :]
            if results[name]["state"] == "failed" and rest and not usable(given.device):
                results.update(elsewhere(rest, given, max(10.0, end - time.monotonic())))
                return


def machine(device: str) -> dict[str, Any]:
    """Machine and versions."""
    import torch

    found: dict[str, Any] = {"torch": str(torch.__version__), "missing": missing()}
    try:
        from supernet.run import environment

        found |= environment()
    except ImportError as error:
        found["environment"] = _line(error)
    if device == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "cuda_version": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "gpu_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
        }  # fmt: skip
    return found


def finish(given: argparse.Namespace, results: dict[str, Any], here: dict[str, Any], start: float) -> int:
    states = [found["state"] for found in results.values()]
    counts = ", ".join(f"{states.count(state)} {state}" for state in ("ok", "failed", "skipped"))
    print(f"{counts}; {time.monotonic() - start:.0f} s; {here.get('cuda') or here.get('processor')}; torch {here['torch']}")
    found = {"device": given.device, "quick": given.quick, "checks": results, "machine": here}
    print(json.dumps({"benchmark": "gpu_check", **found}), flush=True)
    return int("failed" in states)


def main(arguments: Sequence[str] | None = None) -> int:
    given, start, results = parser().parse_args(arguments), time.monotonic(), {}
    if given.list:
        print("\n".join(CHECKS))
        return 0
    if given.data:
        given.data = given.data.resolve()
    if missing():
        print(f"these packages are missing, and checks that need them are skipped: {', '.join(missing())}", flush=True)
    if "torch" in missing():
        return 2
    import torch

    if given.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no CUDA device here: use --device cpu --quick to try the script")
        return 2
    here = machine(given.device)

    def give_up() -> None:
        print("a check does not end; what was found so far:")
        finish(given, results, here, start)
        os._exit(1)

    watch = threading.Timer(given.seconds + 60, give_up)
    watch.daemon = True
    watch.start()
    run_all(given, results)
    watch.cancel()
    return finish(given, results, here, start)


if __name__ == "__main__":
    sys.exit(main())
