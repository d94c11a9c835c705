"""Opening images from folders, arrays and the known sets."""

from __future__ import annotations

import io
import os
import pickle
import re
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from supernet.data.sources import Source, evenly, flaws, open_source
from supernet.errors import InputError


def write_image(path: Path, *, mode: str = "RGB", size: tuple[int, int] = (6, 5), shade: int = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, shade if len(mode) == 1 else (shade,) * len(mode)).save(path)
    return path


def folder_of(root: Path, *names: str, **options: object) -> Path:
    for name in names:
        write_image(root / name, **options)  # type: ignore[arg-type]
    return root


def write_npz(path: Path, **arrays: object) -> str:
    given = {"images": np.zeros((4, 5, 6), np.uint8), "labels": np.array([0, 1, 0, 1])} | arrays
    np.savez(path, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    return str(path)


def identities(source: Source) -> list[str]:
    return [source.identity(i) for i in range(len(source))]


def test_digits_are_scikit_learns_scaled_to_eight_bits() -> None:
    from sklearn.datasets import load_digits

    source = open_source("digits")
    assert (len(source), source.channels, source.image_size, source.name) == (1797, 1, 8, "digits")
    assert (source.classes, set(source.parts)) == (tuple("0123456789"), {""})
    assert (source.labels.dtype, source.identity(12), source.file(12)) == (np.int64, "00012", None)
    np.testing.assert_array_equal(np.asarray(source.image(7)), np.round(load_digits().images[7] * 255 / 16))
    np.testing.assert_array_equal(source.labels, load_digits().target)


def test_a_folder_of_class_folders_opens_in_a_fixed_order(tmp_path: Path) -> None:
    names = ["dog/2.png", "dog/1.JPG", "cat/deep/er/x.webp", "cat/b.bmp", "cat/a.jpeg"]
    folder_of(tmp_path, *names)
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    source = open_source(str(tmp_path))
    assert source.classes == ("cat", "dog")
    assert identities(source) == ["cat/a.jpeg", "cat/b.bmp", "cat/deep/er/x.webp", "dog/1.JPG", "dog/2.png"]
    assert source.labels.tolist() == [0, 0, 0, 1, 1]
    assert (set(source.parts), source.channels, source.image_size) == ({""}, 3, 5)
    assert source.file(3) == tmp_path.resolve() / "dog" / "1.JPG"
    assert source.image(0).mode == "RGB"


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Val"])
def test_a_folder_that_its_maker_divided_keeps_the_parts(tmp_path: Path, val: str) -> None:
    folder_of(tmp_path, "test/b/1.png", "test/a/1.png", f"{val}/a/1.png", f"{val}/b/1.png", "train/b/1.png", "train/a/1.png")
    source = open_source(str(tmp_path))
    assert source.parts == ("train", "train", "val", "val", "test", "test")
    assert identities(source)[:3] == ["train/a/1.png", "train/b/1.png", f"{val}/a/1.png"]
    assert source.labels.tolist() == [0, 1, 0, 1, 0, 1]


def test_a_name_opens_the_same_source_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of(tmp_path / "pets", "cat/1.png", "dog/1.png")
    write_npz(tmp_path / "pets.npz")
    monkeypatch.chdir(tmp_path)
    for text in ("pets", "./pets/../pets", "pets.npz", "digits"):
        source = open_source(text)
        monkeypatch.chdir("/")
        assert open_source(source.name).fingerprint == source.fingerprint
        monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("modes", "channels"), [(["L", "L"], 1), (["L", "1"], 1), (["L", "I;16"], 1), (["L", "RGB"], 3), (["P", "L"], 3)]
)
def test_only_a_folder_of_grey_files_has_one_channel(tmp_path: Path, modes: list[str], channels: int) -> None:
    for name, mode in zip("ab", modes, strict=True):
        (tmp_path / name).mkdir()
        Image.new(mode, (4, 4)).save(tmp_path / name / "1.png")
    source = open_source(str(tmp_path))
    assert (source.channels, source.image(0).mode) == (channels, "L" if channels == 1 else "RGB")


def test_hidden_files_and_folders_are_passed_over(tmp_path: Path) -> None:
    folder_of(tmp_path, "cat/1.png", "cat/._1.png", "cat/.cache/2.png", "dog/1.png", ".git/1.png")
    assert identities(open_source(str(tmp_path))) == ["cat/1.png", "dog/1.png"]


