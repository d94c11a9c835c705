"""Checks of whole runs on a GPU: training and resuming, the loader, memory that runs out, and processes that train together."""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.gpu_checks_common import Bench, Skipped, difference, gradients_of, images_for, perturbed, tidy
from supernet import checkpoint, durable
from supernet import train as training
from supernet.data.augment import Augment
from supernet.data.batches import TrainingBatches
from supernet.data.sources import FolderSource, Source, open_source
from supernet.data.splits import divide
from supernet.recipe import load_recipe
from supernet.run import Run
from supernet.space import load_space
from supernet.train import Progress, train

ROOT = Path(__file__).resolve().parents[1]
STEPS, QUICK_STEPS = 200, 6
CHILD = (
    "import json, sys; sys.path.insert(0, sys.argv[1]); from benchmarks import gpu_checks_run as here; "
    "print(json.dumps(getattr(here, sys.argv[2])(*sys.argv[3:])))"
)


class Stopped(Exception):
    """Ends a run as a signal would."""


def in_a_process(bench: Bench, function: str, *arguments: object, seconds: float, **variables: str) -> dict[str, Any]:
    """What a function of this module gives in a process of its own. Raises `RuntimeError` with the end of what it said."""
    command = [sys.executable, "-c", CHILD, str(ROOT), function, *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=seconds, cwd=bench.folder, env={**os.environ, **variables}, check=False
    )
    if done.returncode:
        raise RuntimeError(f"the process ended with {done.returncode}: {done.stderr.strip()[-1500:]}")
    return json.loads(done.stdout.splitlines()[-1])


# --- training ---


def pictures(bench: Bench) -> tuple[NDArray[np.uint8], NDArray[np.int64], str]:
    """Images of 32 pixels in 10 classes: of CIFAR-10 where its file is there, else noise on a colour for each class."""
    file, labels = (bench.data or Path()) / "train-0.webp", np.arange(10_000) // 1000
    if bench.data is not None and file.is_file():
        grid = np.asarray(Image.open(file).convert("RGB"))
        pixels = grid.reshape(100, 32, 100, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3)
        told = "of CIFAR-10"
    else:
        rng = np.random.default_rng(0)
        colours = rng.integers(60, 196, (10, 1, 1, 3))[labels]
        pixels = (colours + rng.integers(-60, 60, (10_000, 32, 32, 3))).astype(np.uint8)
        told = "made (noise on a colour for each class): no train-0.webp was given"
    if bench.quick:
        pixels, labels = pixels[::50], labels[::50]
    return np.ascontiguousarray(pixels), labels, told


def images_of(bench: Bench) -> Source:
    """The pictures as an .npz file in the temporary folder, opened."""
    file = bench.folder / "images.npz"
    if not file.exists():
        pixels, labels, told = pictures(bench)
        np.savez(file, images=pixels, labels=labels)
        (bench.folder / "images.txt").write_text(told)
    return open_source(str(file))


def new_run(bench: Bench, name: str, **changes: Any) -> Run:
    """A run of cifar-mbconv by the recipe for it."""
    recipe = load_recipe("cifar", {"validate_epochs": 0, **changes})
    return Run.create(bench.folder / name, load_space("cifar-mbconv"), recipe, images_of(bench))


def losses_of(run: Run) -> list[float]:
    """The largest child's own loss at every step that was logged."""
    return [line["children"]["largest"]["loss"] for line in durable.read_lines(run.path / "metrics.jsonl")]


