"""Images in Parquet files and in folders that Hugging Face's `datasets` saved to disk: an image and a label column.

Read by pyarrow, an optional package, as plain columns: no code is looked up by name, and the path in a row is never opened.
Parquet is held in memory, still encoded, for it cannot be read at a place; what was saved to disk is mapped into memory.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from supernet.data.labels import PARTS, classes_of, every_class_occurs, parts_of_files
from supernet.data.shards import relative_names
from supernet.data.source import MOST_BYTES, Encoded
from supernet.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

INSTALL = "pip install 'nestling[data]'"
IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img"), ("label", "labels")
STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
"""The last bytes of a whole Arrow stream (Arrow columnar format, "IPC Streaming Format")."""


class TableSource(Encoded):
    """Images in the rows of Parquet or Arrow files, of which `parts` says the part, or "" for all.

    The image column holds bytes, or a struct with `bytes`; it is called image or img, or is the one that `datasets` calls an image.
    The label column is called label or labels, or is the only one of class labels; it holds numbers or names.
    """

    def __init__(self, name: str, paths: Sequence[Path], parts: Sequence[str]) -> None:
        self.paths = list(paths)
        self._column, label_column, names = _columns(name, *_described(self.paths[0]))
        tables = [_table(path, (self._column, label_column)) for path in _affordable(name, self.paths)]
        self._keep([table.column(self._column) for table in tables])
        rows = [len(table) for table in tables]
        if not sum(rows):
            raise InputError(f"{name} has no rows: is it the right file?")
        self._files = relative_names(paths)
        self._file_starts = np.cumsum([0, *rows], dtype=np.int64)
        raw = [label for path, table in zip(paths, tables, strict=True) for label in _labels(path, table.column(label_column))]
        classes, labels = _named(name, raw, names) if names else classes_of(raw, name)
        sizes = np.concatenate([_lengths(chunk) for chunk in self._chunks])
        super().__init__(
            name, classes, labels, [part for part, count in zip(parts, rows, strict=True) for _ in range(count)], sizes
        )

    def identity(self, i: int) -> str:
        """Give the file's name and the row in it."""
        file = int(np.searchsorted(self._file_starts, i, "right")) - 1
        return f"{self._files[file]}/{i - self._file_starts[file]:06d}"

    def file(self, i: int) -> None:
        """None: it lies in a table."""

    def place(self, i: int) -> str:
        """Give the file's path and the row in it."""
        file = int(np.searchsorted(self._file_starts, i, "right")) - 1
        return f"{self.paths[file]} row {i - self._file_starts[file]}"

    def _open(self, i: int) -> BinaryIO:
        size = int(self.sizes[i])
        if not 0 < size <= MOST_BYTES:
            raise ValueError(
                "holds no bytes (a path is not followed)" if size == 0 else f"has {size} bytes, more than {MOST_BYTES}"
            )
        chunk = int(np.searchsorted(self._starts, i, "right")) - 1
        return io.BytesIO(self._chunks[chunk][i - int(self._starts[chunk])].as_buffer())

    def _keep(self, columns: Sequence[pa.ChunkedArray]) -> None:
        """Hold the encoded images of all files, as arrays of bytes one behind the other."""
        self._chunks = [_bytes_of(chunk) for column in columns for chunk in column.chunks]
        self._starts = np.cumsum([0, *(len(chunk) for chunk in self._chunks)], dtype=np.int64)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_chunks", "_starts")}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._keep([_table(path, (self._column,)).column(self._column) for path in self.paths])


def parquet_source(name: str, paths: Sequence[Path]) -> TableSource:
    """Open Parquet files; their names tell the parts ("train-00000-of-00002.parquet"). Raises InputError."""
    _arrow()
    return TableSource(name, paths, parts_of_files(relative_names(paths)))


def is_saved(folder: Path) -> bool:
    """Whether `datasets` saved this folder (`save_to_disk`)."""
    return (folder / "dataset_dict.json").is_file() or all(
        (folder / name).is_file() for name in ("state.json", "dataset_info.json")
    )


def saved_source(folder: Path) -> TableSource:
    """Open what `save_to_disk` wrote: a `Dataset`, or a `DatasetDict` with a train part. Raises InputError."""
    _arrow()
    if not (folder / "dataset_dict.json").is_file():
        paths = _saved_files(folder)
        return TableSource(str(folder), paths, [""] * len(paths))
    splits = _json(folder / "dataset_dict.json").get("splits")
    if not isinstance(splits, list) or not all(isinstance(split, str) and split.lower() in PARTS for split in splits):
        raise InputError(
            f"{folder}: the parts of a DatasetDict are called train, val or validation, and test, not {splits}: rename them"
        )
    order = sorted(splits, key=lambda split: ("train", "val", "test").index(PARTS[split.lower()]))
    files = [(PARTS[split.lower()], path) for split in order for path in _saved_files(folder / split)]
    parts = [part for part, _ in files] if len(splits) > 1 else [""] * len(files)
    return TableSource(str(folder), [path for _, path in files], parts)


def _arrow() -> Any:
    try:
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"Parquet and Arrow files are read by pyarrow, which is not installed: {INSTALL}") from error
    return pyarrow


def _saved_files(folder: Path) -> list[Path]:
    """The data files that `state.json` lists. A name is refused that would lead out of the folder."""
    listed = _json(folder / "state.json").get("_data_files")
    names = (
        [file.get("filename") if isinstance(file, dict) else None for file in listed] if isinstance(listed, list) else [None]
    )
    if not names or not all(isinstance(name, str) and Path(name).name == name and name.endswith(".arrow") for name in names):
        raise InputError(
            f"{folder / 'state.json'} lists no data files of this folder: save the data set again with save_to_disk"
        )
    return [folder / str(name) for name in names]


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error}): save the data set again with save_to_disk") from error
    return value if isinstance(value, dict) else {}


