"""Run an exported model on images. A copy lies in every bundle, where it needs onnxruntime, NumPy and Pillow alone.

    python predict.py IMAGE...                 class and probability of each image; of a regression, its PSNR
    python predict.py IMAGE... --out FOLDER    of a regression: also write the images that the model makes, as PNG
    python predict.py --json IMAGE...          a line of JSON an image
    python predict.py --model model.int8.onnx IMAGE...
    python predict.py --check FOLDER           repeat the manifest's score, image by image, on the images in FOLDER

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
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before it is imported: it would write into the home directory
import onnxruntime

if __package__:
    from supernet.preprocess import Preprocessing, open_image
else:  # in a bundle the file lies beside this one
    sys.dont_write_bytecode = True  # a bundle stays as it was exported
    from preprocess import Preprocessing, open_image  # type: ignore[no-redef]

FORMAT = 1
BATCH = 64
OUTPUTS = {"classification": "logits", "regression": "outputs"}
"""Task -> name of the model's output."""
MOST_PSNR_DB = 100.0
"""Score of an image that is exactly right."""
ROUNDING = 2e-5
"""How far an image's root mean squared error (pixels in 0..1) may lie from that at export: other processors round otherwise."""


class Predictor:
    """A model of a bundle, by default model.onnx.

    Raises `ValueError` where the manifest or the model is missing, damaged or of another format.
    """

    def __init__(self, folder: str | os.PathLike[str], *, threads: int = 1, model: str = "model.onnx") -> None:
        self.folder, self.model = Path(folder), model
        self.manifest = read_manifest(self.folder)
        if Path(model).name != model or model not in self.manifest["files"]:
            given = ", ".join(name for name in self.manifest["files"] if name.startswith("model."))
            raise ValueError(f"{self.folder} has no file {printable(model)[:60]!r}: its models are {given}")
        content = read_verified(self.folder, model, self.manifest)
        self.task: str = self.manifest.get("task", "classification")
        self.classes: list[str] = self.manifest["classes"]
        self.preprocessing = Preprocessing.from_dict(self.manifest["preprocessing"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # what goes wrong is raised
        # weights that a model says lie in other files are sought here, where there are none, and not where we happen to stand
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self.folder))
        try:
            self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime has a bare exception of its own for every kind of damage
            reason = " ".join(str(error).split())
            raise ValueError(f"{self.folder / model} cannot be loaded ({reason}): export it again") from error
        if self._session.get_inputs()[0].type != "tensor(float)":
            raise ValueError(f"{self.folder / model} takes pixels (uint8), for programs of your own: choose another model here")
        self._check_shapes()

    def _check_shapes(self) -> None:
        side = self.preprocessing.resolution
        image = [self.preprocessing.channels, side, side]
        made = [len(self.classes)] if self.task == "classification" else image
        expected = [("images", image), (OUTPUTS[self.task], made)]
        found = [(value.name, value.shape[1:]) for value in (*self._session.get_inputs(), *self._session.get_outputs())]
        if found != expected:
            raise ValueError(f"{self.folder}: the manifest describes {expected}, but {self.model} has {found}: export it again")
        self._one = self._session.get_inputs()[0].shape[0] == 1

    def outputs(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """What the model gives for images in memory: logits, shape (N, K), or normalised images, shape (N, C, H, W)."""
        return self._run(self.preprocessing(images))

    def _run(self, x_nchw: NDArray[np.float32]) -> NDArray[np.float32]:
        parts = [x_nchw[at : at + 1] for at in range(len(x_nchw))] if self._one else [x_nchw]
        return np.concatenate([self._session.run(None, {"images": part})[0] for part in parts])

    def predict(self, images: Iterable[str | os.PathLike[str] | Image.Image]) -> NDArray[np.float32]:
        """Probabilities, shape (N, K), of image files or images; of a regression, the pixels it makes, in 0..1, shape (N, H, W, C).

        Raises `ValueError` that names a file that cannot be read.
        """
        if self.task == "regression":
            made = [pixels for pixels, _ in self.scored(images)]
            shape = (0, self.preprocessing.resolution, self.preprocessing.resolution, self.preprocessing.channels)
            return np.concatenate(made) if made else np.zeros(shape, np.float32)
        found = [self.outputs(batch) for batch in self._batches(images)]
        logits = np.concatenate(found) if found else np.zeros((0, len(self.classes)), np.float32)
        powers = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-np.inf))
        probabilities: NDArray[np.float32] = powers / powers.sum(axis=1, keepdims=True)
        return probabilities

    def scored(
        self, images: Iterable[str | os.PathLike[str] | Image.Image]
    ) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:  # fmt: skip
        """Of a regression, batch by batch: the pixels that it makes, clipped to 0..1, shape (n, H, W, C), and their PSNR in dB, (n,).

        The PSNR is that of the model's outputs as they are, not clipped, against the prepared images.
        """
        std = np.array(self.preprocessing.std, np.float32).reshape(-1, 1, 1)
        mean = np.array(self.preprocessing.mean, np.float32).reshape(-1, 1, 1)
        for batch in self._batches(images):
            x_nchw = self.preprocessing(batch)
            y_nchw = self._run(x_nchw)
            yield np.clip(y_nchw * std + mean, 0, 1).transpose(0, 2, 3, 1), psnr_db(y_nchw, x_nchw, self.preprocessing.std)

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
    if not isinstance(manifest.get("task", ""), str) or manifest.get("task", "classification") not in OUTPUTS:
        raise ValueError(f"{path} is of a task that this version does not know: use the version that wrote it")
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


