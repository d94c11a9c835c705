"""Opening images by name: folders, .npz files, tar shards, Parquet, what `datasets` saved, and known sets."""

from __future__ import annotations

import difflib
from pathlib import Path

from supernet.data import known
from supernet.data.arrays import ArraySource, digits, read_npz
from supernet.data.folder import FolderSource
from supernet.data.parquet import is_saved, parquet_source, saved_source
from supernet.data.shards import files_of, shards_in
from supernet.data.source import Encoded, Flaw, Source, Unreadable, evenly, flaws, over_images
from supernet.data.tar import TarSource
from supernet.errors import InputError

__all__ = [
    "ArraySource", "Encoded", "Flaw", "FolderSource", "Source", "Unreadable", "evenly", "flaws", "open_source", "over_images",
]  # fmt: skip

COMPRESSED = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")


def open_source(text: str, *, root: Path | None = None, download: bool = False) -> Source:
    """Open a source by its name.

    `digits`, `fashion-mnist`, `mnist`, `cifar10`, `cifar100` or `torchvision:NAME`; a folder of class folders, of .tar or of .parquet
    files, or one that `datasets` saved to disk; one .npz, .tar or .parquet file; or several by a pattern in braces.

    A name wins over a folder that is called the same (write `./digits` for the folder). `root` is the folder of
    torchvision's files; nothing is downloaded unless `download`. Raises InputError, also for anything wrong in the data.
    """
    if text == "digits":
        return digits()
    if known.is_known(text):
        return known.known_source(text, root, download)
    try:
        path = Path(text).expanduser().resolve()
        if text and path.is_dir():
            return _folder(path)
        if path.is_file():
            return _file(path)
        if "{" in text:
            return _pattern(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: a link that leads to itself, a home that is not known
        named = getattr(error, "filename", None) or text
        raise InputError(f"{named} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    raise InputError(_unknown(text, path))


def _folder(path: Path) -> Source:
    if is_saved(path):
        return saved_source(path)
    tars, tables = shards_in(path, ".tar"), shards_in(path, ".parquet")
    if tars and tables:
        raise InputError(f"{path} holds .tar and .parquet files: move one kind away, or name the files by a pattern")
    if tars:
        return TarSource(str(path), tars)
    return parquet_source(str(path), tables) if tables else FolderSource(path)


def _file(path: Path) -> Source:
    name = path.name.lower()
    if name.endswith(".npz"):
        return read_npz(path)
    if name.endswith(".tar"):
        return TarSource(str(path), [path])
    if name.endswith(".parquet"):
        return parquet_source(str(path), [path])
    if name.endswith(COMPRESSED):
        raise InputError(f"{path} is compressed, so it cannot be read at a place: unpack it to a .tar or a folder")
    raise InputError(_unknown(str(path), path))


def _pattern(path: Path) -> Source:
    files = files_of(str(path))
    kinds = {file.suffix.lower() for file in files}
    if kinds == {".tar"}:
        return TarSource(str(path), files)
    if kinds == {".parquet"}:
        return parquet_source(str(path), files)
    raise InputError(f"a pattern means .tar files or .parquet files, not {', '.join(sorted(kinds))}")


def _unknown(text: str, path: Path) -> str:
    names = ["digits", *known.SHORT]
    possible = f"give one of {', '.join(names)}, torchvision:NAME, a folder of class folders, or an .npz, .tar or .parquet file"
    if path.exists() and text:
        return f"{path} is neither a folder nor an .npz, .tar or .parquet file: {possible}"
    if "/" in text or Path(text).suffix in (".npz", ".tar", ".parquet"):
        return f"there is no folder or file {path}: {possible}"
    near = difflib.get_close_matches(text.lower(), names, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"there is no data called {text!r}{hint}: {possible}"