def _described(path: Path) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """The columns of a file, and what `datasets` wrote about them (nothing where another program wrote the file)."""
    arrow = _arrow()
    try:
        if path.suffix == ".arrow":
            with arrow.memory_map(str(path)) as file:
                schema = arrow.ipc.open_stream(file).schema
        else:
            schema = arrow.parquet.read_schema(path)
        columns, metadata = list(schema.names), schema.metadata or {}
    except Exception as error:
        raise _damaged(path, error) from error
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return columns, {key: kind for key, kind in features.items() if isinstance(kind, dict) and key in columns}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return columns, {}


def _columns(name: str, columns: Sequence[str], features: Mapping[str, Mapping[str, Any]]) -> tuple[str, str, list[str] | None]:
    """Choose the image and the label column; with the classes' names, where they are told."""
    told = {kind: [key for key, value in features.items() if value.get("_type") == kind] for kind in ("Image", "ClassLabel")}
    image = _chosen(name, "image", columns, IMAGE_COLUMNS, told["Image"])
    label = _chosen(name, "label", columns, LABEL_COLUMNS, told["ClassLabel"])
    names = features.get(label, {}).get("names")
    if names is not None and not (isinstance(names, list) and all(isinstance(each, str) for each in names)):
        raise InputError(f"{name}: the names of the classes in its metadata are damaged: save it again")
    if names and len(set(names)) < len(names):
        raise InputError(f"{name}: two classes in its metadata have the same name: rename one")
    return image, label, names or None


def _chosen(name: str, what: str, columns: Sequence[str], usual: Sequence[str], told: Sequence[str]) -> str:
    found = [column for column in usual if column in columns] or list(told)
    if len(found) != 1 or list(columns).count(found[0]) != 1:
        raise InputError(
            f"{name} has the columns {', '.join(columns)}, and needs one {what} column: call it {usual[0]}, and no other"
        )
    return found[0]


def _affordable(name: str, paths: Sequence[Path]) -> Sequence[Path]:
    """Refuse Parquet that would not fit in half of the memory; what is mapped takes none."""
    arrow, total = _arrow(), 0
    for path in paths:
        if path.suffix != ".arrow":
            try:
                metadata = arrow.parquet.read_metadata(path)
                total += sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
            except Exception as error:
                raise _damaged(path, error) from error
    if total > _memory() // 2:
        raise InputError(
            f"{name} holds {total / 2**30:.1f} GiB of images, and Parquet is held in memory, of which this machine has "
            f"{_memory() / 2**30:.1f} GiB: turn it into a folder that is read from disk, with save_to_disk of the package datasets"
        )
    return paths


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**33


def _table(path: Path, columns: Sequence[str]) -> pa.Table:
    """Read columns of a file, checked: no offset in it leads out of its buffers. Raises InputError."""
    arrow = _arrow()
    try:
        if path.suffix == ".arrow":
            _check_end(path)
            table = arrow.ipc.open_stream(arrow.memory_map(str(path))).read_all()
        else:
            table = arrow.parquet.ParquetFile(path, page_checksum_verification=True).read(
                columns=list(columns), use_threads=False
            )
        table = table.select(list(columns))
        table.validate(full=True)
    except Exception as error:  # of what is damaged, Arrow makes ArrowInvalid, OSError, KeyError, NotImplementedError and more
        raise _damaged(path, error) from error
    return table


def _check_end(path: Path) -> None:
    with path.open("rb") as file:
        file.seek(-min(len(STREAM_END), path.stat().st_size), os.SEEK_END)
        if file.read() != STREAM_END:
            raise ValueError("it has no end mark: it is cut short")


def _damaged(path: Path, error: Exception) -> InputError:
    kind = "Arrow" if path.suffix == ".arrow" else "Parquet"
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return InputError(f"{path} is no whole {kind} file with the columns of the first ({reason}): write it again")


def _bytes_of(chunk: pa.Array) -> pa.Array:
    """The encoded images of a column: itself, or the `bytes` of a struct."""
    arrow = _arrow()
    kind = chunk.type
    if arrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        chunk = arrow.compute.struct_field(chunk, "bytes")
        kind = chunk.type
    if arrow.types.is_null(kind):  # only paths
        return chunk.cast(arrow.binary())
    if not (arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind)):
        raise InputError(
            f"an image column holds encoded images as bytes, or a struct with bytes, not {kind}: save the files' bytes"
        )
    return chunk


def _lengths(chunk: pa.Array) -> NDArray[np.int64]:
    """Bytes of every image, 0 where there are none."""
    lengths = _arrow().compute.fill_null(_arrow().compute.binary_length(chunk), 0)
    return np.asarray(lengths.to_numpy(zero_copy_only=False), np.int64)


def _labels(path: Path, column: pa.ChunkedArray) -> list[int | str]:
    values: list[int | str] = column.to_pylist()
    for row, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise InputError(
                f"{path} row {row}: a label is a whole number or a name, not {str(value)[:100]}: correct or remove the row"
            )
    return values


def _named(name: str, raw: Sequence[int | str], names: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
    """Labels are numbers of the names."""
    for label in set(raw):
        if not isinstance(label, int) or not 0 <= label < len(names):
            raise InputError(
                f"{name}: its metadata name {len(names)} classes, but a label is {label!r}: leave out rows without a label"
            )
    labels = np.array(raw, np.int64)
    every_class_occurs(name, names, labels)
    return list(names), labels