def psnr_db(outputs_nchw: NDArray[np.float32], inputs_nchw: NDArray[np.float32], std: Sequence[float]) -> NDArray[np.float32]:
    """PSNR of each image in dB, shape (N,): 10 log10(1 / mean squared error of pixels in 0..1), at most `MOST_PSNR_DB`."""
    scale = np.array(std, np.float64).reshape(-1, 1, 1)
    error = (((outputs_nchw.astype(np.float64) - inputs_nchw) * scale) ** 2).mean(axis=(1, 2, 3))
    scores: NDArray[np.float32] = (-10 * np.log10(np.maximum(error, 10 ** (-MOST_PSNR_DB / 10)))).astype(np.float32)
    return scores


class Check(NamedTuple):
    """What repeating the list of images found: the mean score now, the mean that the list itself makes, and which images differ."""

    images: int
    score: float
    listed: float
    differ: list[str]

    def is_the_manifests(self, manifest: dict[str, Any]) -> bool:
        """Whether no image differs, and the list is what the manifest counted."""
        counted = manifest.get("accuracy", {})
        return not self.differ and (self.images, self.listed) == (counted.get("images"), counted.get(counted.get("metric")))


def check(predictor: Predictor, folder: Path) -> Check:
    """Repeat the predictions that the manifest's score counts.

    Raises `ValueError` for a damaged list and for an image that cannot be read.
    """
    content = read_verified(predictor.folder, "images.json", predictor.manifest)
    names = ("label", "predicted") if predictor.task == "classification" else ("psnr_db",)
    try:
        listed = [(str(row["image"]), *(row[name] for name in names)) for row in json.loads(content)["images"]]
        if predictor.task == "regression":
            listed = [(image, float(score)) for image, score in listed]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{predictor.folder / 'images.json'} is damaged ({error!r}): export the child again") from error
    files = [file_of(row[0], folder) for row in listed]
    if predictor.task == "regression":
        return _check_scores(predictor, files, [row[0] for row in listed], [row[1] for row in listed])
    found = [predictor.classes[int(best)] for best in predictor.predict(files).argmax(axis=1)]
    right = sum(label == now for (_, label, _), now in zip(listed, found, strict=True))
    before = sum(label == predicted for _, label, predicted in listed)
    differ = [image for (image, _, predicted), now in zip(listed, found, strict=True) if predicted != now]
    count = max(1, len(listed))
    return Check(len(listed), right / count, before / count, differ)


