"""The search's SQLite file: nothing acknowledged is lost, nothing is torn, nothing is mixed up."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from search.records import Confirmed, Measurement, Row
from search.store import SavedSearch, Store
from supernet.errors import InputError

IDENTITY = {"space": "5ab84f65890c", "weights": "77c0e1d2aa34", "data": "digits"}
ROOT = Path(__file__).parents[2]
BATCH = 7

WRITER = """
import hashlib, pathlib, sys
from search.records import Row
from search.store import Store
sys.stdin.readline()
path, name, batches, size = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
with Store.open(path, identity={"space": "s"}) as store:
    print("open", flush=True)
    for batch in range(batches):
        keys = [f"{name}-{batch}-{i}" for i in range(size)]
        for rung in (0, 1):
            samples = [hashlib.sha256(f"{k} {rung}".encode()).digest() * 40 for k in keys]
            rows = [Row(k, "{}", "coarse", rung, s, 10, 0.5, {"macs": 1.0}, 9.0, 0.1) for k, s in zip(keys, samples)]
            assert store.add(rows) == size
        store.save_search(name, batch, {"batch": batch}, [(key, 1) for key in keys])
        print(batch, flush=True)
"""

PROMOTER = """
import pathlib, random, sys
from search.records import Row
from search.store import Store
path, name, lives, rungs = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
noise, written = random.Random(name), 0
sys.stdin.readline()
with Store.open(path, identity={"space": "s"}) as store:
    for _ in range(lives):
        rung = noise.randrange(rungs)
        written += store.add([Row(f"child{i}", name, str(rung), rung, bytes([rung]) * 900, 2**rung, rung / 8, {}, 1.0, 0.1)
                              for i in noise.sample(range(20), 10)])
