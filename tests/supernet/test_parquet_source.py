"""Images in Parquet files and in folders that Hugging Face's `datasets` saved."""

from __future__ import annotations

import io
import json
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from supernet.data import parquet
from supernet.data.augment import Augment
from supernet.data.batches import TrainingBatches
from supernet.data.sources import Source, flaws, open_source
from supernet.errors import InputError

pa = pytest.importorskip("pyarrow", reason="pip install 'nestling[data]'")
pq = pytest.importorskip("pyarrow.parquet")

NAMES = ["cat", "dog"]


def encoded(shade: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(shade).integers(0, 256, (5, 6, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def features(names: object = None) -> dict[bytes, bytes]:
    """The metadata that `datasets` writes."""
    kinds = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names or NAMES}}
    return {b"huggingface": json.dumps({"info": {"features": kinds}}).encode()}


def rows(labels: Sequence[object], first: int = 0, *, struct: bool = True, metadata: dict[bytes, bytes] | None = None) -> Any:
    content = [encoded(first + i) for i in range(len(labels))]
    image = pa.array([{"bytes": each, "path": f"{i}.png"} for i, each in enumerate(content)]) if struct else pa.array(content)
    return pa.table({"image": image, "label": pa.array(labels), "caption": ["x"] * len(labels)}).replace_schema_metadata(
        metadata
    )


def write(path: Path, table: Any, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)
    return path


def save_to_disk(folder: Path, table: Any, files: int = 1) -> Path:
    """As `datasets.Dataset.save_to_disk` does."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{files:05d}.arrow" for i in range(files)]
    share = -(-len(table) // files)
    for i, name in enumerate(names):
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table.slice(i * share, share), max_chunksize=3)
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    return folder


def opened(path: Path | str) -> Source:
    return open_source(str(path))


def shows(source: Source, shades: Sequence[int]) -> bool:
    return all(
        source.image(i).tobytes() == Image.open(io.BytesIO(encoded(shade))).tobytes() for i, shade in enumerate(shades)
    ) and len(source) == len(shades)


@pytest.mark.parametrize("struct", [True, False])
@pytest.mark.parametrize("binary", ["binary", "large_binary"])
@pytest.mark.parametrize("compression", ["NONE", "SNAPPY", "ZSTD"])
def test_one_file(tmp_path: Path, struct: bool, binary: str, compression: str) -> None:
    table = rows([1, 0, 1, 3], struct=struct)
    if binary == "large_binary" and not struct:
        table = table.set_column(0, "image", table.column("image").cast(pa.large_binary()))
    source = opened(write(tmp_path / "x.parquet", table, row_group_size=3, compression=compression))
    assert (source.classes, source.labels.tolist(), set(source.parts)) == (("0", "1", "3"), [1, 0, 1, 2], {""})
    assert shows(source, range(4))
    assert (source.identity(3), source.file(3), source.image_size, source.channels) == ("x.parquet/000003", None, 5, 3)


@pytest.mark.parametrize(
    ("labels", "metadata", "classes", "numbers"),
    [
        ([1, 0, 1], features(), ("cat", "dog"), [1, 0, 1]),
        ([1, 0, 1], features(["z", "a"]), ("z", "a"), [1, 0, 1]),
        (["dog", "cat", "dog"], None, ("cat", "dog"), [1, 0, 1]),
        (["10", "9", "10"], {b"huggingface": b"{damaged"}, ("9", "10"), [1, 0, 1]),
    ],
)
def test_labels_are_numbers_or_names(
    tmp_path: Path, labels: list[object], metadata: dict[bytes, bytes] | None, classes: tuple[str, ...], numbers: list[int]
) -> None:
    source = opened(write(tmp_path / "x.parquet", rows(labels, metadata=metadata)))
    assert (source.classes, source.labels.tolist()) == (classes, numbers)
    coded = rows(labels, metadata=metadata)
    if isinstance(labels[0], str):
        coded = coded.set_column(1, "label", coded.column("label").dictionary_encode())
        assert opened(write(tmp_path / "y.parquet", coded)).labels.tolist() == numbers


def test_files_of_a_folder_tell_their_parts(tmp_path: Path) -> None:
    for part, first in (("test", 0), ("train", 4), ("validation", 8)):
        for i in range(2):
            write(
                tmp_path / "hub" / "data" / f"{part}-{i:05d}-of-00002.parquet", rows([0, 1], first + 2 * i, metadata=features())
            )
            write(tmp_path / "flat" / f"{part}-{i:05d}-of-00002.parquet", rows([0, 1], first + 2 * i, metadata=features()))
            write(tmp_path / "sub" / part / f"{i}.parquet", rows([0, 1], first + 2 * i, metadata=features()))
    (tmp_path / "hub" / "README.md").write_text("a card")
    for name in ("hub", "flat", "sub"):
        source = opened(tmp_path / name)
        assert source.parts == ("test",) * 4 + ("train",) * 4 + ("val",) * 4
        assert shows(source, range(12))
        assert opened(source.name).fingerprint == source.fingerprint
    pattern = opened(f"{tmp_path}/flat/{{train,test}}-{{00000..00001}}-of-00002.parquet")
    assert (len(pattern), pattern.identity(3)) == (8, "train-00001-of-00002.parquet/000001")
    assert opened(pattern.name).fingerprint == pattern.fingerprint


@pytest.mark.parametrize("files", [1, 3])
def test_what_was_saved_to_disk(tmp_path: Path, files: int) -> None:
    source = opened(save_to_disk(tmp_path / "one", rows([0, 1] * 4, metadata=features()), files))
    assert (source.classes, source.labels.tolist(), set(source.parts)) == (("cat", "dog"), [0, 1] * 4, {""})
    assert shows(source, range(8))
    for i, part in enumerate(("test", "train")):
        save_to_disk(tmp_path / "several" / part, rows([0, 1] * 4, 8 * i, metadata=features()), files)
    (tmp_path / "several" / "dataset_dict.json").write_text('{"splits": ["test", "train"]}')
    source = opened(tmp_path / "several")
    assert source.parts == ("train",) * 8 + ("test",) * 8
    assert shows(source, [*range(8, 16), *range(8)])


@pytest.mark.parametrize("saved", [True, False])
def test_a_source_travels_to_another_process_and_workers_change_no_bit(tmp_path: Path, saved: bool) -> None:
    table = rows([0, 1] * 30, metadata=features())
    source = opened(
        save_to_disk(tmp_path / "x", table, 2) if saved else write(tmp_path / "x.parquet", table, row_group_size=16)
    )
    sent = pickle.dumps(source)
    assert len(sent) < 5000 < sum(source.sizes)  # type: ignore[attr-defined]  # the images are not sent along
    assert shows(pickle.loads(sent), range(60))

    def batches(workers: int) -> list[bytes]:
        made = TrainingBatches(
            source, np.arange(20), batch_size=4, resolution=4, augment=Augment(flip=0.5), seed=0, workers=workers
        )
        return [batch.images.numpy().tobytes() for batch in made.batches(0, 12)]

    assert batches(0) == batches(2)


def test_images_without_bytes_are_unreadable_and_paths_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(encoded(9))
    content = [{"bytes": encoded(0), "path": None}, {"bytes": None, "path": str(tmp_path / "secret.png")}, None]
    content += [
        {"bytes": b"", "path": None},
        {"bytes": b"a shopping list", "path": None},
        {"bytes": encoded(5)[:-60], "path": None},
    ]
    source = opened(write(tmp_path / "x.parquet", pa.table({"image": content, "label": [0, 1, 0, 1, 0, 1]})))
    found = {flaw.image: flaw.reason for flaw in flaws(source)}
    assert list(found) == [1, 2, 3, 4, 5]
    assert all(found[i].startswith("holds no bytes") for i in (1, 2, 3))
    with pytest.raises(InputError, match=r"x\.parquet row 4: is not an image"):
        source.image(4)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"label": [0, 1]}, "columns label, and needs one image column"),
        ({"image": [b"x", b"y"], "klass": [0, 1]}, "columns image, klass, and needs one label column: call it label"),
        ({"image": [b"x", b"y"], "img": [b"x", b"y"], "label": [0, 1]}, "needs one image column"),
        ({"image": ["1.png", "2.png"], "label": [0, 1]}, "encoded images as bytes, or a struct with bytes, not string"),
        ({"image": [[1, 2], [3, 4]], "label": [0, 1]}, "not list"),
        ({"image": [{"path": "x"}, {"path": "y"}], "label": [0, 1]}, "not struct"),
        ({"image": [encoded(0), encoded(1)], "label": [0, None]}, r"row 1: a label is a whole number or a name, not None"),
        ({"image": [encoded(0), encoded(1)], "label": [0.0, 1.0]}, "not 0.0"),
        ({"image": [encoded(0), encoded(1)], "label": [True, False]}, "not True"),
        ({"image": [encoded(0), encoded(1)], "label": [0, -1]}, "one is -1"),
        ({"image": [encoded(0), encoded(1)], "label": [0, 0]}, "1 class"),
        ({"image": [b"x", b"y"], "label": [0, 1]}, "no image in .* can be read"),
    ],
)
def test_a_table_that_is_not_laid_out_so_is_refused(tmp_path: Path, table: dict[str, list[object]], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        opened(write(tmp_path / "x.parquet", pa.table(table)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        ([0, 2], NAMES, "metadata name 2 classes, but a label is 2"),
        ([0, -1], NAMES, "a label is -1"),
        (["cat", "dog"], NAMES, "a label is '"),
        ([0, 1], ["a", "b", "c"], "no image of class 'c'"),
        ([0, 1], ["a", "a"], "the same name"),
        ([0, 1], ["a", 5], "names of the classes in its metadata are damaged"),
        ([], NAMES, "has no rows"),
    ],
)
def test_metadata_that_do_not_fit_the_labels_are_refused(
    tmp_path: Path, labels: list[object], names: list[object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        opened(write(tmp_path / "x.parquet", rows(labels, metadata=features(names), struct=False)))


def test_files_with_other_columns_than_the_first_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", rows([0, 1]))
    write(tmp_path / "b.parquet", rows([0, 1]).rename_columns(["image", "klass", "caption"]))
    with pytest.raises(InputError, match=r"b\.parquet is no whole Parquet file with the columns of the first"):
        opened(tmp_path)


def test_parquet_that_does_not_fit_in_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "_memory", lambda: 1000)
    with pytest.raises(InputError, match=r"held in memory.*save_to_disk"):
        opened(write(tmp_path / "x.parquet", rows([0, 1] * 20)))
    assert len(opened(save_to_disk(tmp_path / "x", rows([0, 1] * 20)))) == 40


def test_a_file_that_is_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", rows([0, 1] * 3))
    saved = save_to_disk(tmp_path / "saved", rows([0, 1] * 3)) / "data-00000-of-00001.arrow"
    for file, name, message in ((path, path, "no whole Parquet"), (saved, saved.parent, "no whole Arrow")):
        content = file.read_bytes()
        for cut in (0, 1, 8, 100, *range(200, len(content) - 9, 97), len(content) - 8, len(content) - 1):
            file.unlink()  # another file, for the one before may be mapped
            file.write_bytes(content[:cut])
            with pytest.raises(InputError, match=message):
                opened(name)


def test_no_damage_makes_anything_but_one_line_or_a_source(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", rows([0, 1] * 3, metadata=features()))
    saved = save_to_disk(tmp_path / "saved", rows([0, 1] * 3, metadata=features())) / "data-00000-of-00001.arrow"
    for file, name in ((path, path), (saved, saved.parent)):
        content, refused = file.read_bytes(), 0
        for seed in range(100):
            rng = np.random.default_rng(seed)
            damaged = bytearray(content)
            for end in rng.integers(1, 1500, 3).tolist():
                damaged[-end if seed % 2 else end] = int(rng.integers(256))
            file.unlink()
            file.write_bytes(damaged)
            try:
                flaws(opened(name))
            except InputError as error:
                assert "\n" not in str(error)
                refused += 1
        assert 10 < refused < 100


def test_offsets_that_lead_out_of_their_buffer_are_refused(tmp_path: Path) -> None:
    saved = save_to_disk(tmp_path / "saved", rows([0, 1], struct=False)) / "data-00000-of-00001.arrow"
    content, ends = saved.read_bytes(), np.cumsum([0, len(encoded(0)), len(encoded(1))]).astype("<i4")
    assert content.count(ends.tobytes()) == 1
    for wrong in ([0, 163, 2**30], [0, 2**30, ends[2]], [0, -5, ends[2]], [ends[2], 163, 0]):
        damaged = content.replace(ends.tobytes(), np.array(wrong, "<i4").tobytes())
        saved.unlink()
        saved.write_bytes(damaged)
        with pytest.raises(InputError, match="no whole Arrow file"):
            opened(saved.parent)


@pytest.mark.parametrize("name", ["../secret.arrow", "/etc/x.arrow", "data.txt", "", None, 5])
def test_a_saved_folder_reads_no_file_outside_of_it(tmp_path: Path, name: object) -> None:
    folder = save_to_disk(tmp_path / "x", rows([0, 1]))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(InputError, match="lists no data files of this folder"):
        opened(folder)


@pytest.mark.parametrize("content", ["{damaged", "[]", "{}", '{"splits": ["train", "../etc"]}', '{"splits": 5}', "[" * 100_000])
def test_a_damaged_dataset_dict_is_refused(tmp_path: Path, content: str) -> None:
    save_to_disk(tmp_path / "train", rows([0, 1]))
    (tmp_path / "dataset_dict.json").write_text(content)
    with pytest.raises(InputError):
        opened(tmp_path)


def test_a_type_that_would_be_unpickled_is_read_as_plain_bytes(tmp_path: Path) -> None:
    mark = tmp_path / "executed"

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return (Path.touch, (mark,))  # type: ignore[return-value]

    kind = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": pickle.dumps(Bomb())}
    fields = [pa.field("image", pa.binary(), metadata=kind), pa.field("label", pa.int64(), metadata=kind)]
    table = pa.table([[encoded(0), encoded(1)], [0, 1]], schema=pa.schema(fields))
    for path in (write(tmp_path / "x.parquet", table), save_to_disk(tmp_path / "x", table)):
        assert shows(opened(path), range(2))
    assert not mark.exists()


def test_without_pyarrow_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, folder = write(tmp_path / "x.parquet", rows([0, 1])), save_to_disk(tmp_path / "x", rows([0, 1]))
    for module in [name for name in sys.modules if name.partition(".")[0] == "pyarrow"]:
        monkeypatch.setitem(sys.modules, module, None)
    for name in (path, folder):
        with pytest.raises(InputError, match=r"not installed: pip install 'nestling\[data\]'") as caught:
            opened(name)
        assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_what_the_package_datasets_writes_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    pictures = [Image.open(io.BytesIO(encoded(i))) for i in range(40)]
    made = datasets.Dataset.from_dict({"image": pictures, "label": [i % 2 for i in range(40)]}, features=kinds)
    made.save_to_disk(tmp_path / "one", num_shards=3)
    datasets.DatasetDict(train=made, test=made.select(range(10))).save_to_disk(tmp_path / "several")
    made.to_parquet(str(tmp_path / "x.parquet"))
    for name in ("one", "several", "x.parquet"):
        source = opened(tmp_path / name)
        assert source.classes == ("cat", "dog")
        assert source.labels[:40].tolist() == [0, 1] * 20
        assert all(source.image(i).tobytes() == pictures[i % 40].tobytes() for i in range(len(source)))
    assert opened(tmp_path / "several").parts == ("train",) * 40 + ("test",) * 10
