"""The far side of `search.cluster`: an actor that holds a run's supernet and images, on whatever machine, and advances children."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.processes import Part, attempt
from supernet.errors import InputError
from supernet.run import Run

if TYPE_CHECKING:
    from search.evaluate import Advancing
    from search.rungs import Rung
    from supernet.model import Supernet

Build = Callable[[Run, str, Sequence["Rung"], str], "Advancing"]


def shared(run: Run, split: str, rungs: Sequence[Rung], device: str) -> Advancing:
    """What an actor evaluates with."""
    from search.evaluate import SharedEvaluator

    return SharedEvaluator(run.evaluator(device), run.dataset.split(split), rungs)


@dataclass(frozen=True)
class Order:
    """What an actor needs to begin. `files` is where Ray keeps config, splits and weights, for machines that do not see `path`."""

    path: Path
    weights_hash: str
    split: str
    rungs: tuple[Rung, ...]
    device: str
    threads: int
    build: Build
    files: Any = None


class Holder:
    """An actor: it holds the supernet and its images, and advances the children that it is given."""

    def __init__(self, order: Order) -> None:
        self.order = order

    def open(self) -> str:
        """Open the run, or what is wrong with it as text; begins a worker."""
        import torch

        torch.set_num_threads(self.order.threads)
        try:
            self.run = opened(self.order)
            self.evaluator = self.order.build(self.run, self.order.split, self.order.rungs, self.order.device)
        except (InputError, OSError) as error:
            return " ".join(str(error).split())
        return ""

    def advance(self, choices: Mapping[int, Mapping[str, Any]], rung: int) -> Part:
        """Advance children: position -> choices of the arch."""
        archs = {position: self.run.space.arch(each) for position, each in choices.items()}
        return attempt(self.evaluator, archs, rung, self.run.task)


def opened(order: Order) -> Run:
    """The run at its path, or made of what the object store keeps where the path is not there; its weights are those of the search."""
    if not (order.path / "config.json").is_file():
        return _unpacked(order)
    run = Run.open(order.path)
    if run.weights_hash != order.weights_hash:
        raise InputError(f"{order.path} has the weights {run.weights_hash[:12]} on this machine, but the search is of "
                         f"{order.weights_hash[:12]}: copy the run there anew, or remove it there")  # fmt: skip
    return run


def packed(run: Run) -> dict[str, bytes]:
    """Config, splits and chosen weights of a run, as the bytes of their files."""
    chosen = run.chosen_checkpoint()
    weights = next(path for path in (chosen / "ema.safetensors", chosen / "weights.safetensors") if path.exists())
    data = weights.read_bytes()
    if hashlib.sha256(data).hexdigest() != run.weights_hash:
        raise InputError(f"{weights} was changed since it was written: use an older checkpoint, or start the run anew")
    return {name: (run.path / name).read_bytes() for name in ("config.json", "splits.json")} | {"weights": data}


class _Carried(Run):
    """A run without checkpoints, whose weights came as the bytes of their file."""

    def supernet(self, device: str = "cpu") -> Supernet:
        """The supernet of those weights, without gradients, on `device`."""
        import torch
        from safetensors.torch import load

        from supernet.model import Supernet

        supernet = Supernet(self.space)
        supernet.load_state_dict(load(self.__dict__["weights"]))
        supernet.requires_grad_(False)
        return supernet.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _unpacked(order: Order) -> Run:
    import ray

    files = ray.get(order.files) if isinstance(order.files, ray.ObjectRef) else order.files
    if hashlib.sha256(files["weights"]).hexdigest() != order.weights_hash:
        raise InputError(f"{order.path} is not on this machine, and the weights that came instead are damaged: search again")
    with tempfile.TemporaryDirectory() as folder:
        for name in ("config.json", "splits.json"):
            (Path(folder) / name).write_bytes(files[name])
        run = _Carried.open(Path(folder))
        run.__dict__.update(weights=files["weights"], weights_hash=order.weights_hash)
        _ = run.dataset  # which reads splits.json
    return run