print(written)
"""


def row(key: str = "aa", **changes: object) -> Row:
    made = Row(
        key,
        '{"depth":2}',
        "coarse",
        1,
        b"\x00\xff\x10",
        24,
        0.875,
        {"macs": 8e6, "params": 2e6},
        6e8,
        1.25,
        "2026-01-02T03:04:05",
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def execute(path: Path, script: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript(script)


def writer(path: Path, name: str, batches: int, size: int = BATCH) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(path), name, str(batches), str(size)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "search.sqlite"


def test_rows_come_back_as_they_were_in_the_order_of_insertion(path: Path) -> None:
    rows = [row("b"), row("a", score=-math.inf, samples=b"", costs={}), row("ü", arch='{"a":"\\u0000"}', seconds=0.1 + 0.2)]
    with Store.open(path, identity=IDENTITY) as store:
        assert store.add(rows) == 3
        assert store.rows() == rows
    with Store.open(path, identity=IDENTITY) as store:
        assert store.rows() == rows
        assert store.rows(samples=False) == [replace(each, samples=b"") for each in rows]
        assert store.get("a") == rows[1]
        assert store.get("nobody") is None


def test_a_key_is_written_once_and_only_the_new_ones_are_counted(path: Path) -> None:
    with Store.open(path, identity=IDENTITY) as store:
        assert store.add([row("a"), row("a", score=0.1)]) == 1
        assert store.add([row("a", score=0.2), row("b"), row("c")]) == 2
        assert store.add([]) == 0
        assert [(r.key, r.score) for r in store.rows()] == [("a", 0.875), ("b", 0.875), ("c", 0.875)]


def test_a_row_is_replaced_as_a_whole_by_one_of_a_higher_rung_and_by_no_other(path: Path) -> None:
    first = row("a")
    promoted = Row("a", "{}", "fine", 2, b"longer", 96, 0.5, {"macs": 1.0}, 7e9, 2.5, "2026-01-03")
    with Store.open(path, identity=IDENTITY) as store:
        store.add([first, row("b")])
        assert store.add([promoted]) == 1
        assert store.rows() == [promoted, row("b")]  # in its first place
        assert store.add([first, replace(promoted, score=0.9), row("a", rung=0), row("b", rung=3), row("b", rung=4)]) == 2
        assert store.rows() == [promoted, row("b", rung=4)]


def test_confirmed_and_measured_children_come_back_as_they_were(path: Path) -> None:
    results = [Confirmed("b", b"\x01", 0.5, 8), Confirmed("a", b"", 0.25, 0)]
    latencies = [
        Measurement("a", "phone", 7.5, 7.25, 8.0, {"runs": 3, "clock": [1, None]}, "2026-01-02"),
        Measurement("a", "laptop", 1.5, 1.25, 2.0, {}),
    ]
    with Store.open(path, identity=IDENTITY) as store:
        assert (store.add_confirmed(results), store.add_confirmed([replace(results[0], score=0.75)])) == (2, 0)
        assert (store.add_measurements(latencies), store.add_measurements([replace(latencies[0], latency_ms=1)])) == (2, 0)
        assert (store.confirmed(), store.measurements()) == (results, latencies)
        assert store.confirmed(samples=False) == [replace(each, samples=b"") for each in results]
        assert store.rows() == []


# --- searches ---

STATE = {"parents": ["a", "b"], "rng": {"state": 2**127 + 1, "inc": 3}, "rate": 0.1, "nothing": None}


def test_a_search_comes_back_with_its_state_and_all_that_it_was_told_in_order(path: Path) -> None:
    with Store.open(path, identity=IDENTITY) as store:
        assert store.search("one") is None
        store.save_search("one", 0, {}, [])
        assert store.search("one") == SavedSearch(0, {}, [])
        store.save_search("one", 1, {"parents": []}, [("b", 0), ("a", 2), ("b", 1)])
        store.save_search("other", 7, {"mine": 1}, [("z", 0)])
        store.save_search("one", 4, STATE, [("a", np.int64(2))])  # type: ignore[list-item]
    with Store.existing(path) as store:
        assert store.search("one") == SavedSearch(4, STATE, [(1, "b", 0), (1, "a", 2), (1, "b", 1), (4, "a", 2)])
        assert store.search("other") == SavedSearch(7, {"mine": 1}, [(7, "z", 0)])
        assert store.search("") is None


@pytest.mark.parametrize("generation", [3, 2, -1])
def test_a_generation_that_another_process_saved_is_refused_and_changes_nothing(path: Path, generation: int) -> None:
    with Store.open(path, identity=IDENTITY) as one, Store.open(path, identity=IDENTITY) as other:
        one.save_search("s", 3, STATE, [("a", 0)])
        with pytest.raises(InputError, match=rf"generation {generation} of search s comes after 3, .* stop the other process"):
            other.save_search("s", generation, {}, [("b", 0)])
        assert other.search("s") == SavedSearch(3, STATE, [(3, "a", 0)])


@pytest.mark.parametrize("mistake", ["state", "rung", "size"])
def test_a_search_that_cannot_be_saved_leaves_the_one_before(path: Path, mistake: str) -> None:
    state = {"rate": math.nan} if mistake == "state" else {}
    rung = {"rung": 1.5, "size": 2**70}.get(mistake, 1)
    with Store.open(path, identity=IDENTITY) as store:
        store.save_search("s", 0, STATE, [("a", 0)])
        with pytest.raises((ValueError, TypeError, OverflowError)):
            store.save_search("s", 1, state, [("b", 0), ("c", rung)])  # type: ignore[list-item]
        assert store.search("s") == SavedSearch(0, STATE, [(0, "a", 0)])
        store.save_search("s", 1, {}, [("b", 0)])


# --- values ---


def test_numbers_of_numpy_are_stored_as_numbers(path: Path) -> None:
    given = row(
        score=np.float32(0.5), images=np.int64(24), rung=np.uint8(1), seconds=np.float64(2), costs={"macs": np.int64(7)}
    )
    with Store.open(path, identity=IDENTITY) as store:
        store.add([given])
        assert store.get("aa") == row(score=0.5, seconds=2.0, costs={"macs": 7.0})
    types = sqlite3.connect(path).execute("SELECT typeof(score), typeof(images), typeof(seconds) FROM children").fetchone()
    assert types == ("real", "integer", "real")


@pytest.mark.parametrize(
    "changes", [{"score": math.nan}, {"seconds": math.nan}, {"costs": {"macs": math.nan}}, {"score": None}, {"rung": 0.5}]
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
    with pytest.raises(InputError, match="search the run first"):
        Store.existing(path)
    assert not path.exists()
    with Store.open(path, identity=IDENTITY) as store:
        store.add([row()])
    with Store.existing(path) as store:
        assert store.identity == IDENTITY
        assert store.rows() == [row()]


def test_another_format_is_refused_with_the_reason(path: Path) -> None:
    Store.open(path, identity=IDENTITY).close()
    execute(path, "UPDATE meta SET value = '3' WHERE name = 'format'")
    with pytest.raises(InputError, match="has format 3, this version reads format 2: move that file away and search again"):
        Store.open(path, identity=IDENTITY)


def test_a_file_of_the_first_format_is_refused_with_what_to_do_and_left_as_it_is(path: Path) -> None:
    execute(path, """
        CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
        CREATE TABLE children (key TEXT PRIMARY KEY NOT NULL, arch TEXT NOT NULL, score REAL NOT NULL, scores BLOB NOT NULL);
        CREATE TABLE confirmed (key TEXT PRIMARY KEY NOT NULL, scores BLOB NOT NULL);
        CREATE TABLE measurements (key TEXT NOT NULL, target TEXT NOT NULL, PRIMARY KEY (key, target));
        INSERT INTO meta VALUES ('format', '1'), ('identity', '{}');""")  # fmt: skip
    before = path.read_bytes()
    for opened in (Store.existing, lambda path: Store.open(path, identity=IDENTITY)):
        with pytest.raises(InputError, match="has format 1, this version reads format 2: move that file away and search again"):
            opened(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("table", ["confirmed", "measurements", "searches", "told"])
def test_a_file_that_lacks_a_table_is_refused(path: Path, table: str) -> None:
    Store.open(path, identity=IDENTITY).close()
    execute(path, f"DROP TABLE {table}")
    with pytest.raises(InputError, match=rf"damaged \(it lacks {table}\)"):
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
    execute(path, "CREATE TABLE children (name TEXT)")
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
    rows = [row(f"{i:012x}", samples=bytes([i % 256]) * 300) for i in range(400)]
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


def test_damage_anywhere_is_refused(path: Path) -> None:
    """Every page of this file holds structure. SQLite has no checksums: a changed byte inside a value is a changed value."""
    filled(path)
    whole = path.read_bytes()
    noise = random.Random(0)
    for start in range(0, len(whole), 4096):
        path.write_bytes(whole[:start] + noise.randbytes(4096) + whole[start + 4096 :])
        with pytest.raises(InputError, match=r"search\.sqlite: "), Store.open(path, identity=IDENTITY) as store:
            store.rows()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("costs = '{\"macs\": '", "costs of 000000000002 is not JSON"),
        ("costs = '[1]'", "costs of 000000000002 is no JSON object"),
        ("costs = CAST(x'ff' AS TEXT)", "damaged"),
        ("arch = CAST(x'7b0aff' AS TEXT)", "damaged"),
    ],
)
def test_a_value_that_is_no_longer_what_was_written_is_refused(path: Path, change: str, told: str) -> None:
    filled(path)
    execute(path, f"UPDATE children SET {change} WHERE rowid = 3")
    with Store.open(path, identity=IDENTITY) as store, pytest.raises(InputError, match=told) as caught:
        store.rows()
    assert "\n" not in str(caught.value)


def test_a_state_that_is_no_longer_json_is_refused(path: Path) -> None:
    with Store.open(path, identity=IDENTITY) as store:
        store.save_search("s", 0, STATE, [])
        execute(path, "UPDATE searches SET state = substr(state, 1, 20)")
        with pytest.raises(InputError, match="state of search s is not JSON"):
            store.search("s")


def killed_with_a_log(path: Path) -> tuple[bytes, bytes]:
    """File and write-ahead log that a killed writer left behind."""
    process = writer(path, "killed", 10**9)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    for _ in range(30):
        process.stdout.readline()
    process.kill()
    process.wait()
    process.stdout.close()
    return path.read_bytes(), log_of(path).read_bytes()


def log_of(path: Path) -> Path:
    return path.with_name(path.name + "-wal")


def test_a_log_that_is_cut_or_damaged_loses_only_the_last_transactions(path: Path) -> None:
    """The log has checksums: what follows the damage is as if never written, which a power cut may do too."""
    file, log = killed_with_a_log(path)
    noise, seen = random.Random(3), set()
    for trial in range(40):
        at = noise.randrange(len(log)) if trial else len(log)
        flipped = log[:at] + bytes(255 - b for b in log[at : at + 1]) + log[at + 1 :]
        path.write_bytes(file)
        log_of(path).write_bytes(log[:at] if trial % 2 else flipped)
        path.with_name(path.name + "-shm").unlink(missing_ok=True)
        with Store.open(path, identity={"space": "s"}) as store:
            rows, saved = store.rows(), store.search("killed")
        check_whole(rows)
        batches = len(rows) // BATCH
        seen.add(batches)
        assert {r.key for r in rows} == {f"killed-{batch}-{i}" for batch in range(batches) for i in range(BATCH)}
        if saved is not None:
            assert saved.state == {"batch": saved.generation}
            assert batches - 2 <= saved.generation < batches
            assert [(batch, key) for batch, key, _ in saved.told] == [
                (batch, f"killed-{batch}-{i}") for batch in range(saved.generation + 1) for i in range(BATCH)
            ]
    assert len(seen) > 5  # the log did hold many of them


def test_an_empty_file_is_no_search_file(path: Path) -> None:
    path.touch()
    with pytest.raises(InputError, match="not a search's"):
        Store.open(path, identity=IDENTITY)
    assert path.read_bytes() == b""


@pytest.mark.slow
def test_a_killed_writer_loses_no_acknowledged_row_and_tears_none(path: Path) -> None:
    noise = random.Random(1)
    acknowledged: dict[str, int] = {}
    for life in range(20):
        process = writer(path, f"life{life}", 10**9)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        lines = [process.stdout.readline().strip() for _ in range(noise.randint(0, 12))]
        assert all(lines), "the writer must live until it is killed"
        process.send_signal(signal.SIGKILL)
        lines += process.stdout.read().split()  # acknowledged before the signal arrived
        process.stdout.close()
        assert process.wait() == -signal.SIGKILL
        acknowledged[f"life{life}"] = max((int(line) for line in lines if line != "open"), default=-1)
    assert sum(acknowledged.values()) > 20
    with Store.open(path, identity={"space": "s"}) as store:
        rows = {r.key: r for r in store.rows()}
        check_whole(list(rows.values()))
        for name, last in acknowledged.items():
            assert all(rows[f"{name}-{batch}-{i}"].rung == 1 for batch in range(last + 1) for i in range(BATCH))
            saved = store.search(name)
            assert (saved.generation if saved else -1) in (last, last + 1)
            assert saved is None or saved.state == {"batch": saved.generation}


def test_processes_that_open_and_write_at_once_lose_nothing(path: Path) -> None:
    processes = [writer(path, f"writer{i}", 50, 5) for i in range(4)]
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
        assert {r.key for r in store.rows() if r.rung == 1} == {
            f"writer{w}-{b}-{i}" for w in range(4) for b in range(50) for i in range(5)
        }


def test_processes_that_promote_the_same_children_leave_the_highest_rung_of_each(path: Path) -> None:
    processes = [subprocess.Popen([sys.executable, "-c", PROMOTER, str(path), name, "200", "9"], cwd=ROOT, text=True,
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE) for name in ("one", "two")]  # fmt: skip
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    written = sum(int(process.communicate()[0]) for process in processes)
    with Store.open(path, identity={"space": "s"}) as store:
        rows = store.rows()
    assert sorted(r.key for r in rows) == sorted(f"child{i}" for i in range(20))
    assert {(r.rung, r.stage, r.samples, r.images, r.score) for r in rows} == {(8, "8", bytes([8]) * 900, 256, 1.0)}
    assert 20 < written <= 20 * 9  # each write was the first or a step up


def check_whole(rows: list[Row], size: int = BATCH) -> None:
    """Every row is as the writer made it, and of every batch all rows are there, at one rung."""
    batches: dict[str, list[int]] = {}
    for r in rows:
        assert r.samples == hashlib.sha256(f"{r.key} {r.rung}".encode()).digest() * 40
        assert (r.arch, r.stage, r.score, r.images, r.costs) == ("{}", "coarse", 0.5, 10, {"macs": 1.0})
        batches.setdefault(r.key.rsplit("-", 1)[0], []).append(r.rung)
    assert all(rungs in ([0] * size, [1] * size) for rungs in batches.values())


# --- a place that does not take it ---


def test_a_file_that_another_process_holds_is_told_after_the_wait(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(path)
    monkeypatch.setattr("search.store.BUSY_TIMEOUT_MS", 20)
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with Store.open(path, identity=IDENTITY) as store:
        assert len(store.rows()) == 400  # it may be read all the same
        with pytest.raises(InputError, match=r"database is locked.*no other program holds it"):
            store.add([row("new")])
        with pytest.raises(InputError, match="database is locked"):
            store.save_search("s", 0, {}, [])
        holder.execute("COMMIT")
        holder.close()
        assert store.add([row("new")]) == 1


def test_a_reader_sees_whole_transactions_while_another_writes(path: Path) -> None:
    process = writer(path, "w", 200)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    assert process.stdout.readline() == "open\n"
    counts = []
    with Store.existing(path) as store:
        while process.poll() is None:
            rows = store.rows()
            check_whole(rows)
            counts.append(len(rows))
    process.stdout.close()
    assert process.returncode == 0
    assert counts == sorted(counts)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of 2 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)], capture_output=True, check=False
    ).returncode:  # fmt: skip
        pytest.skip("needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_told_loses_nothing_and_ends_with_room(small_disk: Path) -> None:
    path, ballast, done = small_disk / "search.sqlite", small_disk / "ballast", 0
    ballast.write_bytes(bytes(600_000))

    def batch(number: int) -> list[Row]:
        return [row(f"{number}-{i}", samples=bytes([number % 256]) * 5000) for i in range(10)]

    with Store.open(path, identity=IDENTITY) as store:
        with pytest.raises(InputError, match=r"\(database or disk is full\): .*disk has room"):
            for number in range(10**6):
                store.add(batch(number))
                done = number + 1
        assert done > 3
        with pytest.raises(InputError, match="disk is full"):
            store.save_search("s", 0, {"long": "x" * 100_000}, [])
        before = [each for number in range(done) for each in batch(number)]
        assert store.rows() == before
        assert store.search("s") is None
    ballast.unlink()
    with Store.open(path, identity=IDENTITY) as store:
        assert store.add(batch(done)) == 10
        assert store.rows() == before + batch(done)


def test_a_name_with_special_characters_is_a_name(tmp_path: Path) -> None:
    path = tmp_path / "50% of #1? é.sqlite"
    with Store.open(path, identity=IDENTITY) as store:
        store.add([row()])
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    with Store.existing(path) as store:
        assert store.rows() == [row()]


def test_no_store_is_made_on_a_full_disk(small_disk: Path) -> None:
    with contextlib.suppress(OSError):
        (small_disk / "ballast").write_bytes(bytes(3_000_000))
    with pytest.raises(InputError, match="disk"):
        Store.open(small_disk / "search.sqlite", identity=IDENTITY)
    assert [file.name for file in small_disk.iterdir()] == ["ballast"]


def test_a_store_on_a_read_only_disk_is_read_and_refuses_to_be_written(small_disk: Path) -> None:
    path = small_disk / "search.sqlite"
    with Store.open(path, identity=IDENTITY) as store:
        store.add([row()])
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for opened in (lambda: Store.existing(path), lambda: Store.open(path, identity=IDENTITY)):
        with opened() as store:
            assert store.rows() == [row()]
            with pytest.raises(InputError, match="may be written"):
                store.add([row("b")])
    with pytest.raises(InputError, match="a search file cannot be made here"):
        Store.open(small_disk / "new.sqlite", identity=IDENTITY)


def test_a_log_on_a_read_only_disk_is_not_overlooked(small_disk: Path, tmp_path: Path) -> None:
    path = small_disk / "search.sqlite"
    copy = tmp_path / "copy.sqlite"
    for name, content in zip((copy, log_of(copy)), killed_with_a_log(path), strict=True):
        name.write_bytes(content)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with Store.existing(path) as store, Store.existing(copy) as whole:
        assert store.rows() == whole.rows() != []
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    path.with_name(path.name + "-shm").unlink()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(InputError, match="SQLite cannot use this file"):
        Store.existing(path)


def test_a_closed_store_is_one_plain_file_and_is_not_used_again(path: Path) -> None:
    store = Store.open(path, identity=IDENTITY)
    store.add([row()])
    store.close()
    store.close()
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    with pytest.raises(sqlite3.ProgrammingError):
        store.rows()
