"""A bundle as one .zip file: packed for sending, and unpacked with distrust."""

from __future__ import annotations

import stat
import zipfile
from pathlib import Path

from supernet import durable
from supernet.errors import InputError

MOST_FILES, MOST_BYTES = 100, 4 << 30
EPOCH = (1980, 1, 1, 0, 0, 0)
"""Date of all that is packed: one bundle, one archive."""


def pack(folder: Path, out: Path) -> None:
    """Write the files of a bundle into one archive, replaced at once or not at all. The same bundle gives the same bytes."""
    draft = out.with_name(f".{out.name}.draft")
    try:
        with durable.writing(out), zipfile.ZipFile(draft, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(folder.iterdir()):
                archive.writestr(zipfile.ZipInfo(path.name, EPOCH), path.read_bytes(), zipfile.ZIP_DEFLATED)
        draft.replace(out)
    finally:
        draft.unlink(missing_ok=True)


def unpack(path: Path, into: Path) -> None:
    """Unpack an archive of plain files into an empty folder. Raises `InputError` for anything else that it holds."""
    try:
        with zipfile.ZipFile(path) as archive:
            listed = archive.infolist()
            _refuse(path, listed)
            left = MOST_BYTES
            for each in listed:
                with archive.open(each) as source, (into / each.filename).open("xb") as target:
                    while data := source.read(1 << 20):
                        left -= len(data)  # what the archive says of sizes may be a lie
                        if left < 0:
                            raise InputError(f"{path} unpacks to more than {MOST_BYTES >> 30} GiB: it is no bundle")
                        target.write(data)
    except (InputError, OSError):
        raise
    except Exception as error:  # what zipfile, zlib and others raise of damaged data shares no base class
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path} cannot be unpacked ({reason}): copy it again, or export the child again") from error


def _refuse(path: Path, listed: list[zipfile.ZipInfo]) -> None:
    names = [each.filename for each in listed]
    if len(names) > MOST_FILES or len(set(names)) < len(names):
        raise InputError(f"{path} holds {len(names)} files, some twice or too many: it is no bundle")
    if sum(each.file_size for each in listed) > MOST_BYTES:
        raise InputError(f"{path} unpacks to more than {MOST_BYTES >> 30} GiB: it is no bundle")
    for each in listed:
        name, mode = each.filename, each.external_attr >> 16
        plain = (
            Path(name).name == name
            and name not in {"", ".", ".."}
            and "\\" not in name
            and name.isprintable()
            and len(name) <= 100
        )
        if not plain or each.is_dir() or stat.S_IFMT(mode) not in (0, stat.S_IFREG):
            raise InputError(f"{path} holds {name[:60]!r}, which is no plain file of a bundle: do not use it")
        if each.flag_bits & 1:
            raise InputError(f"{path} is encrypted: unpack it by hand")
