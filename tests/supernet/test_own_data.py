"""Training on one's own images, from every kind of file, through the public way."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from supernet.data.splits import NAMES
from supernet.errors import InputError
from supernet.run import Run
from supernet.start import start
from supernet.train import Progress, train

CLASSES = ("blue", "green", "red")
OPTIONS: dict[str, Any] = {"recipe": "digits", "epochs": 2, "overrides": {"batch_size": 9, "calibration_images": 9}}


def pictures(count: int = 60) -> list[tuple[str, bytes]]:
    """Class and JPEG file of noisy pictures whose colour is their class."""
    made = []
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 90, (12, 14, 3))
        pixels[..., 2 - i % 3] += 150
        file = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG", quality=95)
        made.append((CLASSES[i % 3], file.getvalue()))
    return made


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def as_folder(root: Path) -> str:
    for i, (label, content) in enumerate(pictures()):
        (root / "folder" / label).mkdir(parents=True, exist_ok=True)
        (root / "folder" / label / f"{i:03d}.jpg").write_bytes(content)
    return str(root / "folder")


def as_webdataset(root: Path) -> str:
    for shard in range(3):
        with tarfile.open(root / f"pets-{shard:03d}.tar", "w") as tar:
            for i, (label, content) in list(enumerate(pictures()))[20 * shard : 20 * shard + 20]:
                add(tar, f"{i:06d}.jpg", content)
                add(tar, f"{i:06d}.cls", label.encode())
    return f"{root}/pets-{{000..002}}.tar"


def as_tar_of_folders(root: Path) -> str:
    with tarfile.open(root / "pets.tar", "w") as tar:
        for i, (label, content) in sorted(enumerate(pictures()), key=lambda item: item[1][0]):
            add(tar, f"pets/{label}/{i:03d}.jpg", content)
    return str(root / "pets.tar")


def as_parquet(root: Path) -> str:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = pictures()
    table = pa.table(
        {"image": [{"bytes": content, "path": None} for _, content in rows], "label": [label for label, _ in rows]}
    )
    pq.write_table(table, root / "pets.parquet", row_group_size=16)
    return str(root / "pets.parquet")


@pytest.fixture
def space(tmp_path: Path, tiny: dict[str, Any]) -> str:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny | {"in_channels": 3}))
    return str(tmp_path / "tiny.yaml")


@pytest.mark.slow
@pytest.mark.parametrize("write", [as_folder, as_webdataset, as_tar_of_folders, as_parquet])
@pytest.mark.parametrize("workers", [0, 2])
def test_two_epochs_train_and_an_opened_run_evaluates(
    tmp_path: Path, space: str, write: Callable[[Path], str], workers: int
) -> None:
    begun = start(write(tmp_path), tmp_path / "run", space=space, **OPTIONS)
    train(begun.run, workers=workers)
    run = Run.open(tmp_path / "run")
    assert run.finished
    assert run.classes == CLASSES
    assert run.source.fingerprint == run.data["fingerprint"]
    images = run.dataset.split("search_val")
    assert images.pixels(8).shape == (len(images), 8, 8, 3)
    loss = [line["children"]["largest"]["loss"] for line in lines(tmp_path / "run")]
    assert loss[-1] < loss[0]


@pytest.mark.slow
def test_the_same_images_in_another_wrapping_train_to_the_same_weights(tmp_path: Path, space: str) -> None:
    hashes = set()
    for write in (as_folder, as_tar_of_folders):
        begun = start(write(tmp_path), tmp_path / write.__name__, space=space, **OPTIONS)
        train(begun.run)
        hashes.add(Run.open(begun.run.path).weights_hash)
    assert len(hashes) == 1


def lines(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if "children" in line]


@pytest.mark.slow
def test_an_image_that_breaks_during_training_is_told_once_and_another_stands_in(tmp_path: Path, space: str) -> None:
    options = OPTIONS | {"overrides": OPTIONS["overrides"] | {"skip_unreadable": 0.05}}
    begun = start(as_folder(tmp_path), tmp_path / "run", space=space, **options)
    images = begun.run.dataset.split("train")
    broken = images.files[-1]  # not one of those that the statistics of batch norm are measured on
    assert broken is not None
    broken.write_bytes(b"x" * broken.stat().st_size)
    told: list[Progress] = []
    train(begun.run, progress=told.append)
    events = [event for progress in told for event in progress.events]
    assert [str(broken) in event for event in events].count(True) == 1
    assert Run.open(tmp_path / "run").finished


def test_images_that_cannot_be_read_are_left_out_up_to_the_limit(tmp_path: Path, space: str) -> None:
    data = Path(as_folder(tmp_path))
    (data / "red" / "002.jpg").write_text("a shopping list")
    for limit in ({}, {"skip_unreadable": 0.01}):
        with pytest.raises(InputError, match=r"1 of 60 .*red/002\.jpg: is not an image"):
            start(str(data), tmp_path / "run", space=space, **OPTIONS | {"overrides": OPTIONS["overrides"] | limit})
        assert not (tmp_path / "run").exists()
    begun = start(
        str(data), tmp_path / "run", space=space, **OPTIONS | {"overrides": OPTIONS["overrides"] | {"skip_unreadable": 0.02}}
    )
    assert any("1 images cannot be read" in reason for reason in begun.reasons)
    splits = Run.open(tmp_path / "run").dataset.splits
    assert [flaw.identity for flaw in splits.left_out] == ["red/002.jpg"]
    assert sum(len(getattr(splits, name)) for name in NAMES) == 59
