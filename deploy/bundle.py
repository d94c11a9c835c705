"""A bundle: the folder that a user ships. Model, manifest, card, and the two files that predict with it; hashes of all of them."""

from __future__ import annotations

import glob
import json
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from deploy import archive, predict
from deploy.predict import Predictor, read_manifest
from supernet import durable, preprocess
from supernet.errors import InputError

LONGEST_NAME = 100
STALE_SECONDS = 3600.0
"""A draft that nobody wrote to for so long belongs to an export that died."""
IMPORTABLE = {".py", ".pyc", ".pyd", ".so", ".pth"}
"""What Python may run when it lies beside `predict.py`, as a folder may; other files that people add do no harm."""
SCRIPTS = {"predict.py": Path(predict.__file__), "preprocess.py": Path(preprocess.__file__)}

Picture = str | os.PathLike[str] | Image.Image
"""An image file or an image in memory."""


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files are those that were exported. Nothing in it is ever executed: prediction runs our own code."""

    path: Path
    manifest: Mapping[str, Any]
    origin: Path | None = field(default=None, compare=False)
    """The .zip that it came in."""

    @property
    def name(self) -> str:
        """Of the folder, or the .zip."""
        return (self.origin or self.path).resolve().name

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """Verify a bundle, a folder or a .zip. Raises `InputError` that names the file that is missing, changed or not listed."""
        folder = Path(path)
        if folder.is_file() and not folder.is_symlink():
            return cls._unpacked(folder)
        try:
            manifest = read_manifest(folder)
        except ValueError as error:
            raise InputError(str(error)) from error
        for name, expected in manifest["files"].items():
            file = folder / name
            if Path(name).name != name or len(name) > LONGEST_NAME or not isinstance(expected, str):
                raise InputError(
                    f"{folder}: a bundle lists plain file names with hashes, but got {name[:60]!r}: do not use this bundle"
                )
            if not file.is_file() or file.is_symlink():
                raise InputError(f"{folder}: {name!r} is missing: copy the whole folder, or export the child again")
            if durable.sha256(file) != expected:
                raise InputError(
                    f"{folder}: {name!r} was changed since it was exported: copy it again, or export the child again"
                )
        strange = [entry for entry in folder.iterdir() if entry.name not in {"manifest.json", *manifest["files"]}]
        others = sorted(entry.name for entry in strange if entry.is_dir() or entry.suffix in IMPORTABLE)
        if others:
            raise InputError(
                f"{folder}: {others[0]!r} was not exported with the bundle, and Python may run what lies beside predict.py: remove it"
            )
        missing = {"model.onnx", "images.json", *SCRIPTS} - manifest["files"].keys()
        if missing:
            raise InputError(f"{folder}: the manifest does not list {sorted(missing)[0]}: export the child again")
        return cls(folder, manifest)

    @classmethod
    def _unpacked(cls, path: Path) -> Bundle:
        """Of a .zip; what it unpacks to goes with the bundle."""
        folder = Path(tempfile.mkdtemp(prefix="nestling-"))
        try:
            archive.unpack(path, folder)
            bundle = replace(cls.open(folder), origin=path)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        weakref.finalize(bundle, shutil.rmtree, folder, ignore_errors=True)
        return bundle

    def fact(self, *names: str) -> Any:
        """A value of the manifest by its path, such as ("accuracy", "metric"). Raises `InputError` where there is none."""
        value: Any = self.manifest
        for name in names:
            if not isinstance(value, Mapping) or name not in value:
                raise InputError(f"{self.path}: the manifest says nothing of {'.'.join(names)}: export the child again")
            value = value[name]
        return value

    @cached_property
    def predictor(self) -> Predictor:
        """The model, ready to run in ONNX Runtime."""
        try:
            return Predictor(self.path)
        except ValueError as error:
            raise InputError(str(error)) from error

    def predict(self, images: Picture | Iterable[Picture]) -> NDArray[np.float32]:
        """Probabilities, shape (images, classes), of image files or images; of a regression, pixels in 0..1, shape (images, H, W, C).

        Raises `InputError` for a file that cannot be read.
        """
        given = [images] if isinstance(images, str | os.PathLike | Image.Image) else list(images)
        if not all(isinstance(image, str | os.PathLike | Image.Image) for image in given):
            raise InputError("images are paths or Pillow images: turn an array into one with PIL.Image.fromarray")
        try:
            return self.predictor.predict(given)
        except ValueError as error:
            raise InputError(str(error)) from error

    @property
    def classes(self) -> list[str]:
        """Class names in the order of the outputs; none where nothing is classified."""
        return list(self.manifest["classes"])

    @property
    def task(self) -> str:
        """What the model learnt, by its name in `deploy.predict.OUTPUTS`."""
        return str(self.manifest.get("task", "classification"))


def refuse_foreign(out: Path) -> None:
    """Raise `InputError` where something lies at `out` that replacing a bundle must not remove."""
    if not out.is_symlink() and not out.exists():
        return
    if out.is_symlink() or not out.is_dir():
        raise InputError(f"{out} exists and is not a bundle: choose another place for the export")
    held = {entry.name for entry in out.iterdir()}
    try:
        known = {"manifest.json", *read_manifest(out)["files"]} if held else set()
    except ValueError as error:
        raise InputError(f"{out} exists and is not a bundle ({error}): choose another place for the export") from error
    if held - known:
        raise InputError(
            f"{out} holds {sorted(held - known)[0]!r}, which no export wrote and which would be lost: move it away, or choose another "
            "place for the export"
        )


@contextmanager
def being_written(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` when the block ends well, and vanishes when it does not.

    An older bundle at `out` is replaced; anything else there is refused with an `InputError`.
    """
    refuse_foreign(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    _sweep(out)
    draft = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        yield draft
        draft.chmod(0o755)
        durable.sync_folder(draft)
        _put(draft, out)
        durable.sync_folder(out.parent)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _sweep(out: Path) -> None:
    """Clear what killed exports left: drafts older than `STALE_SECONDS` go, and a bundle set aside without a successor comes back."""
    for path in sorted(out.parent.glob(f".{glob.escape(out.name)}.*")):
        if not path.is_dir() or path.is_symlink() or time.time() - path.stat().st_mtime < STALE_SECONDS:
            continue
        if path.suffix == ".old" and not out.exists():
            path.replace(out)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _put(draft: Path, out: Path) -> None:
    """Rename `draft` to `out`; where that fails, the bundle that was there is there again."""
    if not out.exists():
        draft.replace(out)
        return
    old = draft.with_name(f"{draft.name}.old")
    out.replace(old)
    try:
        draft.replace(out)
    except BaseException:
        old.replace(out)
        raise
    shutil.rmtree(old)


def write_model(folder: Path, model: bytes, manifest: dict[str, Any]) -> None:
    """Put model, scripts and a first manifest into a draft: enough to predict with."""
    durable.write_bytes(folder / "model.onnx", model)
    for name, source in SCRIPTS.items():
        durable.write_bytes(folder / name, source.read_bytes())
    write_manifest(folder, manifest)


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest with the hashes of all that lies beside it."""
    hashes = {file.name: durable.sha256(file) for file in sorted(folder.iterdir()) if file.name != "manifest.json"}
    durable.write_text(folder / "manifest.json", json.dumps({**manifest, "files": hashes}, indent=1, allow_nan=False) + "\n")
