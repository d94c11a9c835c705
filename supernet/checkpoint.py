"""Checkpoints: directories of safetensors and JSON, whose manifest, written last, holds the SHA-256 of every file.

A checkpoint counts only if it verifies. safetensors executes nothing, but does not notice damage: the hashes do.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from supernet import durable
from supernet.errors import InputError

FORMAT = 2


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a checkpoint holds: named groups of tensors ("weights", "optimizer", ...) and a JSON value."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]


def save(folder: Path, checkpoint: Checkpoint, *, keep: int = 2) -> Path:
    """Write `folder/step-N` and remove all but the newest `keep` checkpoints that verify, and the best. Returns its path.

    The process may die at any point: the checkpoints before it stay whole. Raises `durable.WriteError` (an `InputError` and an
    `OSError`) on a full disk, likewise.
    """
    path = folder / f"step-{checkpoint.step:09d}"
    remedy = f"the checkpoints before it are whole; make room there, then `nestling train --resume --out {folder.parent}`"
    with durable.writing(f"the checkpoint {path}", remedy):
        if path.exists():
            if verify(path) is None:
                return path
            remove(path)
        folder.mkdir(parents=True, exist_ok=True)
        path.mkdir()
        try:
            _fill(path, checkpoint)
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise
        durable.sync_folder(folder)
        _remove_old(folder, keep)
    return path


def _fill(path: Path, checkpoint: Checkpoint) -> None:
    """Write the files of a checkpoint, the manifest last."""
    hashes = {"state.json": _write(path / "state.json", json.dumps(checkpoint.state, allow_nan=False).encode())}
    for name, group in checkpoint.tensors.items():
        data = save_tensors({key: _plain(value) for key, value in group.items()})
        hashes[f"{name}.safetensors"] = _write(path / f"{name}.safetensors", data)
    durable.write_json(path / "manifest.json", {"format": FORMAT, "step": checkpoint.step, "sha256": hashes})


def _write(path: Path, data: bytes) -> str:
    """Write a file; returns the SHA-256 of what was meant to be written, so that bytes lost on the way are noticed."""
    durable.write_bytes(path, data)
    return hashlib.sha256(data).hexdigest()


def load(path: Path) -> Checkpoint:
    """Read a checkpoint after verifying it. Raises `InputError` that says what is wrong with it."""
    problem = verify(path)
    if problem:
        raise InputError(f"{path} is not a whole checkpoint: {problem}. Use an older one, or start the run anew")
    manifest = json.loads((path / "manifest.json").read_text())
    files = [path / name for name in manifest["sha256"] if name.endswith(".safetensors")]  # what is not listed is not ours
    tensors = {file.stem: load_tensors(file.read_bytes()) for file in files}
    return Checkpoint(int(manifest["step"]), tensors, json.loads((path / "state.json").read_text()))


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if manifest.get("format") != FORMAT:
            return f"it has format {manifest.get('format')!r}, this version reads {FORMAT}"
        if f"step-{int(manifest['step']):09d}" != path.name:
            return f"its manifest is of step {manifest['step']}"
        for name, expected in manifest["sha256"].items():
            if Path(name).name != name or durable.sha256(path / name) != expected:
                return f"{name} was changed since it was written"
        if not {"weights.safetensors", "state.json"} <= manifest["sha256"].keys():
            return "its manifest does not list the weights and the state"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        return f"it cannot be read ({error})"
    return None


def all_of(folder: Path) -> list[Path]:
    """Checkpoints in `folder`, whole or not, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def latest(folder: Path) -> Path | None:
    """The newest checkpoint that verifies, or None."""
    return next((path for path in reversed(all_of(folder)) if verify(path) is None), None)


def best(folder: Path) -> Path | None:
    """Of the checkpoints that verify, that with the highest "score" in its state; the newer of equal ones, None where none has one."""
    scored = []
    for path in all_of(folder):
        score = json.loads((path / "state.json").read_text()).get("score") if verify(path) is None else None
        if isinstance(score, int | float):
            scored.append((float(score), path))
    return max(scored)[1] if scored else None


def best_score(folder: Path) -> float:
    """Score of the best checkpoint; minus infinity where none has one."""
    path = best(folder)
    return -math.inf if path is None else float(json.loads((path / "state.json").read_text())["score"])


def step_of(path: Path) -> int:
    """The step that a checkpoint was written after."""
    return int(path.name.removeprefix("step-"))


def remove(path: Path) -> None:
    """Remove a checkpoint: first it stops being one, so that a half-removed one is never taken for whole."""
    (path / "manifest.json").unlink(missing_ok=True)
    shutil.rmtree(path)


def _remove_old(folder: Path, keep: int) -> None:
    """Only checkpoints that verify count as kept; broken ones go as soon as enough whole ones are there."""
    paths, whole = all_of(folder), 0
    kept = best(folder) if len(paths) > keep else None
    for path in reversed(paths):
        if whole >= keep:
            if path != kept:
                remove(path)
        elif verify(path) is None:
            whole += 1


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def optimizer_groups(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors ("parameter/name") and as JSON (the other values and the parameter groups)."""
    state = optimizer.state_dict()
    tensors, others = {}, {}
    for parameter, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{parameter}/{name}"] = value
            else:
                others[f"{parameter}/{name}"] = value
    return tensors, {"others": others, "groups": state["param_groups"]}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
    """Inverse of `optimizer_groups`, into an optimizer made the same way, maybe on another device."""
    values: dict[int, dict[str, Any]] = {}
    for key, value in (*tensors.items(), *rest["others"].items()):
        parameter, name = key.split("/", 1)
        values.setdefault(int(parameter), {})[name] = value
    own = [{name: group[name] for name in ("fused", "foreach") if name in group} for group in optimizer.param_groups]
    groups = [{**group, **kernel} for group, kernel in zip(rest["groups"], own, strict=True)]
    optimizer.load_state_dict({"state": values, "param_groups": groups})
    for parameter, state in optimizer.state.items():  # files know no memory format, and fused kernels take one for all
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter.detach(), dtype=value.dtype).copy_(value)
