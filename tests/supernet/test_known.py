"""Sets that torchvision reads, of which small copies are written here."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets
from PIL import Image

from supernet.data import known
from supernet.data.sources import Source, flaws, open_source
from supernet.errors import InputError


def write_image(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (shade, 0, 0)).save(path)


def opened(name: str, root: Path) -> Source:
    return open_source(f"torchvision:{name}", root=root)


def shades(source: Source) -> list[int]:
    return [source.image(i).getpixel((0, 0))[0] for i in range(len(source))]  # type: ignore[index]


def eurosat(root: Path) -> None:
    for i, name in enumerate(("River/2.jpg", "Forest/1.jpg", "River/1.jpg")):
        write_image(root / "eurosat" / "2750" / name, 50 * i)


def food(root: Path) -> None:
    base = root / "food-101"
    (base / "meta").mkdir(parents=True)
    for part, first in (("train", 0), ("test", 100)):
        names = {label: [f"{label}/{first + i}" for i in range(2)] for label in ("pie", "cake")}
        (base / "meta" / f"{part}.json").write_text(json.dumps(names))
        for i, name in enumerate([name for own in names.values() for name in own]):
            write_image(base / "images" / f"{name}.jpg", first + 20 * i)


def pets(root: Path) -> None:
    base = root / "oxford-iiit-pet"
    (base / "annotations").mkdir(parents=True)
    for part, first in (("trainval", 0), ("test", 100)):
        lines = []
        for i in range(4):
            name = f"{['Abyssinian', 'great_pug'][i % 2]}_{first + i}"
            write_image(base / "images" / f"{name}.jpg", first + 20 * i)
            lines.append(f"{name} {i % 2 + 1} 1 1")
        (base / "annotations" / f"{part}.txt").write_text("\n".join(lines))


def dtd(root: Path) -> None:
    base = root / "dtd" / "dtd"
    (base / "labels").mkdir(parents=True)
    for part, first in (("train", 0), ("val", 60), ("test", 120)):
        names = [f"{label}/{label}_{first}.jpg" for label in ("woven", "dotted")]
        for i, name in enumerate(names):
            write_image(base / "images" / name, first + 20 * i)
        (base / "labels" / f"{part}1.txt").write_text("\n".join(names))


def test_a_set_without_parts(tmp_path: Path) -> None:
    eurosat(tmp_path)
    source = opened("EuroSAT", tmp_path)
    assert (source.classes, source.labels.tolist(), set(source.parts)) == (("Forest", "River"), [0, 1, 1], {""})
    assert [source.identity(i) for i in range(3)] == [
        f"eurosat/2750/{name}" for name in ("Forest/1.jpg", "River/1.jpg", "River/2.jpg")
    ]
    assert source.name == "torchvision:EuroSAT"
    assert source.file(1) == tmp_path.resolve() / "eurosat/2750/River/1.jpg"


def test_sets_of_files_with_train_and_test(tmp_path: Path) -> None:
    food(tmp_path)
    source = opened("Food101", tmp_path)
    assert (source.classes, source.parts) == (("cake", "pie"), ("train",) * 4 + ("test",) * 4)
    assert source.labels.tolist() == [0, 0, 1, 1] * 2
    assert all(source.identity(i).split("/")[2] == source.classes[source.labels[i]] for i in range(8))
    pets(tmp_path)
    source = opened("OxfordIIITPet", tmp_path)
    assert (source.classes, source.labels.tolist()) == (("Abyssinian", "Great Pug"), [0, 0, 1, 1] * 2)
    assert source.parts == ("train",) * 4 + ("test",) * 4


def test_a_set_with_three_parts_keeps_them(tmp_path: Path) -> None:
    dtd(tmp_path)
    source = opened("DTD", tmp_path)
    assert source.classes == ("dotted", "woven")
    assert source.parts == ("train", "train", "val", "val", "test", "test")
    assert source.labels.tolist() == [0, 1] * 3
    np.testing.assert_allclose(shades(source), [20, 0, 80, 60, 140, 120], atol=3)


def test_a_set_of_arrays_with_the_channels_first(tmp_path: Path) -> None:
    scipy_io = pytest.importorskip("scipy.io")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3, 10), dtype=np.uint8)
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(torchvision.datasets.SVHN, "_check_integrity", lambda _: True)  # the real files have published sums
        for part, own in zip(("train", "test"), pixels, strict=True):
            scipy_io.savemat(tmp_path / f"{part}_32x32.mat", {"X": own, "y": np.arange(1, 11)[:, None]})
        source = opened("SVHN", tmp_path)
    assert (len(source), source.channels, source.parts) == (20, 3, ("train",) * 10 + ("test",) * 10)
    assert source.labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0] * 2
    np.testing.assert_array_equal(np.asarray(source.image(13)), pixels[1, :, :, :, 3])


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def test_the_short_name_is_the_same_set(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix in ("train", "t10k"):
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(idx(np.zeros((10, 28, 28), np.uint8)))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(np.arange(10).astype(np.uint8)))
    short = open_source("mnist", root=tmp_path)
    assert opened("MNIST", tmp_path).fingerprint == short.fingerprint


def test_a_damaged_image_is_told_and_a_missing_one_refused(tmp_path: Path) -> None:
    food(tmp_path)
    path = tmp_path / "food-101" / "images" / "pie" / "0.jpg"
    path.write_text("x")
    assert [flaw.identity for flaw in flaws(opened("Food101", tmp_path))] == ["food-101/images/pie/0.jpg"]
    path.unlink()
    with pytest.raises(InputError, match=r"not found whole in .* \(there is no food-101/images/pie/0\.jpg\)"):
        opened("Food101", tmp_path)


@pytest.mark.parametrize("name", sorted(known.SETS))
def test_every_set_that_is_not_there_says_how_to_get_it(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=rf"torchvision:{name} is read from a folder: pass root"):
        open_source(f"torchvision:{name}")
    with pytest.raises(InputError, match=rf"torchvision:{name} was not found whole in .*--download") as caught:
        opened(name, tmp_path)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flowers102", r"did you mean Flowers102\?"),
        ("Flower102", r"did you mean Flowers102\?"),
        ("LSUN", "there is no torchvision:LSUN here"),
        ("ImageNet", "give the folder that its images lie in"),
        ("", "give one of MNIST"),
        ("__doc__", "give one of MNIST"),
    ],
)
def test_other_names_are_refused(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        opened(name, tmp_path)


def test_nothing_is_fetched_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    class Fake:
        def __init__(self, root: str, *, split: str, download: bool) -> None:
            asked.append(download)
            raise RuntimeError("not there")

    monkeypatch.setattr(torchvision.datasets, "DTD", Fake)
    for download in (False, True):
        with pytest.raises(InputError, match="could not be downloaded to" if download else "was not found whole in"):
            open_source("torchvision:DTD", root=tmp_path, download=download)
    assert asked == [False, True]