def _check_scores(predictor: Predictor, files: list[Path], images: list[str], before: list[float]) -> Check:
    found = [float(score) for _, scores in predictor.scored(files) for score in scores]
    errors = [(10 ** (-one / 20), 10 ** (-other / 20)) for one, other in zip(before, found, strict=True)]
    differ = [image for image, (one, other) in zip(images, errors, strict=True) if not abs(one - other) <= ROUNDING]
    count = max(1, len(images))
    return Check(len(images), sum(found) / count, float(np.mean(before)) if before else 0.0, differ)


def report(predictor: Predictor, files: list[str], top: int, as_json: bool, out: Path | None = None) -> None:
    """Print the `top` classes of each file, a line a file; of a regression its PSNR, its image being written into `out`."""
    if predictor.task == "regression":
        _report_images(predictor, files, as_json, out)
        return
    if out is not None:
        raise ValueError("--out is for models that make images: this one names classes")
    for file in files:
        row = predictor.predict([file])[0]
        best = [(predictor.classes[int(place)], float(row[place])) for place in np.argsort(-row)[:top]]
        if as_json:
            print(json.dumps({"image": file, "classes": [{"class": name, "probability": value} for name, value in best]}))
        else:
            print(printable(f"{file}: " + ", ".join(f"{name} {value:.1%}" for name, value in best)))


def _report_images(predictor: Predictor, files: list[str], as_json: bool, out: Path | None) -> None:
    written = dict(zip(files, _places(files, out), strict=True)) if out is not None else {}
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    for file in files:
        pixels, scores = next(predictor.scored([file]))
        place, score = written.get(file), float(scores[0])
        if place is not None:
            whole = np.round(pixels[0] * 255).astype(np.uint8)
            Image.fromarray(whole[..., 0] if whole.shape[2] == 1 else whole).save(place, "PNG")
        if as_json:
            print(json.dumps({"image": file, "psnr_db": score, "output": str(place) if place else None}))
        else:
            print(printable(f"{file}: PSNR {score:.2f} dB" + (f", {place}" if place else "")))


def _places(files: list[str], out: Path) -> list[Path]:
    """A PNG under `out` for each file, named after it. Raises `ValueError` where that would be one of the files themselves."""
    given, taken, places = {Path(file).resolve() for file in files}, set(), {}
    for file in dict.fromkeys(files):
        stem, number = Path(file).stem, 1
        place = out / f"{stem}.png"
        while place in taken:
            number += 1
            place = out / f"{stem}-{number}.png"
        if place.resolve() in given:
            raise ValueError(f"{place} would be replaced by its own result: give another folder to --out")
        taken.add(place)
        places[file] = place
    return [places[file] for file in files]


def printable(text: str) -> str:
    """Text that keeps to its line and sends a terminal no commands, whatever files and classes are called."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def main(arguments: list[str] | None = None) -> int:
    """The command line of a bundle; returns the exit code."""
    parser = argparse.ArgumentParser(description="Run the model beside this file on images.")
    parser.add_argument("images", nargs="*", metavar="IMAGE")
    parser.add_argument("--json", action="store_true", help="print a line of JSON an image")
    parser.add_argument("--top", type=int, default=3, help="classes printed for each image")
    parser.add_argument("--out", metavar="FOLDER", help="where the images go that a regression makes")
    parser.add_argument("--check", metavar="FOLDER", help="repeat the manifest's score on the images in FOLDER")
    parser.add_argument("--model", default="model.onnx", help="another model of the bundle, such as model.int8.onnx")
    given = parser.parse_args(arguments)
    if not given.images and not given.check:
        parser.error("give the paths of images, or --check FOLDER")
    if given.top < 1:
        parser.error("--top is at least 1")
    try:
        predictor = Predictor(Path(__file__).parent, model=given.model)
        report(predictor, given.images, given.top, given.json, Path(given.out) if given.out else None)
        if given.check:
            done = check(predictor, Path(given.check))
            metric = "top1" if predictor.task == "classification" else "psnr_db"
            same = done.is_the_manifests(predictor.manifest)
            print(json.dumps({"images": done.images, metric: done.score, "differ": done.differ, "same_as_manifest": same}))
            return 0 if same else 1
    except ValueError as error:
        print(printable(str(error)), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
