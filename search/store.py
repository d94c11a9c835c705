"""The search's SQLite file: every evaluated child, what was confirmed and measured of it, and how far searches are.

Safe against `kill -9` and against several processes writing at once: a write-ahead log, and every method that writes is one
transaction. The log is not synced at each commit (`synchronous = NORMAL`): when the machine itself loses power, the last
transactions, of at most the seconds since the system last wrote the log out, may be lost, each as a whole and none before an earlier
one; the file stays sound.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import operator
import os
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from search.records import Confirmed, Measurement, Record, Row, Weighed, encoded, now
from supernet.durable import sync_folder
from supernet.errors import InputError

FORMAT = 2
BUSY_TIMEOUT_MS = 60_000
"""How long a write waits for another process; a transaction here takes milliseconds."""


@dataclass(frozen=True, slots=True)
class SavedSearch:
    """How far a search is: the last generation saved, its strategy's state, and all that the strategy was told, in order.

    `told` is of (generation, key, rung); what a rung means for a child that failed is the writer's affair.
    """

    generation: int
    state: dict[str, Any]
    told: list[tuple[int, str, int]]


_WEIGHTS = """CREATE TABLE IF NOT EXISTS weights (
    key TEXT NOT NULL, target TEXT NOT NULL, batch INTEGER NOT NULL, spans TEXT NOT NULL, created TEXT NOT NULL,
    PRIMARY KEY (key, target, batch));"""
"""Files that were written before it existed lack it."""
# `samples` stand last: a long value continues on other pages, which are then not read for the columns before it.
_SCHEMA = f"""
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE children (
    key TEXT PRIMARY KEY NOT NULL, arch TEXT NOT NULL, stage TEXT NOT NULL, rung INTEGER NOT NULL, images INTEGER NOT NULL,
    score REAL NOT NULL, costs TEXT NOT NULL, macs_spent REAL NOT NULL, seconds REAL NOT NULL, created TEXT NOT NULL,
    samples BLOB NOT NULL);
CREATE TABLE confirmed (key TEXT PRIMARY KEY NOT NULL, score REAL NOT NULL, images INTEGER NOT NULL, samples BLOB NOT NULL);
CREATE TABLE measurements (
    key TEXT NOT NULL, target TEXT NOT NULL, latency_ms REAL NOT NULL, latency_ms_low REAL NOT NULL,
    latency_ms_high REAL NOT NULL, detail TEXT NOT NULL, created TEXT NOT NULL, PRIMARY KEY (key, target));
{_WEIGHTS}
CREATE TABLE searches (id TEXT PRIMARY KEY NOT NULL, generation INTEGER NOT NULL, state TEXT NOT NULL, saved TEXT NOT NULL);
CREATE TABLE told (
    search TEXT NOT NULL, generation INTEGER NOT NULL, position INTEGER NOT NULL, key TEXT NOT NULL, rung INTEGER NOT NULL,
    PRIMARY KEY (search, generation, position)) WITHOUT ROWID;
"""
_TABLES = {"meta", "children", "confirmed", "measurements", "searches", "told"}


def store_path(run: Path, precision: str = "fp32") -> Path:
    """The file of a run's searches for children of that precision."""
    return run / "search" / ("search.sqlite" if precision == "fp32" else f"search-{precision}.sqlite")