def followed(run: Run, device: str, workers: int, stop_at: int | None = None) -> dict[str, Any]:
    """Train, until a checkpoint from `stop_at` on where it is given; the first step seen, the last, and seconds for each."""
    seen: list[tuple[int, float]] = []
    told: list[str] = []

    def progress(now: Progress) -> None:
        seen.append((now.step, time.perf_counter()))
        told.extend(now.events)
        newest = checkpoint.latest(run.checkpoints) if stop_at and now.step >= stop_at else None
        if newest is not None and checkpoint.step_of(newest) == now.step:
            raise Stopped

    training.SAVE_EPOCH_SECONDS = -1.0  # a checkpoint at every end of an epoch
    with suppress(Stopped):
        train(run, device=device, workers=workers, progress=progress)
    gaps = [b - a for (_, a), (_, b) in pairwise(seen)][min(5, len(seen) // 4) :]
    return {"first": seen[0][0], "last": seen[-1][0], "step_s": statistics.median(gaps) if gaps else None, "events": told}


def continued(path: str, device: str, workers: str) -> dict[str, Any]:
    """In another process: take the run up where it was stopped."""
    return followed(Run.open(Path(path)), device, int(workers))


def train_and_resume(bench: Bench) -> None:
    """The recipe for CIFAR; stopped half-way and taken up by a second process."""
    size, wanted = (16, QUICK_STEPS) if bench.quick else (128, STEPS)
    source = images_of(bench)
    steps_an_epoch = len(divide(source, seed=0).train) // size
    epochs = max(2, round(wanted / steps_an_epoch))
    changes = {"calibration_images": 64, "learning_rate": 0.01} if bench.quick else {"calibration_images": 1024}
    run = new_run(bench, "train", batch_size=size, epochs=epochs, validate_epochs=max(1, epochs // 2), **changes)
    workers = min(4, os.cpu_count() or 1) if bench.cuda else 0
    one = followed(run, bench.device, workers, stop_at=epochs * steps_an_epoch // 2)
    tidy(bench)
    two = in_a_process(bench, "continued", run.path, bench.device, workers, seconds=120)
    log, state = durable.read_lines(run.path / "metrics.jsonl"), _state(run)
    losses = [line["children"]["largest"]["loss"] for line in log]
    few, at = max(1, len(losses) // 20), one["last"]
    begin, before, after, end = (
        statistics.mean(part) for part in (losses[:few], losses[max(0, at - few) : at], losses[at : at + few], losses[-few:])
    )
    told = one["events"] + two["events"]
    bench.figures |= {
        "images": (bench.folder / "images.txt").read_text(), "batch": size, "steps": two["last"], "stopped_after": at,
        "loss_first": begin, "loss_before_stop": before, "loss_after_resume": after, "loss_last": end, "chance": run.chance_loss,
        "skipped": state["guard"]["skipped"], "images_per_s": size / one["step_s"], "images_per_s_resumed": size / two["step_s"],
        "validation": log[-1].get("validation"),
    }  # fmt: skip
    bench.expect(bench.quick or end < begin, "the loss did not go down")
    bench.expect(state["guard"]["skipped"] == 0, "steps were skipped as not finite")
    bench.expect(two["first"] == at + 1 and state["finished"], "the second process did not go on where the first stopped")
    bench.expect([line["step"] for line in log] == list(range(1, two["last"] + 1)), "the log does not hold every step once")
    bench.expect(not told, f"training told of {told}")
    bench.expect(bench.quick or after < 1.3 * before, "the loss jumped where the run was taken up")


def _state(run: Run) -> dict[str, Any]:
    newest = checkpoint.latest(run.checkpoints)
    assert newest is not None
    return json.loads((newest / "state.json").read_text())


# --- the loader ---


def loader(bench: Bench) -> None:
    """Training batches at 224 px from JPEG files of 500 x 375, by how many processes decode."""
    folder, count, batch = bench.folder / "jpeg", 24 if bench.quick else 512, 4 if bench.quick else 64
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (38, 50, 3)).astype(np.uint8))
        file = folder / f"class{number % 4}" / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(file, quality=90)
    source, cores = FolderSource(folder), len(os.sched_getaffinity(0))
    speeds = {}
    for workers in (0, 1) if bench.quick else (1, 4, 8, 16):
        batches = TrainingBatches(
            source, np.arange(count), batch_size=batch, resolution=224, augment=Augment(min_area=0.08, flip=0.5), seed=0,
            workers=workers, pin=bench.cuda,
        )  # fmt: skip
        speeds[str(workers)] = round(_speed(batches, bench, min(max(1, workers), cores)), 1)
    needed = bench.earlier.get("step-attentivenas", {}).get("bf16_images_per_s")
    enough = [int(workers) for workers, speed in speeds.items() if needed and speed >= needed]
    bench.figures |= {
        "images_per_s": speeds, "cores": cores, "bytes_of_files": sum(file.stat().st_size for file in folder.rglob("*.jpg")),
        "files": count, "step_needs_images_per_s": needed, "workers_that_suffice": min(enough, default=None),
    }  # fmt: skip


def _speed(batches: TrainingBatches, bench: Bench, workers: int) -> float:
    """Images in a second once every worker has made its first batch, which takes their start along; on to the device."""
    steps = (2 if bench.quick else 4) * workers + workers
    start, images = 0.0, 0
    for position, batch in enumerate(batches.batches(0, steps)):
        on_device = batch.images.to(bench.device, non_blocking=True)
        if position == workers - 1:
            start = time.perf_counter()
        elif position >= workers:
            images += len(on_device)
    if bench.cuda:
        torch.cuda.synchronize()
    return images / (time.perf_counter() - start)


# --- memory that runs out ---


def memory_back_off(bench: Bench) -> None:
    """Less memory than a step takes: the run goes on in smaller pieces, and learns the same."""
    bench.need_cuda()
    changes = {"batch_size": 512, "bn_group": 64, "epochs": 1, "calibration_images": 64}
    whole, tight = new_run(bench, "whole", **changes), new_run(bench, "tight", **changes)
    tidy(bench)
    base = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    train(whole, device=bench.device)
    peak = torch.cuda.max_memory_allocated()
    tidy(bench)
    allowed = base + 0.6 * (peak - base)
    told: list[str] = []
    torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / torch.cuda.mem_get_info()[1]))
    try:
        train(tight, device=bench.device, progress=lambda now: told.extend(now.events))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    weights = [
        checkpoint.load(newest).tensors["weights"] for run in (whole, tight) if (newest := checkpoint.latest(run.checkpoints))
    ]
    state, losses = _state(tight), [losses_of(run) for run in (whole, tight)]
    bench.figures |= {
        "peak_bytes": peak, "allowed_bytes": int(allowed), "micro_batch": state["micro_batch"], "events": told, "losses": losses,
        "weights_apart": difference(weights[1], weights[0]),
    }  # fmt: skip
    bench.expect(bool(told) and state["micro_batch"] in {64, 128, 256}, "the step was not made smaller")
    bench.expect(state["finished"], "the run did not reach its end")
    bench.expect(bench.figures["weights_apart"] < 0.05, "smaller pieces learnt something else")


# --- processes that train together ---


def world(bench: Bench) -> None:
    """A job of one process over NCCL: the gradients of a step, summed over it, are what they were."""
    if bench.cuda and not torch.distributed.is_nccl_available():
        raise Skipped("this torch has no NCCL")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    bench.figures |= in_a_process(
        bench, "summed_alone", bench.device, seconds=90, RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
    )  # fmt: skip
    bench.expect(bench.figures["error"] == 0, "a sum over one process changed the gradients")
    bench.expect(bench.figures["untouched_stay_so"], "a parameter that no child touched has a gradient after the sum")


def summed_alone(device: str) -> dict[str, Any]:
    """In a process of a job: sum the flat gradients over all processes."""
    from torch import distributed as dist

    from supernet import distributed

    bench, space = Bench(device, True, Path()), load_space("digits")
    supernet = perturbed(space, bench)
    images, _ = images_for(bench, space, 8, space.resolution(space.smallest))
    with distributed.world(device) as here:
        supernet.child(space.smallest)(images).square().mean().backward()
        before = {name: value.clone() for name, value in gradients_of(supernet).items()}
        start = time.perf_counter()
        for buffer in supernet.gradient_buffers():
            buffer.gather()
            distributed.summed_(buffer.flat)
            buffer.spread()
        seconds, after = time.perf_counter() - start, gradients_of(supernet)
        told = here.broadcast({"size": here.size, "backend": dist.get_backend()})
    same = before.keys() == after.keys()
    return {**told, "error": difference(after, before), "untouched_stay_so": same, "first_sum_ms": round(1000 * seconds, 1)}
