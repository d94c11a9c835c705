"""The search's SQLite file: every evaluated child, its result on the confirm split and its measured latencies.

Safe against `kill -9` and against several processes writing at once: a write-ahead log, and every `add` is one transaction.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import operator
import sqlite3
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, TypeVar

from supernet.durable import sync_folder
from supernet.errors import InputError

FORMAT = 1
BUSY_TIMEOUT_MS = 60_000
"""How long a write waits for another process; a transaction here takes milliseconds."""


def now() -> str:
    """Give the time in UTC, ISO 8601, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@dataclass(frozen=True, slots=True)
class Row:
    """A child evaluated on the search split. `score` is larger for better; `scores` are the Task's packed per-sample scores."""

    TABLE: ClassVar[str] = "children"
    KEYS: ClassVar[tuple[str, ...]] = ("key",)

    key: str
    arch: str
    stage: str
    score: float
    scores: bytes
    images: int
    costs: Mapping[str, float]
    seconds: float
    created: str = dataclasses.field(default_factory=now)


@dataclass(frozen=True, slots=True)
class Confirmed:
    """A child's result on the confirm split."""

    TABLE: ClassVar[str] = "confirmed"
    KEYS: ClassVar[tuple[str, ...]] = ("key",)

    key: str
    scores: bytes
    score: float
    images: int


@dataclass(frozen=True, slots=True)
class Measurement:
    """A child's latency measured on a target: the estimate and the interval around it, milliseconds; `detail` is JSON."""

    TABLE: ClassVar[str] = "measurements"
    KEYS: ClassVar[tuple[str, ...]] = ("key", "target")

    key: str
    target: str
    latency_ms: float
    latency_ms_low: float
    latency_ms_high: float
    detail: Mapping[str, Any]
    created: str = dataclasses.field(default_factory=now)


Record = TypeVar("Record", Row, Confirmed, Measurement)

_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE children (
    key TEXT PRIMARY KEY NOT NULL, arch TEXT NOT NULL, stage TEXT NOT NULL, score REAL NOT NULL, scores BLOB NOT NULL,
    images INTEGER NOT NULL, costs TEXT NOT NULL, seconds REAL NOT NULL, created TEXT NOT NULL);
CREATE TABLE confirmed (key TEXT PRIMARY KEY NOT NULL, scores BLOB NOT NULL, score REAL NOT NULL, images INTEGER NOT NULL);
CREATE TABLE measurements (
    key TEXT NOT NULL, target TEXT NOT NULL, latency_ms REAL NOT NULL, latency_ms_low REAL NOT NULL,
    latency_ms_high REAL NOT NULL, detail TEXT NOT NULL, created TEXT NOT NULL, PRIMARY KEY (key, target));
