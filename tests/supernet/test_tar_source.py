"""Images in tar files: layouts, reading at a place, and files that want to do harm."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from supernet.data import shards as shards_module
from supernet.data.augment import Augment
from supernet.data.batches import TrainingBatches
from supernet.data.sources import Source, flaws, open_source
from supernet.errors import InputError


def encoded(shade: int, kind: str = "PNG", size: tuple[int, int] = (6, 5)) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(shade).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes | tarfile.TarInfo], **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:  # type: ignore[call-overload]
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def samples(labels: list[object], first: int = 0, suffix: str = "cls", image: str = "png") -> dict[str, bytes]:
    """Samples as webdataset writes them."""
    made = {}
    for i, label in enumerate(labels, first):
        made[f"{i:06d}.{image}"] = encoded(i, {"jpg": "JPEG"}.get(image, image.upper()))
        made[f"{i:06d}.{suffix}"] = (str(label) if suffix == "cls" else json.dumps({"label": label, "width": 6})).encode()
    return made


def in_folders(*names: str) -> dict[str, bytes]:
    return {name: encoded(i) for i, name in enumerate(names)}


def identities(source: Source) -> list[str]:
    return [source.identity(i) for i in range(len(source))]


def opened(path: Path | str) -> Source:
    return open_source(str(path))


# --- layouts ---


@pytest.mark.parametrize("suffix", ["cls", "json"])
@pytest.mark.parametrize(
    ("labels", "classes", "numbers"),
    [
        ([10, 2, 10, 0], ("0", "2", "10"), [2, 1, 2, 0]),
        (["dog", "cat", "dog", "ant"], ("ant", "cat", "dog"), [2, 1, 2, 0]),
        (["3", "dog", "3", "11"], ("11", "3", "dog"), [1, 2, 1, 0]),
    ],
)
def test_samples_of_webdataset(
    tmp_path: Path, suffix: str, labels: list[object], classes: tuple[str, ...], numbers: list[int]
) -> None:
    source = opened(write_tar(tmp_path / "x.tar", samples(labels, suffix=suffix)))
    assert (source.classes, source.labels.tolist(), set(source.parts)) == (classes, numbers, {""})
    assert identities(source) == ["000000.png", "000001.png", "000002.png", "000003.png"]
    for i in range(4):
        np.testing.assert_array_equal(np.asarray(source.image(i)), np.asarray(Image.open(io.BytesIO(encoded(i)))))


@pytest.mark.parametrize("image", ["jpg", "png", "webp"])
def test_every_kind_of_image_and_keys_with_folders_and_dots(tmp_path: Path, image: str) -> None:
    members = {f"some.where/{name}": content for name, content in samples([0, 1], image=image).items()}
    source = opened(write_tar(tmp_path / "x.tar", members | {"some.where/000000.txt": b"a caption"}))
    assert identities(source) == [f"some.where/00000{i}.{image}" for i in (0, 1)]
    assert (source.labels.tolist(), source.image(1).size) == ([0, 1], (6, 5))


def test_a_cls_wins_over_json_and_json_without_label_is_no_label(tmp_path: Path) -> None:
    members = samples(["a", "b"]) | {"000000.json": b'{"label": "c"}', "000001.json": b'{"width": 5}'}
    assert opened(write_tar(tmp_path / "x.tar", members)).classes == ("a", "b")
    members = in_folders("cat/1.png", "dog/2.png") | {"cat/1.json": b'{"photographer": "x"}'}
    assert opened(write_tar(tmp_path / "y.tar", members)).classes == ("cat", "dog")


@pytest.mark.parametrize("around", ["", "./", "flowers/", "./a/b/"])
def test_class_folders_with_and_without_parts_and_folders_around(tmp_path: Path, around: str) -> None:
    names = ("cat/1.b.png", "cat/deep/1.png", "dog/1.png")
    source = opened(write_tar(tmp_path / "x.tar", in_folders(*(around + name for name in names))))
    assert (source.classes, source.labels.tolist(), set(source.parts)) == (("cat", "dog"), [0, 0, 1], {""})
    parted = [f"{around}{part}/{name}" for part in ("train", "validation", "Test") for name in names]
    source = opened(write_tar(tmp_path / "y.tar", in_folders(*parted)))
    assert source.parts == ("train",) * 3 + ("val",) * 3 + ("test",) * 3
    assert source.labels.tolist() == [0, 0, 1] * 3


def test_a_tar_of_a_folder_is_the_folder(tmp_path: Path) -> None:
    for i, name in enumerate(("train/10/1.png", "train/9/2.png", "test/9/1.png", "test/10/x y.png", "train/9/.hidden.png")):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(encoded(i))
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        tar.add(tmp_path / "set", "set")
    folder, packed = opened(tmp_path / "set"), opened(tmp_path / "set.tar")
    assert packed.classes == folder.classes == ("10", "9")
    order = [identities(packed).index(f"set/{name}") for name in identities(folder)]
    assert packed.labels[order].tolist() == folder.labels.tolist()
    assert [packed.parts[i] for i in order] == list(folder.parts)
    assert all(packed.image(j).tobytes() == folder.image(i).tobytes() for i, j in enumerate(order))


def test_shards_by_folder_by_pattern_and_their_parts(tmp_path: Path) -> None:
    for part, first in (("train", 0), ("val", 10)):
        for shard in range(2):
            write_tar(tmp_path / "wds" / f"pets-{part}-{shard:04d}.tar", samples([0, 1], first + 2 * shard))
            write_tar(tmp_path / "sub" / part / f"{shard:04d}.tar", samples([0, 1], first + 2 * shard))
    expected = ("train",) * 4 + ("val",) * 4
    sources = [
        opened(tmp_path / "wds"),
        opened(f"{tmp_path}/wds/pets-{{train,val}}-{{0000..0001}}.tar"),
        opened(tmp_path / "sub"),
    ]
    assert all(source.parts == expected and source.labels.tolist() == [0, 1] * 4 for source in sources)
    assert sources[0].identity(2) == "pets-train-0001.tar/000002.png"
    assert sources[2].identity(7) == "val/0001.tar/000013.png"
    assert [opened(source.name).fingerprint for source in sources] == [source.fingerprint for source in sources]
    assert sources[0].fingerprint == sources[1].fingerprint
    assert set(opened(f"{tmp_path}/wds/pets-train-000{{0..1}}.tar").parts) == {""}


def test_the_flowers_layout_with_one_shard_per_part(tmp_path: Path) -> None:
    for part in ("train", "test"):
        write_tar(tmp_path / f"{part}.tar", in_folders(f"{part}/a/1.png", f"{part}/b/1.png"))
    assert opened(tmp_path).parts == ("test", "test", "train", "train")
    write_tar(tmp_path / "test.tar", in_folders("test/a/1.png", "test/b/1.png", "train/b/9.png"))
    with pytest.raises(InputError, match=r"test\.tar: train/b/9\.png is of test by the tar's name and of train by the folder"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({}, "holds no image"),
        ({"notes.txt": b"x"}, "holds no image"),
        (in_folders("1.png", "2.png"), "in no class folder and has no label beside it"),
        (in_folders("cat/1.png", "2.png"), "2.png is in no class folder"),
        (in_folders("cat/1.png"), "1 class: give images of at least 2"),
        (in_folders("train/a/1.png", "train/b/1.png", "bird/1.png"), "train/ with folders in it and also bird"),
        (samples([0, 1]) | in_folders("000009.png"), "000009.png has no label beside it: add 000009.cls"),
        (samples([0, 1]) | {"000000.jpg": b"x"}, "sample 000000 has two images"),
        (samples([0, -1]), "one is -1: leave out images without a label"),
        (samples([0, " "]), "one is empty"),
        (samples([0, ""], suffix="json"), "one is empty"),
        (samples([0, 1.5], suffix="json"), "a number or a name, not 1.5"),
        (samples([0, True], suffix="json"), "a number or a name, not True"),
        (samples([0, 1]) | {"000001.cls": b"\xff\xfe"}, "no label that can be read"),
        (samples([0, 1]) | {"000001.json": b"[" * 100_000}, "no label that can be read"),
    ],
)
def test_a_tar_that_is_not_laid_out_so_is_refused(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        opened(write_tar(tmp_path / "x.tar", members))
    assert "\n" not in str(caught.value)


def test_shards_whose_parts_cannot_be_told_are_refused(tmp_path: Path) -> None:
    for name in ("train-0.tar", "more.tar"):
        write_tar(tmp_path / name, samples([0, 1]))
    with pytest.raises(InputError, match=r"more\.tar does not say of which part it is"):
        opened(tmp_path)
    (tmp_path / "more.tar").rename(tmp_path / "test-of-train.tar")
    with pytest.raises(InputError, match="its name says test and train"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        ("a.tar", ["a.tar"]),
        ("{0..2}", ["0", "1", "2"]),
        ("{08..11}", ["08", "09", "10", "11"]),
        ("{8..011}", ["008", "009", "010", "011"]),
        ("{9..11}", ["9", "10", "11"]),
        ("{a,}{0..1}x", ["a0x", "a1x", "0x", "1x"]),
    ],
)
def test_braces_are_written_out_as_by_the_shell(pattern: str, meant: list[str]) -> None:
    assert shards_module.expanded(pattern) == meant


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("x-{0..2}.tar", r"no file .*x-2\.tar, which .*x-\{0\.\.2\}\.tar means"),
        ("x-{2..0}.tar", "counts up"),
        ("x-{0..99999999}.tar", "at most 100000 files"),
        ("x-{0..9999}{0..9999}{0..9999}.tar", "means 1000000000000 files"),
        ("x-{}.tar", "braces hold a range"),
        ("x-{0..1}.{tar,zip}", "not .tar, .zip"),
        ("x-0.tar.gz", "is compressed"),
    ],
)
def test_patterns_that_mean_nothing_are_refused(tmp_path: Path, pattern: str, message: str) -> None:
    for name in ("x-0.tar", "x-1.tar", "x-0.zip", "x-1.zip", "x-0.tar.gz"):
        write_tar(tmp_path / name, samples([0, 1]))
    with pytest.raises(InputError, match=message):
        opened(f"{tmp_path}/{pattern}")


def test_class_folders_win_over_a_tar_beside_them(tmp_path: Path) -> None:
    write_tar(tmp_path / "old.tar", samples([0, 1, 2]))
    for name in ("a/1.png", "b/1.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(encoded(1))
    assert opened(tmp_path).classes == ("a", "b")


# --- reading at a place ---


def test_a_source_is_shared_by_threads_and_travels_between_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "MOST_OPEN", 2)
    for shard in range(5):
        write_tar(tmp_path / f"{shard}.tar", samples([0, 1] * 5, 10 * shard))
    source = opened(tmp_path)
    expected = [Image.open(io.BytesIO(encoded(i))).tobytes() for i in range(50)]
    picks = np.random.default_rng(0).integers(0, 50, 400).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: source.image(i).tobytes(), picks)) == [expected[i] for i in picks]
    copy = pickle.loads(pickle.dumps(source))
    assert [copy.image(i).tobytes() for i in range(50)] == expected
    assert copy.fingerprint == source.fingerprint


def test_handles_are_closed_with_the_source(tmp_path: Path) -> None:
    fds = Path("/proc/self/fd")
    if not fds.is_dir():
        pytest.skip("no list of open files on this system")
    write_tar(tmp_path / "x.tar", samples([0, 1]))

    def held() -> int:
        return sum(os.path.realpath(name) == str(tmp_path.resolve() / "x.tar") for name in fds.iterdir())

    source = opened(tmp_path / "x.tar")
    source.image(0)
    assert held() == 1
    del source
    assert held() == 0


def test_workers_that_inherit_open_tars_change_no_bit(tmp_path: Path) -> None:
    source = opened(write_tar(tmp_path / "x.tar", samples([0, 1] * 10)))
    source.image(0)  # the handle is open when workers are made

    def batches(workers: int) -> list[bytes]:
        made = TrainingBatches(
            source, np.arange(20), batch_size=4, resolution=4, augment=Augment(min_area=0.5), seed=0, workers=workers
        )
        return [batch.images.numpy().tobytes() for batch in made.batches(0, 12)]

    assert batches(0) == batches(2)


def test_the_fingerprint_follows_names_labels_and_sizes(tmp_path: Path) -> None:
    changed: list[dict[str, bytes]] = [
        samples([0, 1]),
        samples([1, 0]),
        samples([0, 1], first=1),
        samples([0, 1]) | {"000000.png": encoded(0, size=(7, 7))},
    ]
    assert len({opened(write_tar(tmp_path / "x.tar", members)).fingerprint for members in changed}) == 4


def test_a_tar_that_became_shorter_is_told(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", samples([0, 1]))
    source = opened(path)
    with path.open("r+b") as file:
        file.truncate(600)
    with pytest.raises(InputError, match="became shorter"):
        source.image(1)


# --- damage and malice ---


def test_images_that_cannot_be_read_are_named_with_tar_and_member(tmp_path: Path) -> None:
    members = samples([0, 1] * 3) | {
        "000002.png": b"",
        "000003.png": b"a shopping list",
        "000004.png": encoded(4, size=(60, 60))[:-900],
    }
    source = opened(write_tar(tmp_path / "x.tar", members))
    found = {flaw.identity: flaw.reason for flaw in flaws(source)}
    assert list(found) == ["000002.png", "000003.png", "000004.png"]
    assert found["000002.png"] == "is empty"
    assert found["000003.png"].startswith("is not an image")
    assert "truncated" in found["000004.png"]
    with pytest.raises(InputError, match=r"x\.tar: 000002\.png: is empty: repair the file"):
        source.image(2)


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize("name", ["../out/1.png", "a/../../1.png", "/etc/1.png", "a\\..\\1.png", "..", "../notes.txt"])
def test_names_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="leads out of it"):
        opened(write_tar(tmp_path / "x.tar", in_folders("cat/1.png", "dog/1.png", name)))
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
@pytest.mark.parametrize("target", ["/etc/passwd", "1.png", "../../etc/passwd"])
def test_links_in_place_of_images_are_refused_and_never_followed(tmp_path: Path, kind: bytes, target: str) -> None:
    members = in_folders("cat/1.png", "dog/1.png")
    with pytest.raises(InputError, match="as a link, which is not followed"):
        opened(write_tar(tmp_path / "x.tar", members | {"l": link("dog/2.png", target, kind)}))
    assert len(opened(write_tar(tmp_path / "y.tar", members | {"l": link("dog/readme", target, kind)}))) == 2


@pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_devices_pipes_and_folders_are_passed_over(tmp_path: Path, kind: bytes) -> None:
    members = in_folders("cat/1.png", "dog/1.png") | {"d": link("dog/2.png", "", kind)}
    assert identities(opened(write_tar(tmp_path / "x.tar", members))) == ["cat/1.png", "dog/1.png"]


def test_the_same_name_twice_is_refused(tmp_path: Path) -> None:
    first, second = tarfile.TarInfo("dog/1.png"), tarfile.TarInfo("dog/1.png")
    with pytest.raises(InputError, match=r"holds dog/1\.png twice"):
        opened(write_tar(tmp_path / "x.tar", {"cat/1.png": encoded(0), "a": first, "b": second}))


@pytest.mark.parametrize("size", [2**20, 2**40, 2**62])
def test_a_size_that_the_file_does_not_have_is_refused(tmp_path: Path, size: int) -> None:
    path = write_tar(tmp_path / "x.tar", in_folders("cat/1.png", "dog/1.png"))
    info = tarfile.TarInfo("dog/2.png")
    info.size = size
    content = path.read_bytes().rstrip(b"\0")
    content += bytes(-len(content) % 512)
    path.write_bytes(content + info.tobuf(tarfile.GNU_FORMAT) + bytes(10240))
    with pytest.raises(InputError, match=r"dog/2\.png ends behind its end"):
        opened(path)


def test_a_negative_size_does_not_go_round_for_ever(tmp_path: Path) -> None:
    content = write_tar(tmp_path / "x.tar", in_folders("cat/1.png", "dog/1.png")).read_bytes()
    for size in (-512, -1024, -(2**40)):
        header = bytearray(content[:512])
        header[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        (tmp_path / "y.tar").write_bytes(content[:1024] + bytes(header) + content[1024:])
        with pytest.raises(InputError, match="is not a whole, uncompressed tar"):
            opened(tmp_path / "y.tar")


def test_an_image_larger_than_any_image_is_not_read_into_memory(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", in_folders("cat/1.png", "dog/1.png"))
    info = tarfile.TarInfo("dog/2.png")
    info.size = 2**30
    content = path.read_bytes().rstrip(b"\0")
    content += bytes(-len(content) % 512)
    with path.open("wb") as file:
        file.write(content + info.tobuf())
        file.truncate(len(content) + 512 + info.size + 1024)  # a hole on the disk
    assert [flaw.reason for flaw in flaws(opened(path))] == [f"has {2**30} bytes, more than {2**28}"]


def test_files_with_holes_are_refused(tmp_path: Path) -> None:
    sparse = link("dog/2.png", "", tarfile.GNUTYPE_SPARSE)
    with pytest.raises(InputError, match="with holes"):
        opened(write_tar(tmp_path / "x.tar", in_folders("cat/1.png", "dog/1.png") | {"s": sparse}, format=tarfile.GNU_FORMAT))


@pytest.mark.parametrize("format_", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_that_is_cut_anywhere_is_refused(tmp_path: Path, format_: int) -> None:
    long = "long" * 15
    path = write_tar(tmp_path / "x.tar", in_folders(f"cat/{long}/1.png", f"dög/{long}/1.png"), format=format_)
    assert len(opened(path)) == 2
    content = path.read_bytes()
    end = len(content.rstrip(b"\0"))
    for cut in (0, 1, 100, 511, 512, 600, *range(1024, end, 512), end - 1, end):
        path.write_bytes(content[:cut])
        with pytest.raises(InputError, match="is not a whole, uncompressed tar"):
            opened(path)


def test_damaged_headers_two_tars_in_one_and_other_files_are_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", in_folders("cat/1.png", "dog/1.png", "dog/2.png"))
    content = path.read_bytes()
    second = content.index(b"dog/1.png")
    wrong: list[bytes] = [
        content[:second] + b"D" + content[second + 1 :],
        content + content,
        encoded(0) * 20,
        b"text",
        bytes(100),
    ]
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo("cat/1.png"))
    for bad in (*wrong, packed.getvalue()):
        path.write_bytes(bad)
        with pytest.raises(InputError, match="is not a whole, uncompressed tar"):
            opened(path)


def test_no_damage_makes_anything_but_one_line_or_a_source(tmp_path: Path) -> None:
    members = samples(["a", "b"]) | in_folders("long" * 30 + "/1.x.png") | {"long" * 30 + "/1.cls": b"a"}
    content = write_tar(tmp_path / "x.tar", members).read_bytes()
    outcomes: list[Callable[[], object] | str] = []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        damaged = bytearray(content)
        for place in rng.integers(0, len(content), rng.integers(1, 5)):
            damaged[place - place % 512 + int(rng.integers(0, 345))] = int(rng.integers(256))
        (tmp_path / "x.tar").write_bytes(damaged)
        try:
            source = opened(tmp_path / "x.tar")
            outcomes.append(source.fingerprint + str(len(flaws(source))))
        except InputError as error:
            assert "\n" not in str(error)
            outcomes.append("refused")
    assert 50 < outcomes.count("refused") < 300
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]