def latest_store(run: Path) -> Path:
    """The file of the run's latest search that ended; of one that goes on still, where there is no other."""
    try:
        precision = json.loads((run / "search" / "found.json").read_text()).get("precision", "fp32")
    except (OSError, ValueError, AttributeError, RecursionError):
        precision = "fp32"
    path = store_path(run, "int8" if precision == "int8" else "fp32")
    return path if path.exists() else next((each for each in sorted(path.parent.glob("search*.sqlite"))), path)


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
            if "weights" not in _tables(connection):
                connection.execute(_WEIGHTS)
            return cls(path, connection, found)

    @classmethod
    def existing(cls, path: Path) -> Store:
        """Open a file that a search has written, whatever it belongs to; `identity` then says it. Raises as `open` does."""
        if not path.is_file():
            raise InputError(f"{path}: nothing was searched here yet: search the run first (`nestling search RUN`)")
        with _checked_connection(path) as connection:
            return cls(path, connection, _read_meta(path, connection))

    def add(self, rows: Sequence[Row]) -> int:
        """Write evaluated children in one transaction. One that is there already is replaced if the new row's rung is higher.

        Returns how many were new or replaced. When it returns, the rows survive the death of this process.
        """
        return self._insert(Row, rows)

    def get(self, key: str) -> Row | None:
        """Find the evaluated child of that key."""
        found = self._select(Row, where="WHERE key = ?", values=(key,))
        return found[0] if found else None

    def rows(self, *, samples: bool = True) -> list[Row]:
        """Every evaluated child, in the order of first insertion; without `samples` these are empty and not read from the disk."""
        return self._select(Row, without=() if samples else ("samples",))

    def add_confirmed(self, rows: Sequence[Confirmed]) -> int:
        """Write results on the confirm split in one transaction, but for those that are there. Returns how many were new."""
        return self._insert(Confirmed, rows)

    def confirmed(self, *, samples: bool = True) -> list[Confirmed]:
        """Every result on the confirm split, in the order of insertion; `samples` as in `rows`."""
        return self._select(Confirmed, without=() if samples else ("samples",))

    def add_measurements(self, rows: Sequence[Measurement]) -> int:
        """Write measured latencies, one for each key and target; as `add_confirmed`."""
        return self._insert(Measurement, rows)

    def measurements(self) -> list[Measurement]:
        """Every measured latency, in the order of insertion."""
        return self._select(Measurement)

    def add_weighed(self, rows: Sequence[Weighed]) -> int:
        """Write what children weighed, once for each key, target and batch; as `add_confirmed`."""
        return self._insert(Weighed, rows)

    def weighed(self) -> list[Weighed]:
        """What children weighed, in the order of insertion."""
        with _explained(self.path):
            known = "weights" in _tables(self._connection)
        return self._select(Weighed) if known else []

    def save_search(self, id: str, generation: int, state: Mapping[str, Any], told: Sequence[tuple[str, int]]) -> None:
        """Save in one transaction what the strategy is after `generation`, and the (key, rung) pairs that it was told in it.

        Raises `InputError` where this generation or a later one is saved already: another process runs the same search.
        """
        text = json.dumps(state, allow_nan=False)
        pairs = [
            (id, operator.index(generation), place, str(key), operator.index(rung)) for place, (key, rung) in enumerate(told)
        ]
        with _explained(self.path), _transaction(self._connection) as connection:
            saved = connection.execute("SELECT generation FROM searches WHERE id = ?", (id,)).fetchone()
            if saved is not None and saved[0] >= generation:
                raise InputError(
                    f"{self.path}: generation {generation} of search {id} comes after {saved[0]}, which is saved already: stop the "
                    "other process that runs this search, then search again, which repeats no evaluation"
                )
            connection.execute(
                "INSERT OR REPLACE INTO searches VALUES (?, ?, ?, ?)", (id, operator.index(generation), text, now())
            )
            connection.executemany("INSERT INTO told VALUES (?, ?, ?, ?, ?)", pairs)

    def search(self, id: str) -> SavedSearch | None:
        """What `save_search` wrote last for this search, and all that its strategy was told; None where it never saved."""
        with _explained(self.path), _transaction(self._connection, "DEFERRED") as connection:  # both tables as of one moment
            saved = connection.execute("SELECT generation, state FROM searches WHERE id = ?", (id,)).fetchone()
            told = connection.execute(
                "SELECT generation, key, rung FROM told WHERE search = ? ORDER BY generation, position", (id,)
            ).fetchall()
        if saved is None:
            return None
        return SavedSearch(saved[0], self._json(saved[1], f"state of search {id}"), told)

    def close(self) -> None:
        """Close the file; a second time does nothing."""
        self._connection.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _insert(self, kind: type[Record], records: Sequence[Record]) -> int:
        # ON CONFLICT and not OR IGNORE: the latter would also drop, silently, a row whose score is NaN (SQLite's NULL)
        names = [field.name for field in dataclasses.fields(kind)]
        conflict = kind.CONFLICT.format(excluded=", ".join(f"{name} = excluded.{name}" for name in names))
        statement = (
            f"INSERT INTO {kind.TABLE} ({', '.join(names)}) VALUES ({', '.join('?' for _ in names)}) "
            f"ON CONFLICT ({', '.join(kind.KEYS)}) {conflict}"
        )
        values = [encoded(record) for record in records]
        with _explained(self.path), _transaction(self._connection) as connection:
            before = connection.total_changes
            connection.executemany(statement, values)
            return connection.total_changes - before

    def _select(
        self, kind: type[Record], where: str = "", values: tuple[str, ...] = (), without: tuple[str, ...] = ()
    ) -> list[Record]:
        names = [field.name for field in dataclasses.fields(kind)]
        columns = ", ".join("x''" if name in without else name for name in names)
        with _explained(self.path):
            found = self._connection.execute(f"SELECT {columns} FROM {kind.TABLE} {where} ORDER BY rowid", values).fetchall()
        return [self._decode(kind, dict(zip(names, row, strict=True))) for row in found]

    def _decode(self, kind: type[Record], named: dict[str, Any]) -> Record:
        for name in {"costs", "detail", "spans"} & named.keys():
            named[name] = self._json(named[name], f"{name} of {named['key']}")
        return kind(**named)

    def _json(self, text: Any, what: str) -> dict[str, Any]:
        try:
            value = json.loads(text)
        except (ValueError, TypeError, RecursionError) as error:
            raise _damaged(self.path, f"{what} is not JSON") from error
        if not isinstance(value, dict):
            raise _damaged(self.path, f"{what} is no JSON object")
        return value