def test_names_may_hold_spaces_and_any_script(tmp_path: Path) -> None:
    folder_of(tmp_path, "Müller's cat/bild 1.png", "猫 と 犬/写真.png", " lead/x y.png")
    source = open_source(str(tmp_path))
    assert source.classes == (" lead", "Müller's cat", "猫 と 犬")
    assert [source.image(i).size for i in range(3)] == [(6, 5)] * 3
    assert len(source.fingerprint) == 64


def test_names_that_are_not_unicode_open_too(tmp_path: Path) -> None:
    folder_of(tmp_path, "a/1.png", "b/1.png")
    try:
        (tmp_path / "a" / "1.png").rename(os.fsdecode(os.fsencode(tmp_path) + b"/a/\xff.png"))
    except OSError:
        pytest.skip("this file system takes Unicode names only")
    source = open_source(str(tmp_path))
    assert source.image(0).size == (6, 5)
    assert len(source.fingerprint) == 64


def test_class_names_that_differ_by_case_are_two_classes(tmp_path: Path) -> None:
    folder_of(tmp_path, "a/1.png", "A/1.png")
    if len(list(tmp_path.iterdir())) == 1:
        pytest.skip("this file system does not tell cases apart")
    assert open_source(str(tmp_path)).classes == ("A", "a")


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    folder_of(tmp_path, "plane/1.png", "train/1.png", "test/1.png")
    assert open_source(str(tmp_path)).classes == ("plane", "test", "train")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "no class folders"),
        (["1.png"], "no class folders"),
        (["cat/1.png"], "1 class: give images of at least 2"),
        (["cat/1.png", "dog/1.txt"], "dog holds no image"),
        (["train/1.png", "test/1.png"], "train has no class folders"),
        (["test/a/1.png", "val/b/1.png"], "one train folder"),
        (["train/a/1.png", "train/b/1.png", "val/a/1.png", "valid/a/1.png"], "at most one val"),
        (["train/cat/1.png", "train/dog/1.png", "test/cats/1.png"], r"no class 'cats' \(did you mean cat\?\)"),
        (["train/cat/1.png", "train/dog/1.png", "test/Cat/1.png"], r"no class 'Cat' \(did you mean cat\?\)"),
        (["train/cat/1.png", "train/dog/1.png", "val/cat/x.txt"], "val/cat holds no image"),
        (["train/cat/1.png", "train/dog/1.png", "test/1.png"], "test has no class folders"),
        (["train/cat/1.png", "train/dog/1.png", "bird/1.png"], "train/ with folders in it and also bird"),
    ],
)
def test_a_folder_that_is_not_laid_out_so_is_refused(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        if name.endswith(".txt"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("x")
        else:
            write_image(tmp_path / name)
    with pytest.raises(InputError, match=message):
        open_source(str(tmp_path))


def test_links_that_go_round_are_refused_and_do_not_hang(tmp_path: Path) -> None:
    for where in ("cat/again", "loop"):
        root = folder_of(tmp_path / where.replace("/", "-"), "cat/1.png", "dog/1.png")
        (root / where).symlink_to(root, target_is_directory=True)
        with pytest.raises(InputError, match="is a link"):
            open_source(str(root))
    (tmp_path / "self").symlink_to(tmp_path / "self")
    with pytest.raises(InputError):
        open_source(str(tmp_path / "self"))
    root = folder_of(tmp_path / "ends", "cat/1.png", "dog/1.png")
    (root / "cat" / "2.png").symlink_to(root / "cat" / "2.png")
    with pytest.raises(InputError, match=r"2\.png cannot be read"):
        open_source(str(root))


def test_a_class_folder_may_be_a_link_to_elsewhere(tmp_path: Path) -> None:
    folder_of(tmp_path, "elsewhere/1.png", "data/dog/1.png")
    (tmp_path / "data" / "cat").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert identities(open_source(str(tmp_path / "data"))) == ["cat/1.png", "dog/1.png"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("digit", r"did you mean digits\?.*cifar100, torchvision:NAME, a folder of class folders, or an \.npz, "),
        ("CIFAR-10", r"did you mean cifar10\?"),
        ("", "no data called ''"),
        ("no/such/folder", "no folder or file /.*no/such/folder"),
        ("missing.npz", r"no folder or file /.*missing\.npz"),
        ("~nobody-is-called-so/x", "cannot be read"),
        ("a" * 5000, "cannot be read"),
    ],
)
def test_a_name_that_means_nothing_lists_what_is_possible(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_source(text)


def test_a_file_that_is_no_npz_is_refused(tmp_path: Path) -> None:
    path = write_image(tmp_path / "cat.png")
    with pytest.raises(InputError, match=r"neither a folder nor an \.npz, \.tar or \.parquet file"):
        open_source(str(path))


def test_the_fingerprint_follows_every_change_of_the_data(tmp_path: Path) -> None:
    root = folder_of(tmp_path, "a/1.png", "a/2.png", "b/1.png")
    seen = [open_source(str(root)).fingerprint]
    assert open_source(str(root)).fingerprint == seen[0]
    write_image(root / "a" / "1.png", size=(30, 31))
    seen.append(open_source(str(root)).fingerprint)
    (root / "a" / "2.png").rename(root / "b" / "2.png")
    seen.append(open_source(str(root)).fingerprint)
    (root / "b" / "2.png").unlink()
    seen.append(open_source(str(root)).fingerprint)
    changes: list[dict[str, object]] = [
        {},
        {"images": np.eye(4, 30, dtype=np.uint8).reshape(4, 5, 6)},
        {"images": np.zeros((4, 6, 5), np.uint8)},
        {"labels": np.array([1, 1, 0, 1])},
        {"classes": np.array(["x", "y"])},
        {"parts": np.array(["train", "train", "train", "test"])},
    ]
    seen += [open_source(write_npz(tmp_path / "x.npz", **change)).fingerprint for change in changes]
    assert len(set(seen)) == len(seen)


def test_moving_a_folder_does_not_change_its_fingerprint(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "here", "a/1.png", "b/1.png")
    before = open_source(str(root)).fingerprint
    assert open_source(str(root.rename(tmp_path / "there"))).fingerprint == before


def test_files_that_cannot_be_decoded_are_listed_with_the_reason(tmp_path: Path) -> None:
    root = folder_of(tmp_path, "a/1.png", "b/1.png", "b/3.png")
    (root / "a" / "0.jpg").write_text("a shopping list")
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file, "JPEG")
    (root / "b" / "2.jpg").write_bytes(file.getvalue()[:-500])
    source = open_source(str(root))
    found = flaws(source)
    assert [flaw.identity for flaw in found] == ["a/0.jpg", "b/2.jpg"]
    assert found[0].reason.startswith("is not an image")
    assert "truncated" in found[1].reason
    assert [flaw.image for flaw in flaws(source, np.array([3, 0, 1]))] == [3, 0]
    assert (source.channels, source.image_size) == (3, 5)
    with pytest.raises(InputError, match=r"a/0\.jpg: is not an image.*: repair the file or remove it"):
        source.image(0)
    assert flaws(open_source("digits")) == []


def test_a_folder_without_one_readable_image_is_refused(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").write_text("x")
    with pytest.raises(InputError, match=r"no image in .* can be read: a/1\.jpg is one"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("shape", [(4, 5, 6), (4, 5, 6, 1), (4, 5, 6, 3)])
def test_an_npz_opens_as_images(tmp_path: Path, shape: tuple[int, ...]) -> None:
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    parts = np.array(["train", "test", "train", "test"])
    source = open_source(write_npz(tmp_path / "x.npz", images=images, parts=parts, classes=np.array(["no", "yes"])))
    assert (source.channels, source.image_size, source.classes) == (3 if shape[3:] == (3,) else 1, 5, ("no", "yes"))
    assert identities(source) == ["train/00000", "test/00000", "train/00001", "test/00001"]
    np.testing.assert_array_equal(np.asarray(source.image(2)).ravel(), images[2].ravel())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": np.zeros((4, 5, 6))}, "images are uint8"),
        ({"images": np.zeros((4, 5, 6, 2), np.uint8)}, "images are uint8"),
        ({"images": np.zeros((4, 5), np.uint8)}, "images are uint8"),
        ({"images": np.zeros((0, 5, 6), np.uint8), "labels": np.zeros(0, int)}, "images are uint8"),
        ({"images": None}, "lacks .'images'"),
        ({"label": np.zeros(4)}, "holds .'label'"),
        ({"labels": np.zeros(4)}, "whole numbers"),
        ({"labels": np.zeros(3, int)}, "4 whole numbers"),
        ({"labels": np.array([True, False, True, False])}, "whole numbers"),
        ({"labels": np.array([0, -1, 0, 1])}, "from -1 to 1"),
        ({"labels": np.array([0, 1, 2**62, 1])}, "from 0 to 4611686018427387904"),
        ({"labels": np.zeros(4, int)}, "at least 2 classes"),
        ({"labels": np.array([0, 0, 0, 2])}, "no image of class '1'"),
        ({"labels": np.array([0, 1, 2, 1]), "classes": np.array(["a", "b"])}, "largest label is 2"),
        ({"classes": np.array(["a", "b", "c"])}, "no image of class 'c'"),
        ({"classes": np.array(["a", "a"])}, "different names"),
        ({"classes": np.array([1, 2])}, "different names"),
        ({"parts": np.array(["train", "train", "dev", "test"])}, "train, val or test"),
        ({"parts": np.array(["train", "test"])}, "4 words"),
        ({"parts": np.array(["test", "test", "val", "test"])}, "needs a train part"),
    ],
)
def test_an_npz_with_anything_else_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_source(write_npz(tmp_path / "x.npz", **change))


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (self.path,))  # type: ignore[return-value]


