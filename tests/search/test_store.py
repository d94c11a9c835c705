"""The search's SQLite file: nothing acknowledged is lost, nothing is torn, nothing is mixed up."""

from __future__ import annotations

import hashlib
import math
import random
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from search.store import Confirmed, Measurement, Row, Store
from supernet.errors import InputError

IDENTITY = {"space": "5ab84f65890c", "weights": "77c0e1d2aa34", "data": "digits"}
ROOT = Path(__file__).parents[2]
BATCH = 7

WRITER = """
import hashlib, itertools, pathlib, sys
from search.store import Row, Store
sys.stdin.readline()
path, name, batches, size = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
with Store.open(path, identity={"space": "s"}) as store:
    print("open", flush=True)
    for batch in range(batches):
        keys = [f"{name}-{batch}-{i}" for i in range(size)]
        rows = [Row(k, "{}", "coarse", 0.5, hashlib.sha256(k.encode()).digest() * 40, 10, {"macs": 1.0}, 0.1) for k in keys]
        assert store.add(rows) == size
        print(batch, flush=True)
"""


def row(key: str = "aa", **changes: object) -> Row:
    made = Row(
        key, '{"depth":2}', "coarse", 0.875, b"\x00\xff\x10", 24, {"macs": 8e6, "params": 2e6}, 1.25, "2026-01-02T03:04:05"
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def writer(path: Path, name: str, batches: int, size: int = BATCH) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(path), name, str(batches), str(size)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "search.sqlite"


def test_rows_come_back_as_they_were_in_the_order_of_insertion(path: Path) -> None:
    rows = [row("b"), row("a", score=-math.inf, scores=b"", costs={}), row("ü", arch='{"a":"\\u0000"}', seconds=0.1 + 0.2)]
    with Store.open(path, identity=IDENTITY) as store:
        assert store.add(rows) == 3
        assert store.rows() == rows
    with Store.open(path, identity=IDENTITY) as store:
        assert store.rows() == rows
        assert store.keys() == {"b", "a", "ü"}
        assert store.get("a") == rows[1]
        assert store.get("nobody") is None


def test_a_key_is_written_once_and_only_the_new_ones_are_counted(path: Path) -> None:
    with Store.open(path, identity=IDENTITY) as store:
        assert store.add([row("a"), row("a", score=0.1)]) == 1
        assert store.add([row("a", score=0.2), row("b"), row("c")]) == 2
        assert store.add([]) == 0
        assert [(r.key, r.score) for r in store.rows()] == [("a", 0.875), ("b", 0.875), ("c", 0.875)]


def test_confirmed_and_measured_children_come_back_as_they_were(path: Path) -> None:
    results = [Confirmed("b", b"\x01", 0.5, 8), Confirmed("a", b"", 0.25, 0)]
    latencies = [
        Measurement("a", "phone", 7.5, 7.25, 8.0, {"runs": 3, "clock": [1, None]}, "2026-01-02"),
        Measurement("a", "laptop", 1.5, 1.25, 2.0, {}),
    ]
    with Store.open(path, identity=IDENTITY) as store:
        assert (store.add_confirmed(results), store.add_confirmed(results)) == (2, 0)
        assert (store.add_measurements(latencies), store.add_measurements(latencies)) == (2, 0)
        assert (store.confirmed(), store.measurements()) == (results, latencies)
        assert (store.get_confirmed("a"), store.get_confirmed("c")) == (results[1], None)
        assert (store.get_measurement("a", "laptop"), store.get_measurement("a", "watch")) == (latencies[1], None)
        assert store.confirmed_keys() == {"a", "b"}
        assert store.measurement_keys() == {("a", "phone"), ("a", "laptop")}
        assert store.rows() == []


def test_numbers_of_numpy_are_stored_as_numbers(path: Path) -> None:
    given = row(score=np.float32(0.5), images=np.int64(24), seconds=np.float64(2), costs={"macs": np.int64(7)})
    with Store.open(path, identity=IDENTITY) as store:
        store.add([given])
        assert store.get("aa") == row(score=0.5, seconds=2.0, costs={"macs": 7.0})
    types = sqlite3.connect(path).execute("SELECT typeof(score), typeof(images), typeof(seconds) FROM children").fetchone()
    assert types == ("real", "integer", "real")


@pytest.mark.parametrize(
    "changes", [{"score": math.nan}, {"seconds": math.nan}, {"costs": {"macs": math.nan}}, {"score": None}]
)
def test_a_child_without_a_number_is_refused_and_its_batch_is_not_written(path: Path, changes: dict[str, object]) -> None:
    with Store.open(path, identity=IDENTITY) as store:
        with pytest.raises((ValueError, TypeError)):
            store.add([row("good"), row("bad", **changes)])
        assert store.rows() == []
        assert store.add([row("good")]) == 1


def test_a_batch_that_fails_in_the_middle_is_not_written(path: Path) -> None:
    with Store.open(path, identity=IDENTITY) as store:
        with pytest.raises(OverflowError):
            store.add([row("good"), row("bad", images=2**70)])
        assert store.rows() == []


def test_a_file_of_another_identity_is_refused_with_what_differs(path: Path) -> None:
    Store.open(path, identity=IDENTITY).close()
    with pytest.raises(InputError) as caught:
        Store.open(path, identity={"space": "5ab84f65890c", "weights": "000000000000", "evaluation": "full"})
    message = str(caught.value)
    assert "weights is 77c0e1d2aa34 there and 000000000000 here" in message
    assert "evaluation is not set there and full here" in message
    assert "data is digits there and not set here" in message
    assert "space" not in message
    assert "moved away" in message


def test_an_existing_file_says_what_it_belongs_to(path: Path) -> None:
    with pytest.raises(InputError, match="run the search first"):
        Store.existing(path)
    assert not path.exists()
    with Store.open(path, identity=IDENTITY) as store:
        store.add([row()])
    with Store.existing(path) as store:
        assert store.identity == IDENTITY
        assert store.rows() == [row()]


def test_another_format_is_refused_with_the_reason(path: Path) -> None:
    Store.open(path, identity=IDENTITY).close()
    connection = sqlite3.connect(path)
    connection.execute("UPDATE meta SET value = '2' WHERE name = 'format'")
    connection.commit()
    connection.close()
    with pytest.raises(InputError, match="has format 2, this version reads format 1"):
        Store.open(path, identity=IDENTITY)


@pytest.mark.parametrize("content", [b"hello", b"{}" * 5000, b"SQLite format 3\x00" + b"\xff" * 4096])
def test_a_file_that_is_not_sqlite_is_refused_and_left_as_it_is(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    for opened in (Store.existing, lambda path: Store.open(path, identity=IDENTITY)):
        with pytest.raises(InputError, match=r"search\.sqlite: .*(move it away and search again|check that)"):
            opened(path)
    assert path.read_bytes() == content
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_an_sqlite_file_of_another_program_is_refused_and_left_as_it_is(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE children (name TEXT)")
    connection.commit()
    connection.close()
    before = path.read_bytes()
    with pytest.raises(InputError, match="not a search's"):
        Store.open(path, identity=IDENTITY)
    assert path.read_bytes() == before


def test_a_path_that_cannot_be_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="SQLite cannot use this file"):
        Store.open(tmp_path, identity=IDENTITY)
    with pytest.raises(InputError, match="in a folder that exists"):
        Store.open(tmp_path / "nowhere" / "search.sqlite", identity=IDENTITY)


def filled(path: Path) -> list[Row]:
    rows = [row(f"{i:012x}", scores=bytes([i % 256]) * 300) for i in range(400)]
    with Store.open(path, identity=IDENTITY) as store:
        store.add(rows)
    return rows


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_a_truncated_file_is_refused(path: Path, share: float) -> None:
    filled(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(InputError, match=r"search\.sqlite: "):
        Store.open(path, identity=IDENTITY)


def test_damage_anywhere_is_refused_or_harms_no_structure(path: Path) -> None:
    """SQLite has no checksums: a changed byte inside a value is a changed value. Everything else must be noticed."""
    keys = [r.key for r in filled(path)]
    whole = path.read_bytes()
    noise = random.Random(0)
    refused = 0
    for start in range(0, len(whole) - 4096, 4096):
        path.write_bytes(whole[:start] + noise.randbytes(4096) + whole[start + 4096 :])
        try:
            with Store.open(path, identity=IDENTITY) as store:
                assert [r.key for r in store.rows()] == keys
        except InputError as error:
            refused += 1
            assert "search.sqlite: " in str(error)
    assert refused == len(range(0, len(whole) - 4096, 4096))  # every page of this file holds structure


def test_a_value_that_is_no_longer_json_is_refused(path: Path) -> None:
    filled(path)
    connection = sqlite3.connect(path)
    connection.execute("UPDATE children SET costs = '{\"macs\": ' WHERE rowid = 3")
    connection.commit()
    connection.close()
    with (
        Store.open(path, identity=IDENTITY) as store,
        pytest.raises(InputError, match="costs of 000000000002 is not JSON"),
    ):
        store.rows()


def test_an_empty_file_is_no_search_file(path: Path) -> None:
    path.touch()
    with pytest.raises(InputError, match="not a search's"):
        Store.open(path, identity=IDENTITY)
    assert path.read_bytes() == b""


def test_a_killed_writer_loses_no_acknowledged_row_and_tears_none(path: Path) -> None:
    noise = random.Random(1)
    acknowledged: set[str] = set()
    for life in range(20):
        process = writer(path, f"life{life}", 10**9)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        for _ in range(noise.randint(0, 12)):
            line = process.stdout.readline().strip()
            assert line, "the writer must live until it is killed"
            acknowledged |= {f"life{life}-{line}-{i}" for i in range(BATCH)} if line != "open" else set()
        process.send_signal(signal.SIGKILL)
        for line in process.stdout.read().split():  # acknowledged before the signal arrived
            acknowledged |= {f"life{life}-{line}-{i}" for i in range(BATCH)} if line != "open" else set()
        process.stdout.close()
        assert process.wait() == -signal.SIGKILL
    assert len(acknowledged) > 20 * BATCH
    with Store.open(path, identity={"space": "s"}) as store:
        check_whole(store.rows())
        assert acknowledged <= store.keys()


def test_processes_that_open_and_write_at_once_lose_nothing(path: Path) -> None:
    processes = [writer(path, f"writer{i}", 100, 5) for i in range(4)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()  # they start together, so that all of them try to create the file
    for process in processes:
        assert process.stdout is not None
        process.stdout.read()
        process.stdout.close()
        process.wait()
        assert process.returncode == 0
    with Store.open(path, identity={"space": "s"}) as store:
        check_whole(store.rows(), size=5)
        assert store.keys() == {f"writer{w}-{b}-{i}" for w in range(4) for b in range(100) for i in range(5)}


def check_whole(rows: list[Row], size: int = BATCH) -> None:
    """Every row is as the writer made it, and of every batch all rows are there."""
    batches: dict[str, int] = {}
    for r in rows:
        assert r.scores == hashlib.sha256(r.key.encode()).digest() * 40
        assert (r.arch, r.stage, r.score, r.images, r.costs) == ("{}", "coarse", 0.5, 10, {"macs": 1.0})
        batch = r.key.rsplit("-", 1)[0]
        batches[batch] = batches.get(batch, 0) + 1
    assert set(batches.values()) <= {size}


def test_a_closed_store_is_one_plain_file_and_is_not_used_again(path: Path) -> None:
    store = Store.open(path, identity=IDENTITY)
    store.add([row()])
    store.close()
    store.close()
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    with pytest.raises(sqlite3.ProgrammingError):
        store.rows()