"""


class Store:
    """An open search file. One object belongs to one thread; several processes may each open the file.

    Every method raises `InputError` when SQLite cannot read or write the file (damaged, full disk, locked too long).
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, identity: Mapping[str, str]) -> None:
        self.path = path
        self.identity = dict(identity)
        self._connection = connection

    @classmethod
    def open(cls, path: Path, *, identity: Mapping[str, str]) -> Store:
        """Open the file, made when there is none. `identity` says what the rows belong to (space, weights, data, settings).

        Raises `InputError` when the file was made for another identity (naming what differs), is of another format, is
        damaged, or is no search file at all.
        """
        if not path.exists():
            _create(path, identity)
        with _checked_connection(path) as connection:
            found = _read_meta(path, connection)
            _check_identity(path, found, identity)
            return cls(path, connection, found)

    @classmethod
    def existing(cls, path: Path) -> Store:
        """Open a file that a search has written, whatever it belongs to; `identity` then says it. Raises as `open` does."""
        if not path.is_file():
            raise InputError(f"{path}: there is no search file here: run the search first, or give the path of its file")
        with _checked_connection(path) as connection:
            return cls(path, connection, _read_meta(path, connection))

    def add(self, rows: Sequence[Row]) -> int:
        """Write evaluated children in one transaction; those whose key is there already are left as they are.

        Returns how many were new. When it returns, the rows survive the death of this process.
        """
        return self._insert(Row, rows)

    def get(self, key: str) -> Row | None:
        """Find the evaluated child of that key."""
        return self._one(Row, (key,))

    def rows(self) -> list[Row]:
        """Every evaluated child, in the order of insertion."""
        return self._all(Row)

    def keys(self) -> set[str]:
        """Give the keys of all evaluated children."""
        return {key for (key,) in self._keys(Row)}

    def add_confirmed(self, rows: Sequence[Confirmed]) -> int:
        """Write results on the confirm split; as `add`."""
        return self._insert(Confirmed, rows)

    def get_confirmed(self, key: str) -> Confirmed | None:
        """Find the result of that key on the confirm split."""
        return self._one(Confirmed, (key,))

    def confirmed(self) -> list[Confirmed]:
        """Every result on the confirm split, in the order of insertion."""
        return self._all(Confirmed)

    def confirmed_keys(self) -> set[str]:
        """Give the keys of all children confirmed."""
        return {key for (key,) in self._keys(Confirmed)}

    def add_measurements(self, rows: Sequence[Measurement]) -> int:
        """Write measured latencies, one for each key and target; as `add`."""
        return self._insert(Measurement, rows)

    def get_measurement(self, key: str, target: str) -> Measurement | None:
        """Find the latency of that key on that target."""
        return self._one(Measurement, (key, target))

    def measurements(self) -> list[Measurement]:
        """Every measured latency, in the order of insertion."""
        return self._all(Measurement)

    def measurement_keys(self) -> set[tuple[str, str]]:
        """Give the (key, target) of all measured latencies."""
        return {(key, target) for key, target in self._keys(Measurement)}

    def close(self) -> None:
        """Close the file; a second time does nothing."""
        self._connection.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _insert(self, kind: type[Record], records: Sequence[Record]) -> int:
        # DO NOTHING and not OR IGNORE: the latter would also drop, silently, a row whose score is NaN (SQLite's NULL)
        marks = ", ".join("?" for _ in dataclasses.fields(kind))
        names = ", ".join(field.name for field in dataclasses.fields(kind))
        statement = f"INSERT INTO {kind.TABLE} ({names}) VALUES ({marks}) ON CONFLICT ({', '.join(kind.KEYS)}) DO NOTHING"
        values = [_encode(record) for record in records]
        with _explained(self.path), _transaction(self._connection):
            before = self._connection.total_changes
            self._connection.executemany(statement, values)
            return self._connection.total_changes - before

    def _one(self, kind: type[Record], keys: tuple[str, ...]) -> Record | None:
        found = self._select(kind, "*", f"WHERE {' AND '.join(f'{name} = ?' for name in kind.KEYS)}", keys)
        return self._decode(kind, found[0]) if found else None

    def _all(self, kind: type[Record]) -> list[Record]:
        return [self._decode(kind, values) for values in self._select(kind, "*", "ORDER BY rowid")]

    def _keys(self, kind: type[Record]) -> list[tuple[Any, ...]]:
        return self._select(kind, ", ".join(kind.KEYS))

    def _select(self, kind: type[Record], what: str, rest: str = "", values: tuple[str, ...] = ()) -> list[tuple[Any, ...]]:
        names = ", ".join(field.name for field in dataclasses.fields(kind)) if what == "*" else what
        with _explained(self.path):
            return self._connection.execute(f"SELECT {names} FROM {kind.TABLE} {rest}", values).fetchall()

    def _decode(self, kind: type[Record], values: tuple[Any, ...]) -> Record:
        named = {field.name: value for field, value in zip(dataclasses.fields(kind), values, strict=True)}
        for name in {"costs", "detail"} & named.keys():
            try:
                named[name] = json.loads(named[name])
            except (ValueError, TypeError) as error:
                raise _damaged(self.path, f"{name} of {named['key']} is not JSON") from error
        return kind(**named)


_COLUMN: Mapping[str, Callable[[Any], object]] = {
    "str": str,
    "bytes": bytes,
    "float": float,
    "int": operator.index,
    "Mapping[str, float]": lambda costs: json.dumps({name: float(cost) for name, cost in costs.items()}, allow_nan=False),
    "Mapping[str, Any]": lambda detail: json.dumps(detail, allow_nan=False),
}
"""Declared type of a field -> what SQLite is given (it would store a numpy integer as a blob of bytes)."""


