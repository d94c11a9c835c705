"""Children evaluated by two workers against one: wall time of a generation of a search, on Ray's actors and under torchrun.

    python benchmarks/search_cluster.py [--quick] [--children 24] [--repetitions 7]

A generation is `children` mutants of four random parents through the rungs of images; every repetition has new ones, all three ways
evaluate the same, in turns that rotate. Workers are started, and their images decoded, before (told apart as `start_s`). One thread a
worker. The weights are random and the images noise, which takes as long. A speed-up is the median over the repetitions, its interval
that of order statistics: of wall time, which says little where other programs have the cores, and of CPU time (that of one process
over that of the worker that took longest), which is what wall time comes to where each worker has a core to itself. `macs_ratio` is
what is computed in all against one process: children that go to different workers share less, so `workers / macs_ratio` is the most
that a speed-up could be. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch

import numpy as np
import yaml
from numpy.typing import NDArray
from quality_data import CIFAR_SPACE
from scipy.stats import binom

from search.cluster import RayEvaluator, Workers
from search.evaluate import Advancing, SharedEvaluator
from search.processes import ProcessEvaluator, spread
from search.rungs import rungs
from supernet import checkpoint
from supernet.arch import Arch
from supernet.checkpoint import Checkpoint
from supernet.distributed import world
from supernet.model import Supernet
from supernet.run import Run, environment
from supernet.samples import Samples
from supernet.start import start

SEED, WORKERS, PARENTS, RATE = 17, 2, 4, 0.1


def made_run(folder: Path, images: int) -> Run:
    """A run with random weights on noise."""
    rng = np.random.default_rng(SEED)
    np.savez(folder / "noise.npz", images=rng.integers(0, 256, (images, 32, 32, 3), np.uint8), labels=np.arange(images) % 10)
    (folder / "space.yaml").write_text(yaml.safe_dump(CIFAR_SPACE))
    run = start(str(folder / "noise.npz"), folder / "run", space=str(folder / "space.yaml"), epochs=1).run
    weights = Supernet(run.space, seed=SEED).state_dict()
    state = {"space": run.space.key, "finished": True, "epochs": 1}
    checkpoint.save(run.checkpoints, Checkpoint(0, {"weights": weights}, state))
    return run


def generation(run: Run, number: int, children: int) -> list[Arch]:
    rng = np.random.default_rng((SEED, number))
    parents, found = [run.space.sample(rng) for _ in range(PARENTS)], dict[Arch, None]()
    while len(found) < children:
        found[run.space.mutate(parents[len(found) % PARENTS], rng, RATE)] = None
    return list(found)


def through(advancing: Advancing, archs: list[Arch], steps: int) -> tuple[float, float, int, list[dict[Arch, Samples]]]:
    """Seconds, seconds of CPU time, macs and what was found."""
    before, begin, cpu = advancing.spent.macs, time.perf_counter(), busy(advancing)
    found = [advancing.advance(archs, rung) for rung in range(steps)]
    return time.perf_counter() - begin, busy(advancing) - cpu, advancing.spent.macs - before, found


def busy(advancing: Advancing) -> float:
    """CPU time so far: of the worker that took longest, or of this process."""
    return advancing.busy_s if isinstance(advancing, RayEvaluator | ProcessEvaluator) else time.process_time()


def measured(run: Run, children: int, repetitions: int) -> dict[str, Any] | None:
    """All three ways, in the main of the processes that torchrun started; None in the others."""
    split = run.dataset.split("search_val")
    steps = rungs(len(split), 1024)
    with world("cpu") as processes:
        assert processes.size == WORKERS
        shared = SharedEvaluator(run.evaluator(), split, steps)
        with spread(processes, shared, run, steps) as together:
            if together is None:
                return None
            ready, begin = {"one": SharedEvaluator(run.evaluator(), split, steps), "torchrun": together}, time.perf_counter()
            with RayEvaluator(run, "search_val", steps, Workers(actors=WORKERS)) as ray:
                ways: dict[str, Advancing] = {**ready, "ray": ray}
                started = {}
                for name, way in ways.items():
                    begin = time.perf_counter() if name != "ray" else begin
                    through(way, generation(run, -1 % 2**32, children), len(steps))
                    started[name] = time.perf_counter() - begin
                return turns(run, ways, children, repetitions, len(steps)) | {
                    "start_s": started, "rungs": [[step.images, step.calibration_images] for step in steps],
                }  # fmt: skip


def turns(run: Run, ways: dict[str, Advancing], children: int, repetitions: int, steps: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    macs: dict[str, list[int]] = {name: [] for name in ways}
    others, images, largest = 0, 0, 0.0
    names = list(ways)
    for number in range(repetitions):
        archs, found = generation(run, number, children), {}
        for name in names[number % len(names) :] + names[: number % len(names)]:
            taken, computed, spent, found[name] = through(ways[name], archs, steps)
            seconds[name].append(taken)
            cpu[name].append(computed)
            macs[name].append(spent)
        for name in names[1:]:
            for here, there in zip(found["one"], found[name], strict=True):
                assert here.keys() == there.keys()
                for arch in here:
                    others += int((here[arch]["predicted"] != there[arch]["predicted"]).sum())
                    images += len(here[arch]["predicted"])
                    gap = np.abs(here[arch]["loss"].astype(np.float64) - there[arch]["loss"].astype(np.float64))
                    largest = max(largest, float(gap.max()))
        told = (f"{name} {times[-1]:.2f} s ({cpu[name][-1]:.2f} of CPU)" for name, times in seconds.items())
        print(f"generation {number}: " + ", ".join(told), flush=True)
    result: dict[str, Any] = {"seconds": {name: float(np.median(times)) for name, times in seconds.items()}}
    for name in names[1:]:
        for kind, times in (("speedup", seconds), ("cpu_speedup", cpu)):
            ratios = np.array(times["one"]) / np.array(times[name])
            middle, low, high, level = interval(ratios)
            result |= {f"{kind}_{name}": middle, f"{kind}_low_{name}": low, f"{kind}_high_{name}": high}
        result[f"macs_ratio_{name}"] = sum(macs[name]) / sum(macs["one"])
    return result | {"interval_level": level, "other_predictions": others / images, "max_abs_loss_difference": largest}


def interval(values: NDArray[np.float64]) -> tuple[float, float, float, float]:
    """Median, the narrowest order statistics around it that cover the true one in 95 % of cases (or all of them), and their level."""
    count, ranked = len(values), np.sort(values)
    below = max((each for each in range(count // 2) if 1 - 2 * binom.cdf(each, count, 0.5) >= 0.95), default=0)
    return (
        float(np.median(values)),
        float(ranked[below]),
        float(ranked[-1 - below]),
        float(1 - 2 * binom.cdf(below, count, 0.5)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--children", type=int)
    parser.add_argument("--repetitions", type=int)
    parser.add_argument("--images", type=int)
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)  # in the processes that torchrun starts
    given = parser.parse_args()
    children, repetitions = given.children or (8 if given.quick else 24), given.repetitions or (2 if given.quick else 9)
    images = given.images or (2_000 if given.quick else 12_000)
    if given.job:
        result = measured(Run.open(given.job), children, repetitions)
        if result is not None:
            (given.job / "cluster.json").write_text(json.dumps(result))
        return
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        run = made_run(Path(folder), images)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORKERS), __file__,
                   "--job", str(run.path), "--children", str(children), "--repetitions", str(repetitions)]  # fmt: skip
        begin = time.monotonic()
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
        result = json.loads((run.path / "cluster.json").read_text())
    here = environment()
    for name in ("ray", "torchrun"):
        for kind, what in (("cpu_speedup", "CPU time"), ("speedup", "wall time")):
            middle, low, high = (result[f"{kind}{part}_{name}"] for part in ("", "_low", "_high"))
            print(f"{name}, {WORKERS} workers, {what}: {middle:.2f} times as fast as one process "
                  f"({result['interval_level']:.0%} {low:.2f} to {high:.2f})")  # fmt: skip
        print(f"    {result[f'macs_ratio_{name}']:.3f} of its macs; started in {result['start_s'][name]:.1f} s")
    print(f"{children} children a generation, {repetitions} generations, rungs (images, calibration images) {result['rungs']}")
    print(f"load of the machine before {load:.1f}, after {os.getloadavg()[0]:.1f} on {here['cores']} cores (this benchmark: 2)")
    print(f"{time.monotonic() - begin:.0f} s; {here['processor']}; torch {here['versions']['torch']}; seed {SEED}")
    print(json.dumps({
        "benchmark": "search_cluster", "seed": SEED, "quick": given.quick, "workers": WORKERS, "children": children,
        "repetitions": repetitions, "load_before": load, **result, "versions": here["versions"],
    }))  # fmt: skip


if __name__ == "__main__":
    main()
