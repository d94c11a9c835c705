"""A run directory: what was asked for, on what machine, what was learnt, and who looked at the test images.

`config.json` (resolved, complete), `environment.json`, `splits.json`, `metrics.jsonl`, `checkpoints/`, `test_reads.jsonl`,
and `init/` where training began with the weights of another network.
Every stage after training needs nothing but this directory and the data.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from supernet import checkpoint, config, durable
from supernet.data.batches import channel_statistics
from supernet.data.dataset import Dataset, SplitImages
from supernet.data.sources import Source, open_source
from supernet.data.splits import Splits, readable_splits
from supernet.donor import Donor, load_donor, save_donor
from supernet.errors import InputError
from supernet.evaluate import Evaluator
from supernet.model import Supernet
from supernet.recipe import TrainConfig
from supernet.space import Space
from supernet.task import TASKS, Task, task_named

FORMAT = 1
DATA = ("name", "root", "fingerprint", "classes", "channels", "mean", "std")
"""What a run remembers of its data."""


@dataclass(frozen=True)
class Run:
    """A run directory that exists. Make one with `Run.create`, take one up with `Run.open`."""

    path: Path
    space: Space
    recipe: TrainConfig
    data: dict[str, Any]
    task: Task
    init: dict[str, Any] | None = None
    """Where the initial weights are from; they lie in `init/`. None: drawn at random."""

    @classmethod
    def create(
        cls, path: Path, space: Space, recipe: TrainConfig, source: Source, *, root: Path | None = None, donor: Donor | None = None
    ) -> Run:  # fmt: skip
        """Divide the data, measure its channels and write the directory, with the weights of `donor` where training begins there.

        Raises `InputError` where a run is there already.
        """
        if (path / "config.json").exists():
            raise InputError(f"{path} holds a run already: continue it with --resume, or choose another --out")
        if (path / "checkpoints").exists():
            raise InputError(f"{path} holds checkpoints of another run (its config.json is gone): choose another --out")
        task = task_named(space.family.task)
        fade = recipe.distillation
        if task.own_images and (fade.kind != "soft" or fade.temperature != 1):
            raise InputError(f"{space.family.task} has no probabilities: leave out distillation.kind ({fade.kind}) and temperature "
                             f"({fade.temperature:g})")  # fmt: skip
        if source.channels != space.family.in_channels:
            raise InputError(
                f"the space {space.name} is of images of {space.family.in_channels} channels, but those of {source.name} have "
                f"{source.channels}: set in_channels"
            )
        splits = readable_splits(
            source, seed=recipe.seed, skip_unreadable=recipe.skip_unreadable, calibration=recipe.calibration_images
        )
        mean, std = channel_statistics(source, splits.train, skip_unreadable=recipe.skip_unreadable > 0)
        data = {"name": source.name, "root": str(root.resolve()) if root else None, "fingerprint": source.fingerprint,
                "classes": list(source.classes), "channels": source.channels, "mean": list(mean), "std": list(std)}  # fmt: skip
        path.mkdir(parents=True, exist_ok=True)
        durable.write_text(
            path / "splits.json", json.dumps(splits.to_json_dict(source)) + "\n"
        )  # one line: it lists every image
        durable.write_json(path / "environment.json", environment())
        init = {"init": save_donor(path / "init", donor)} if donor else {}
        durable.write_json(path / "config.json", {
            "format": FORMAT, "task": space.family.task, "space": dict(space.definition), "recipe": recipe.model_dump(mode="json"),
            "data": data, **init,
        })  # last: a run is one that has its config  # fmt: skip
        run = cls.open(path)
        run.__dict__["source"] = source  # it is open already
        return run

    @classmethod
    def open(cls, path: Path) -> Run:
        """The run in a directory. Raises `InputError` that says what is wrong with it."""
        file = path / "config.json"
        if not file.is_file():
            raise InputError(f"{path} is not a run directory (it has no config.json): give the --out of `nestling train`")
        try:
            value = json.loads(file.read_text())
        except (ValueError, RecursionError) as error:
            raise InputError(f"{file} is damaged ({error}): restore it, or start a new run") from error
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            found = value.get("format") if isinstance(value, dict) else None
            raise InputError(f"{file} has format {found!r}, this version reads {FORMAT}: use the version that wrote it")
        kinds = {"space": dict, "recipe": dict, "data": dict, "task": str}
        missing = [name for name, kind in kinds.items() if not isinstance(value.get(name), kind)]
        missing += [] if "data" in missing else [f"data.{name}" for name in DATA if name not in value["data"]]
        if missing:
            raise InputError(f"{file} is incomplete (missing: {missing}): restore it, or start a new run")
        init = value.get("init")
        if init is not None and not (isinstance(init, dict) and {"source", "nested", "resolution", "sha256"} <= init.keys()):
            raise InputError(f"{file}: init is incomplete: restore it, or start a new run")
        if value["task"] not in TASKS:
            raise InputError(
                f"{file}: task must be one of {sorted(TASKS)}, but got {value['task']!r}: use the version that wrote it"
            )
        recipe = config.parse(TrainConfig, value["recipe"], f"{file}: recipe")
        space = Space.from_definition(value["space"], f"{file}: space")
        if space.family.task != value["task"]:
            raise InputError(
                f"{file}: the space {space.name} learns {space.family.task}, but task is {value['task']!r}: restore the file"
            )
        std = value["data"]["std"]
        sound = isinstance(std, list) and all(isinstance(number, int | float) and 0 < number < math.inf for number in std)
        if not sound or len(std) != space.family.in_channels:
            raise InputError(f"{file}: data.std must be a list of a positive number for each of the {space.family.in_channels} "
                             f"channels, but got {std!r}: restore the file, or start a new run")  # fmt: skip
        return cls(
            path,
            space,
            recipe,
            value["data"],
            TASKS[value["task"]].of(tuple(std)),
            value.get("init"),
        )

    @cached_property
    def source(self) -> Source:
        """The images, opened again as the run names them."""
        root = self.data["root"]
        return open_source(self.data["name"], root=Path(root) if root else None)

    @cached_property
    def dataset(self) -> Dataset:
        """Train, search-val and confirm splits. Raises `InputError` where the data changed since the run began."""
        file = self.path / "splits.json"
        try:
            value = json.loads(file.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{file} is damaged ({error}): restore it, or start a new run") from error
        try:
            splits = Splits.from_json_dict(value, self.source)
        except InputError as error:
            raise InputError(f"{file}: {error}") from error
        return Dataset(self.source, splits, tuple(self.data["mean"]), tuple(self.data["std"]), self.recipe.crop)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the outputs."""
        return tuple(self.data["classes"])

    def test_images(self, purpose: str) -> SplitImages:
        """The test split; this read, with its `purpose`, is counted in the run (`test_reads.jsonl`)."""
        line = {"purpose": purpose, "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
        durable.append_line(self.path / "test_reads.jsonl", json.dumps(line))
        return self.dataset._images("test")

    @property
    def test_reads(self) -> int:
        """How often the test split was read."""
        return len(durable.read_lines(self.path / "test_reads.jsonl"))

    @property
    def donor(self) -> Donor | None:
        """The weights that training begins with. Raises `InputError` where their file changed."""
        return load_donor(self.path / "init", self.init) if self.init else None

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def finished(self) -> bool:
        """Whether training ran to its end."""
        path = checkpoint.latest(self.checkpoints)
        state = json.loads((path / "state.json").read_text()) if path is not None else {}
        return bool(state.get("finished")) and state.get("epochs") == self.recipe.epochs

    @cached_property
    def weights_hash(self) -> str:
        """SHA-256 of the weights that children are taken from: what an evaluation belongs to."""
        hashes = json.loads((self.chosen_checkpoint() / "manifest.json").read_text())["sha256"]
        return str(hashes.get("ema.safetensors", hashes["weights.safetensors"]))

    def supernet(self, device: str = "cpu") -> Supernet:
        """The supernet that children are taken from, without gradients, on `device`.

        It is that of the newest whole checkpoint, or of the best (the recipe's `use`); the moving average of the weights, where
        the recipe keeps one (`ema`).
        """
        supernet = Supernet(self.space)
        saved = checkpoint.load(self.chosen_checkpoint())
        load_weights(supernet, saved, "ema" if "ema" in saved.tensors else "weights")
        supernet.requires_grad_(False)
        return supernet.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    def evaluator(self, device: str = "cpu") -> Evaluator:
        """Calibrates and scores children of this run."""
        return Evaluator(self.supernet(device), self.task, self.dataset.split("train"), self.recipe.calibration_images)

    @property
    def chance_loss(self) -> float:
        """Loss of one who knows the classes' frequencies and nothing of the images."""
        counts = np.bincount(self.source.labels[self.dataset.splits.train], minlength=len(self.classes))
        shown = counts.astype(float) ** {"none": 1.0, "sqrt": 0.5, "class": 0.0}[self.recipe.balance]
        return self.task.chance_loss(shown / shown.sum())

    def chosen_checkpoint(self) -> Path:
        """The checkpoint that children are taken from. Raises `InputError` where there is none."""
        path = checkpoint.latest(self.checkpoints)
        if path is None:
            raise InputError(f"{self.path} has no whole checkpoint yet: train it first (nestling train ... --resume)")
        if self.recipe.use == "best":
            path = checkpoint.best(self.checkpoints)
            if path is None:
                raise InputError(
                    f"{self.path}: use is best, but no checkpoint was looked at: set validate_epochs above 0, or use=last"
                )
        return path


def load_weights(supernet: Supernet, saved: checkpoint.Checkpoint, group: str = "weights") -> None:
    """Fill a supernet from a group of a checkpoint. Raises `InputError` where they are of different spaces."""
    if saved.state.get("space") != supernet.space.key:
        raise InputError(f"the checkpoint was written for the space {saved.state.get('space')}, this run has {supernet.space.key}: "
                         "use the run's own checkpoints")  # fmt: skip
    supernet.load_state_dict(saved.tensors[group])


def environment() -> dict[str, Any]:
    """Machine and versions, for the record. Nothing that names a person or a host."""
    found = {}
    for name in ("nestling", "torch", "torchvision", "timm", "numpy", "onnx", "onnxruntime", "onnxscript"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": found,
    }


def processor() -> str:
    """The processor's name as the kernel gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