def _encode(record: Row | Confirmed | Measurement) -> tuple[object, ...]:
    """Give the values of a record's columns. Raises `ValueError` for NaN, which SQLite and JSON do not know."""
    values = tuple(_COLUMN[str(field.type)](getattr(record, field.name)) for field in dataclasses.fields(record))
    if any(isinstance(value, float) and math.isnan(value) for value in values):
        raise ValueError(f"a number of child {record.key} is NaN: leave a child that has no score out of the store")
    return values


@contextlib.contextmanager
def _checked_connection(path: Path) -> Iterator[sqlite3.Connection]:
    """Connect and check the file; the connection stays open when the body succeeds."""
    with _explained(path):
        connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_MS / 1000, isolation_level=None)  # we say BEGIN ourselves
        try:
            connection.execute("PRAGMA synchronous = NORMAL")
            verdict = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if verdict != "ok":
                raise _damaged(path, " ".join(verdict.split()))
            yield connection
        except BaseException:
            connection.close()
            raise


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what SQLite says about the file into an `InputError` with a remedy."""
    try:
        yield
    except sqlite3.ProgrammingError:  # used after close, or from another thread: a bug of the caller
        raise
    except sqlite3.OperationalError as error:
        raise InputError(
            f"{path}: SQLite cannot use this file ({error}): check that its folder exists, that it may be written, that the "
            "disk has room and that no other program holds it"
        ) from error
    except sqlite3.DatabaseError as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, reason: str) -> InputError:
    return InputError(
        f"{path}: is not a search file or is damaged ({reason}): restore a copy, or move it away and search again"
    )


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All or nothing. IMMEDIATE takes the write lock first, so that waiting for another writer cannot end in a deadlock."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def _tables(connection: sqlite3.Connection) -> set[str]:
    return {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def _create(path: Path, identity: Mapping[str, str]) -> None:
    """Make an empty store under another name and link it to `path`, unless another process was quicker.

    Made in place it could be seen half done, and of processes that switch one file to WAL at once some fail as "locked".
    """
    meta = {"format": str(FORMAT), "identity": json.dumps(dict(identity), sort_keys=True), "created": now()}
    try:
        with _explained(path), tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            made = Path(folder) / path.name
            with contextlib.closing(sqlite3.connect(made)) as connection:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.executescript(_SCHEMA)
                connection.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
                connection.commit()
            with contextlib.suppress(FileExistsError):
                path.hardlink_to(made)
        sync_folder(path.parent)
    except OSError as error:
        raise InputError(f"{path}: a search file cannot be made here ({error}): give a path in a folder that exists") from error


def _read_meta(path: Path, connection: sqlite3.Connection) -> dict[str, str]:
    """Read the identity that the file was made for, once its format is known to be ours."""
    if not {"meta", Row.TABLE, Confirmed.TABLE, Measurement.TABLE} <= _tables(connection):
        raise InputError(f"{path}: is an SQLite file, but not a search's: give another path, or move this file away")
    meta = dict(connection.execute("SELECT name, value FROM meta"))
    if meta.get("format") != str(FORMAT):
        raise InputError(
            f"{path}: has format {meta.get('format')}, this version reads format {FORMAT}: "
            "use the version that wrote it, or search again with that file moved away"
        )
    try:
        return {str(name): str(value) for name, value in json.loads(meta["identity"]).items()}
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise _damaged(path, "the meta table does not say what the rows belong to") from error


def _check_identity(path: Path, found: Mapping[str, str], asked: Mapping[str, str]) -> None:
    """Rows of other weights, data or settings must not be mixed with ours."""
    differ = [name for name in sorted(found.keys() | asked.keys()) if found.get(name) != asked.get(name)]
    if differ:
        what = "; ".join(
            f"{name} is {found.get(name, 'not set')} there and {asked.get(name, 'not set')} here" for name in differ
        )
        raise InputError(
            f"{path}: belongs to another search ({what}): search with what it was made for, or with that file moved away"
        )