@contextlib.contextmanager
def _checked_connection(path: Path) -> Iterator[sqlite3.Connection]:
    """Connect and check the file; the connection stays open when the body succeeds."""
    with _explained(path):
        name = path.absolute().as_uri() + ("?immutable=1" if _never_written(path) else "")
        connection = sqlite3.connect(
            name, uri=True, timeout=BUSY_TIMEOUT_MS / 1000, isolation_level=None
        )  # we say BEGIN ourselves
        try:
            connection.execute("PRAGMA synchronous = NORMAL")
            verdict = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if verdict != "ok":
                raise _damaged(path, " ".join(verdict.split()))
            yield connection
        except BaseException:
            connection.close()
            raise


def _never_written(path: Path) -> bool:
    """Whether it lies on a read-only disk, all of its log merged: SQLite then reads it, for no lock and no log can be made there."""
    log = path.with_name(f"{path.name}-wal")
    return path.is_file() and bool(os.statvfs(path.parent).f_flag & os.ST_RDONLY) and not (log.exists() and log.stat().st_size)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what SQLite says about the file into an `InputError` with a remedy."""
    try:
        yield
    except sqlite3.ProgrammingError:  # used after close, or from another thread: a bug of the caller
        raise
    except sqlite3.OperationalError as error:
        if "decode" in str(error):  # a text that is no longer UTF-8
            raise _damaged(path, " ".join(str(error).split())) from error
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
def _transaction(connection: sqlite3.Connection, kind: str = "IMMEDIATE") -> Iterator[sqlite3.Connection]:
    """All or nothing. IMMEDIATE takes the write lock first, so that waiting for another writer cannot end in a deadlock."""
    connection.execute(f"BEGIN {kind}")
    try:
        yield connection
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # SQLite may have rolled back by itself, as on a full disk
            connection.execute("ROLLBACK")
        raise


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
    tables = _tables(connection)
    if not {"meta", "children"} <= tables:
        raise InputError(f"{path}: is an SQLite file, but not a search's: give another path, or move this file away")
    meta = dict(connection.execute("SELECT name, value FROM meta"))
    if meta.get("format") != str(FORMAT):
        raise InputError(
            f"{path}: has format {meta.get('format')}, this version reads format {FORMAT}: "
            "move that file away and search again, or use the version that wrote it"
        )
    if not tables >= _TABLES:
        raise _damaged(path, f"it lacks {', '.join(sorted(_TABLES - tables))}")
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
