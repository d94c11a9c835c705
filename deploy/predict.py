"""Classify images with an exported model. A copy lies in every bundle, where it needs onnxruntime, NumPy and Pillow alone.

    python predict.py IMAGE...           class and probability of each image
    python predict.py --json IMAGE...    a line of JSON an image
    python predict.py --check FOLDER     repeat the manifest's accuracy, image by image, on the images in FOLDER

Axes: N images, K classes, C channels, H W space.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image

if __package__:
    from supernet.preprocess import Preprocessing, open_image
else:  # in a bundle the file lies beside this one
    sys.dont_write_bytecode = True  # a bundle stays as it was exported
    from preprocess import Preprocessing, open_image  # type: ignore[no-redef]

FORMAT = 1
BATCH = 64


class Predictor:
    """The model of a bundle. Raises `ValueError` where the manifest or the model is missing, damaged or of another format."""

    def __init__(self, folder: str | os.PathLike[str], *, threads: int = 1) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        model = read_verified(self.folder, "model.onnx", self.manifest)
        self.classes: list[str] = self.manifest["classes"]
        self.preprocessing = Preprocessing.from_dict(self.manifest["preprocessing"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # what goes wrong is raised
        # weights that a model says lie in other files are sought here, where there are none, and not where we happen to stand
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self.folder))
        try:
            self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime has a bare exception of its own for every kind of damage
            reason = " ".join(str(error).split())
            raise ValueError(f"{self.folder / 'model.onnx'} cannot be loaded ({reason}): export it again") from error
        self._check_shapes()

    def _check_shapes(self) -> None:
        pixels, classes = self.preprocessing, len(self.classes)
        expected = [("images", [pixels.channels, pixels.resolution, pixels.resolution]), ("logits", [classes])]
        found = [(value.name, value.shape[1:]) for value in (*self._session.get_inputs(), *self._session.get_outputs())]
        if found != expected:
            raise ValueError(f"{self.folder}: the manifest describes {expected}, but the model has {found}: export it again")

    def logits(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Logits, shape (N, K), of images in memory."""
        logits: NDArray[np.float32] = self._session.run(None, {"images": self.preprocessing(images)})[0]
        return logits

    def predict(self, images: Iterable[str | os.PathLike[str] | Image.Image]) -> NDArray[np.float32]:
        """Probabilities, shape (N, K), of image files or images. Raises `ValueError` that names a file that cannot be read."""
        found = [self.logits(batch) for batch in self._batches(images)]
        logits = np.concatenate(found) if found else np.zeros((0, len(self.classes)), np.float32)
        powers = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-np.inf))
        probabilities: NDArray[np.float32] = powers / powers.sum(axis=1, keepdims=True)
        return probabilities

    def _batches(self, images: Iterable[str | os.PathLike[str] | Image.Image]) -> Iterator[list[Image.Image]]:
        batch: list[Image.Image] = []
        for image in images:
            batch.append(image if isinstance(image, Image.Image) else open_image(image, self.preprocessing.channels))
            if len(batch) == BATCH:
                yield batch
                batch = []
        if batch:
            yield batch


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a bundle, its parts checked as far as prediction needs them."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} is not a bundle (it has no manifest.json): give the folder that was exported") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error}): export the child again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise ValueError(f"{path} has format {found!r}, this version reads {FORMAT}: use the version that wrote it")
    kinds: dict[str, type] = {"classes": list, "preprocessing": dict, "files": dict}
    wrong = [name for name, kind in kinds.items() if not isinstance(manifest.get(name), kind)]
    if wrong or not all(isinstance(name, str) for name in manifest["classes"]):
        raise ValueError(f"{path} is damaged ({(wrong or ['classes'])[0]}): export the child again")
    return manifest


def read_verified(folder: Path, name: str, manifest: dict[str, Any]) -> bytes:
    """The content of a file of a bundle. Raises `ValueError` where it is missing or not the one that was exported."""
    path = folder / name
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): export the child again") from error
    if hashlib.sha256(content).hexdigest() != manifest["files"].get(name):
        raise ValueError(f"{path} was changed since it was exported: export the child again")
    return content


def file_of(identity: str, folder: Path) -> Path:
    """Where the image of that name lies under `folder`; sets that are arrays were written as PNG."""
    path = folder / identity
    return path if path.suffix else path.with_name(path.name + ".png")


def check(predictor: Predictor, folder: Path) -> tuple[int, int, list[str]]:
    """Repeat the predictions that the manifest's accuracy counts: images, how many are right, and which differ now.

    Raises `ValueError` for a damaged list and for an image that cannot be read.
    """
    content = read_verified(predictor.folder, "images.json", predictor.manifest)
    try:
        listed = [(str(row["image"]), row["label"], row["predicted"]) for row in json.loads(content)["images"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{predictor.folder / 'images.json'} is damaged ({error!r}): export the child again") from error
    probabilities = predictor.predict(file_of(image, folder) for image, _, _ in listed)
    found = [predictor.classes[int(best)] for best in probabilities.argmax(axis=1)]
    differ = [image for (image, _, before), now in zip(listed, found, strict=True) if before != now]
    return len(listed), sum(label == now for (_, label, _), now in zip(listed, found, strict=True)), differ


def report(predictor: Predictor, files: list[str], top: int, as_json: bool) -> None:
    """Print the `top` classes of each file, a line a file."""
    for file in files:
        row = predictor.predict([file])[0]
        best = [(predictor.classes[int(place)], float(row[place])) for place in np.argsort(-row)[:top]]
        if as_json:
            print(json.dumps({"image": file, "classes": [{"class": name, "probability": value} for name, value in best]}))
        else:
            print(printable(f"{file}: " + ", ".join(f"{name} {value:.1%}" for name, value in best)))


def printable(text: str) -> str:
    """Text that keeps to its line and sends a terminal no commands, whatever files and classes are called."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def main(arguments: list[str] | None = None) -> int:
    """The command line of a bundle; returns the exit code."""
    parser = argparse.ArgumentParser(description="Classify images with the model beside this file.")
    parser.add_argument("images", nargs="*", metavar="IMAGE")
    parser.add_argument("--json", action="store_true", help="print a line of JSON an image")
    parser.add_argument("--top", type=int, default=3, help="classes printed for each image")
    parser.add_argument("--check", metavar="FOLDER", help="repeat the manifest's accuracy on the images in FOLDER")
    given = parser.parse_args(arguments)
    if not given.images and not given.check:
        parser.error("give the paths of images, or --check FOLDER")
    if given.top < 1:
        parser.error("--top is at least 1")
    try:
        predictor = Predictor(Path(__file__).parent)
        report(predictor, given.images, given.top, given.json)
        if given.check:
            images, right, differ = check(predictor, Path(given.check))
            counted = predictor.manifest.get("accuracy", {})
            same = not differ and (images, right / max(1, images)) == (
                counted.get("images"),
                counted.get(counted.get("metric")),
            )
            print(json.dumps({"images": images, "top1": right / max(1, images), "differ": differ, "same_as_manifest": same}))
            return 0 if same else 1
    except ValueError as error:
        print(printable(str(error)), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