def test_object_arrays_are_refused_and_nothing_in_them_runs(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    bomb = np.array([Bomb(mark)] * 4, dtype=object)
    np.load(io.BytesIO(saved(bomb)), allow_pickle=True)
    mark.unlink()  # the bomb does go off where pickle is let in
    for name in ("images", "labels", "classes", "parts", "more"):
        with pytest.raises(InputError, match="plain arrays"):
            open_source(write_npz(tmp_path / "x.npz", **{name: bomb}))
    (tmp_path / "y.npz").write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(InputError, match="plain arrays"):
        open_source(str(tmp_path / "y.npz"))
    assert not mark.exists()


def saved(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def test_files_that_are_no_whole_npz_are_refused(tmp_path: Path) -> None:
    whole = Path(write_npz(tmp_path / "x.npz", images=np.random.default_rng(0).integers(0, 9, (4, 50, 50), dtype=np.uint8)))
    content = whole.read_bytes()
    for wrong in (
        b"",
        b"text",
        saved(np.zeros(3)),
        content[:-40],
        content[:5000],
        content.replace(content[3000:3100], bytes(100)),
    ):
        whole.write_bytes(wrong)
        with pytest.raises(InputError, match="plain arrays"):
            open_source(str(whole))
    with zipfile.ZipFile(whole, "w") as archive:
        archive.writestr("images", "not an array")
        archive.writestr("labels", "not an array")
    with pytest.raises(InputError, match="images are uint8"):
        open_source(str(whole))


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_mnist(raw: Path, train: int = 20, test: int = 10) -> None:
    raw.mkdir(parents=True)
    for prefix, count in (("train", train), ("t10k", test)):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(idx(pixels))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(idx((np.arange(count) % 10).astype(np.uint8)))


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_torchvision_sets_are_read_from_their_root(tmp_path: Path, name: str, folder: str) -> None:
    write_mnist(tmp_path / folder / "raw")
    source = open_source(name, root=tmp_path)
    assert (len(source), source.channels, source.image_size, source.name) == (30, 1, 28, name)
    assert source.parts == ("train",) * 20 + ("test",) * 10
    assert (source.identity(19), source.identity(22), source.labels[22]) == ("train/00019", "test/00002", 2)
    assert len(source.classes) == 10
    pixels = np.random.default_rng(10).integers(0, 256, (10, 28, 28), dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(source.image(22)), pixels[2])


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10", "cifar100"])
def test_torchvision_sets_that_are_not_there_say_how_to_get_them(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"pass root.*--download"):
        open_source(name)
    with pytest.raises(InputError, match=rf"{name} was not found whole in {re.escape(str(tmp_path))}.*--download"):
        open_source(name, root=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_torchvision_set_is_refused(tmp_path: Path) -> None:
    write_mnist(tmp_path / "MNIST" / "raw")
    path = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="was not found whole"):
        open_source("mnist", root=tmp_path)


def test_a_cifar_batch_with_another_content_is_never_unpickled(tmp_path: Path) -> None:
    import torchvision.datasets

    mark = tmp_path / "executed"
    batches = tmp_path / "cifar-10-batches-py"
    batches.mkdir()
    kind = torchvision.datasets.CIFAR10
    for name, _ in [*kind.train_list, *kind.test_list, ("batches.meta", "")]:
        (batches / name).write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(InputError, match="was not found whole"):
        open_source("cifar10", root=tmp_path)
    assert not mark.exists()


def test_a_source_travels_to_another_process(tmp_path: Path) -> None:
    for text in ("digits", str(folder_of(tmp_path, "a/1.png", "b/1.png"))):
        source = open_source(text)
        copy = pickle.loads(pickle.dumps(source))
        assert (copy.fingerprint, copy.image(1).tobytes()) == (source.fingerprint, source.image(1).tobytes())


def test_an_even_sample_keeps_the_order_and_both_ends() -> None:
    sample = evenly(np.arange(1000), 7)
    assert (len(sample), sample[0], sample[-1]) == (7, 0, 999)
    assert (np.diff(sample) > 100).all()
    np.testing.assert_array_equal(evenly(np.arange(5), 7), np.arange(5))
