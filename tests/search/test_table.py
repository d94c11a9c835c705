"""The children of a search as rows: what they hold, which are chosen, and files that come back as they were."""

from __future__ import annotations

import csv
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from search.budget import parse_all
from search.objective import OBJECTIVES
from search.records import Confirmed, Measurement, Row
from search.store import Store
from search.table import best_by_zone, children, chosen, export, for_terminal, scored
from supernet.errors import InputError
from supernet.samples import pack
from supernet.task import Classification

TASK = Classification()


def samples_of(images: int, seed: int) -> dict[str, Any]:
    noise = np.random.default_rng(seed)
    return {name: noise.integers(0, 3, images).astype(dtype) for name, dtype in TASK.columns.items()}


def row(key: str, score: float, macs: float, rung: int = 2, stage: str = "fine", **arch: object) -> Row:
    return Row(
        key, json.dumps({"depth": 2, "kind": "conv", **arch}, sort_keys=True), stage, rung,
        pack(samples_of(8 * 2**rung, int(key, 16)), TASK.columns), 8 * 2**rung, score, {"macs": macs, "params": macs / 4}, 10 * macs,
        0.5, f"2026-01-0{rung + 1}",
    )  # fmt: skip


ROWS = [
    row("a0", 0.7, 4e6),
    row("b1", 0.8, 9e6, kind="=1+1"),
    row("c2", 0.95, 8e6, rung=0, stage="coarse"),  # lucky on few images
    row("d3", 0.7, 2e6, depth=3),
    row("e4", 0.5, 1e6),
    row("f5", 0.6, 3e6, rung=1, stage="coarse"),
]


@pytest.fixture
def store(tmp_path: Path) -> Any:
    with Store.open(tmp_path / "search.sqlite", identity={}) as store:
        store.add(ROWS)
        store.add_confirmed([Confirmed("b1", b"", 0.75, 40), Confirmed("d3", b"", 0.72, 40)])
        store.add_measurements(
            [
                Measurement("b1", "local:threads=1:12ab", 3.0, 2.5, 3.5, {}),
                Measurement("d3", "local:threads=1:12ab", 2.0, 1.5, 2.5, {}),
                Measurement("d3", "pi4:77", 20.0, 19.0, 21.0, {}),
            ]
        )
        yield store


@pytest.fixture
def table(store: Store) -> list[dict[str, Any]]:
    return children(store)


def keys(rows: list[dict[str, Any]]) -> list[str]:
    return [child["key"] for child in rows]


# --- rows ---


def test_a_row_tells_all_that_the_store_knows_of_a_child(table: list[dict[str, Any]]) -> None:
    assert keys(table) == [each.key for each in ROWS]
    assert table[3] == {
        "key": "d3", "stage": "fine", "rung": 2, "score": 0.7, "images": 32, "confirm_score": 0.72, "confirm_images": 40,
        "macs": 2e6, "params": 5e5,
        "latency_ms@local:threads=1:12ab": 2.0, "latency_ms_low@local:threads=1:12ab": 1.5, "latency_ms_high@local:threads=1:12ab": 2.5,
        "latency_ms@pi4:77": 20.0, "latency_ms_low@pi4:77": 19.0, "latency_ms_high@pi4:77": 21.0,
        "macs_spent": 2e7, "seconds": 0.5, "created": "2026-01-03", "arch.depth": 3, "arch.kind": "conv",
    }  # fmt: skip


def test_every_row_has_the_same_columns_and_none_where_nothing_is_known(store: Store) -> None:
    store.add([Row("ff", '{"width":1.5}', "later", 0, b"", 1, 0.1, {"peak_memory_bytes": 7.0}, 1.0, 0.1)])
    table = children(store)
    assert len({tuple(child) for child in table}) == 1
    assert (table[0]["arch.width"], table[-1]["arch.width"], table[-1]["arch.depth"]) == (None, 1.5, None)
    assert (table[0]["peak_memory_bytes"], table[-1]["peak_memory_bytes"], table[-1]["macs"]) == (None, 7.0, None)
    assert (table[0]["confirm_score"], table[0]["latency_ms@pi4:77"]) == (None, None)


def test_an_empty_store_is_an_empty_table(tmp_path: Path) -> None:
    with Store.open(tmp_path / "new.sqlite", identity={}) as store:
        assert children(store) == chosen([]) == best_by_zone([]) == for_terminal([], str) == []


def test_samples_come_only_when_asked_for_and_image_by_image(store: Store) -> None:
    assert not any(name.startswith("samples.") for name in children(store)[0])
    for child, row in zip(children(store, TASK.columns), ROWS, strict=True):
        for name, values in samples_of(row.images, int(row.key, 16)).items():
            assert child[f"samples.{name}"].shape == (row.images,)
            assert (child[f"samples.{name}"] == values).all()


def test_another_objective_is_a_column_of_its_own(store: Store) -> None:
    table = children(store, TASK.columns)
    labels = np.arange(max(child["images"] for child in table)) % 3
    found = scored(table, OBJECTIVES["balanced_accuracy"], labels, 3)
    for child, row_ in zip(table, found, strict=True):
        right = (child["samples.rank"] == 0).astype(float)
        here = labels[: child["images"]]
        recalls = [right[here == label].mean() for label in np.unique(here)]
        assert row_["balanced_accuracy"] == pytest.approx(np.mean(recalls))
        assert row_["score"] == child["score"] and not any(name.startswith("samples.") for name in row_)
    assert "samples.rank" in scored(table, OBJECTIVES["balanced_accuracy"], labels, 3, keep=True)[0]
    assert for_terminal(found, "{:.1%}".format)[0]["balanced_accuracy"] == f"{found[0]['balanced_accuracy']:.2%}"


@pytest.mark.parametrize("change", ["samples = x'00'", "samples = substr(samples, 1, 5)", "images = 7"])
def test_damaged_samples_are_told(store: Store, change: str) -> None:
    store._connection.execute(f"UPDATE children SET {change} WHERE key = 'd3'")
    assert len(children(store)) == 6
    with pytest.raises(InputError, match="the samples of d3 are damaged"):
        children(store, TASK.columns)


@pytest.mark.parametrize("arch", ["", "{", "[1]", "null"])
def test_a_damaged_arch_is_told(store: Store, arch: str) -> None:
    store._connection.execute("UPDATE children SET arch = ? WHERE key = 'd3'", (arch,))
    with pytest.raises(InputError, match="the arch of d3 is damaged"):
        children(store)


# --- choosing ---


def test_the_best_come_first_and_those_of_few_images_behind(table: list[dict[str, Any]]) -> None:
    assert keys(chosen(table)) == ["b1", "a0", "d3", "e4", "f5", "c2"]
    assert keys(chosen(table, limit=2)) == ["b1", "a0"]
    assert keys(chosen(table, limit=0)) == []


@pytest.mark.parametrize(
    ("column", "order"),
    [
        ("macs", ["e4", "d3", "f5", "a0", "c2", "b1"]),
        ("created", ["c2", "f5", "a0", "b1", "d3", "e4"]),
        ("confirm_score", ["b1", "d3", "a0", "c2", "e4", "f5"]),
        ("latency_ms@local:threads=1:12ab", ["d3", "b1", "a0", "c2", "e4", "f5"]),
        ("arch.kind", ["b1", "a0", "c2", "d3", "e4", "f5"]),
    ],
)
def test_other_columns_sort_upwards_with_what_is_not_known_last(
    table: list[dict[str, Any]], column: str, order: list[str]
) -> None:
    assert keys(chosen(table, sort=column)) == order


def test_choices_of_several_kinds_sort_all_the_same(store: Store) -> None:
    store.add([row("aa", 0.1, 1.0, depth="none"), row("ab", 0.1, 1.0, depth="")])
    assert keys(chosen(children(store), sort="arch.depth"))[0] == "ab"


def test_a_stage_and_budgets_leave_out_the_others(table: list[dict[str, Any]]) -> None:
    assert keys(chosen(table, stage="coarse")) == ["f5", "c2"]
    assert keys(chosen(table, budgets=parse_all(["macs<=4M"]))) == ["a0", "d3", "e4", "f5"]
    assert keys(chosen(table, budgets=parse_all(["macs<=4M", "params<=0.5M"]), stage="fine")) == ["d3", "e4"]


def test_a_latency_counts_with_its_measured_upper_end_on_every_target(table: list[dict[str, Any]]) -> None:
    for child in table:
        del child["latency_ms_high@pi4:77"]
    assert keys(chosen(table, budgets=parse_all(["latency_ms<=3.5"]))) == ["b1", "d3"]
    assert keys(chosen(table, budgets=parse_all(["latency_ms<=3.4"]))) == ["d3"]
    for child in table:
        child["latency_ms_high@pi4:77"] = 21.0 if child["key"] == "d3" else None
    assert keys(chosen(table, budgets=parse_all(["latency_ms<=20"]))) == []
    assert keys(chosen(table, budgets=parse_all(["latency_ms<=21"]))) == ["d3"]


def test_a_budget_may_name_a_target_and_be_a_lower_bound(table: list[dict[str, Any]]) -> None:
    assert keys(chosen(table, budgets=parse_all(["latency_ms@pi4<=21"]))) == ["d3"]
    assert keys(chosen(table, budgets=parse_all(["latency_ms@local<=3.5"]))) == ["b1", "d3"]
    assert keys(chosen(table, budgets=parse_all(["latency_ms@local>=2"]))) == ["b1"]
    assert keys(chosen(table, budgets=parse_all(["macs>=8M", "macs<=8M"]))) == ["c2"]
    with pytest.raises(InputError, match="latency_ms@watch<=1 is not known"):
        chosen(table, budgets=parse_all(["latency_ms@watch<=1"]))


def test_what_no_child_has_is_an_error_that_says_what_there_is(table: list[dict[str, Any]]) -> None:
    with pytest.raises(InputError, match="--stage must be one of coarse, fine, but got 'polish'"):
        chosen(table, stage="polish")
    with pytest.raises(InputError, match=r"--sort must be one of key, stage, .*, but got 'flops'"):
        chosen(table, sort="flops")
    with pytest.raises(InputError, match="the cost in peak_memory_bytes<=1 is not known"):
        chosen(table, budgets=parse_all(["peak_memory_bytes<=1"]))
    with pytest.raises(InputError, match="--cost must be a column"):
        best_by_zone(table, "flops")
    with pytest.raises(InputError, match="--cost must be a positive number"):
        best_by_zone(table, "stage")


def test_each_zone_gives_its_best_child_and_marks_the_front(table: list[dict[str, Any]]) -> None:
    """Of the highest rung: e4 (1e6, 0.5), d3 (2e6, 0.7), a0 (4e6, 0.7), b1 (9e6, 0.8); zones of a factor of three."""
    assert [(child["key"], child["front"]) for child in best_by_zone(table, zones=2)] == [("d3", True), ("b1", True)]
    assert [(child["key"], child["front"]) for child in best_by_zone(table, zones=1)] == [("b1", True)]
    found = best_by_zone(table, zones=100)
    assert [(child["key"], child["front"]) for child in found] == [("e4", True), ("d3", True), ("a0", False), ("b1", True)]
    assert [child["key"] for child in best_by_zone(table, "latency_ms@local:threads=1:12ab")] == ["d3", "b1"]


def test_children_of_one_cost_are_one_zone(table: list[dict[str, Any]]) -> None:
    same = [{**child, "macs": 5.0} for child in table]
    assert keys(best_by_zone(same)) == ["b1"]


def test_the_terminal_shows_text_for_what_is_missing(table: list[dict[str, Any]]) -> None:
    shown = for_terminal(best_by_zone(table, zones=100), TASK.show)
    assert shown[0] == {"front": "*", "key": "e4", "score": "50.00%", "images": 32, "confirm": "-", "macs": 1_000_000,
                        "params": 250_000, "ms on local:threads=1": "-", "ms on pi4": "-", "stage": "fine", "rung": 2}  # fmt: skip
    assert (shown[1]["confirm"], shown[1]["ms on local:threads=1"], shown[2]["front"]) == ("72.00%", "2", "")
    assert "front" not in for_terminal(table, TASK.show)[0]


# --- files ---


def test_csv_comes_back_row_by_row(table: list[dict[str, Any]], tmp_path: Path) -> None:
    out = export(table, tmp_path / "children.csv")
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [list(each) for each in rows] == [list(child) for child in table]
    for back, child in zip(rows, table, strict=True):
        for name, value in child.items():
            expected = "" if value is None else f"'{value}" if value == "=1+1" else str(value)
            assert back[name] == expected
            assert value is None or isinstance(value, str) or float(back[name]) == value


@pytest.mark.parametrize("text", ["=cmd|' /C calc'!A0", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1"])
def test_no_cell_of_csv_is_a_formula(tmp_path: Path, text: str) -> None:
    out = export([{"key": "a", "number": -1.5, text: text}], tmp_path / "children.csv")
    with out.open(newline="") as file:
        header, cells = list(csv.reader(file))
    assert header == ["key", "number", f"'{text}"]
    assert cells == ["a", "-1.5", f"'{text}"]


def test_json_comes_back_equal(store: Store, table: list[dict[str, Any]], tmp_path: Path) -> None:
    assert json.loads(export(table, tmp_path / "a.json").read_text()) == table
    whole = children(store, TASK.columns)
    back = json.loads(export(whole, tmp_path / "b.json").read_text())
    assert back == [
        {name: v.tolist() if isinstance(v, np.ndarray) else v for name, v in child.items()} for child in whole
    ]  # fmt: skip


def test_parquet_comes_back_equal_with_types(store: Store, table: list[dict[str, Any]], tmp_path: Path) -> None:
    back = pq.read_table(export(table, tmp_path / "a.parquet"))
    assert back.to_pylist() == table
    assert (back.schema.field("arch.depth").type, back.schema.field("score").type) == (pa.int64(), pa.float64())
    whole = children(store, TASK.columns)
    back = pq.read_table(export(whole, tmp_path / "b.parquet"))
    assert back.schema.field("samples.rank").type == pa.list_(pa.uint16())
    assert back.schema.field("samples.loss").type == pa.list_(pa.float16())
    for read, child in zip(back.to_pylist(), whole, strict=True):
        assert read["samples.loss"] == child["samples.loss"].tolist()


def test_parquet_takes_choices_of_several_kinds(store: Store, tmp_path: Path) -> None:
    store.add([row("aa", 0.1, 1.0, depth="none", kind=True), row("ab", 0.1, 1.0, depth=1.5, kind="x")])
    back = pq.read_table(export(children(store), tmp_path / "a.parquet")).to_pylist()
    assert [child["arch.depth"] for child in back[-3:]] == ["2", '"none"', "1.5"]
    assert [child["arch.kind"] for child in back[-2:]] == ["true", '"x"']


@pytest.mark.parametrize("suffix", [".csv", ".json", ".parquet"])
def test_no_children_are_a_file_too(tmp_path: Path, suffix: str) -> None:
    out = export([], tmp_path / f"none{suffix}")
    if suffix == ".parquet":
        assert pq.read_table(out).num_rows == 0
    else:
        assert out.read_text().split() == ([] if suffix == ".csv" else ["[", "]"])


def test_mistakes_leave_the_old_file(
    store: Store, table: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.csv", "a.json", "a.parquet", "a.xlsx", "a"):
        (tmp_path / name).write_text("old")
    whole = children(store, TASK.columns)
    with pytest.raises(InputError, match=r"--out must end with one of \.csv, \.parquet, \.json, but got 'a\.xlsx'"):
        export(table, tmp_path / "a.xlsx")
    with pytest.raises(InputError, match="--out must end with one of"):
        export(table, tmp_path / "a")
    with pytest.raises(InputError, match="does not fit into CSV"):
        export(whole, tmp_path / "a.csv")
    with pytest.raises(InputError, match="score of a0 is -inf, which JSON does not know"):
        export([{**table[0], "score": -math.inf}], tmp_path / "a.json")
    with pytest.raises(InputError, match="a sample is no finite number"):
        export([{**table[0], "samples.loss": np.array([1.0, math.nan])}], tmp_path / "a.json")
    with pytest.raises(InputError, match="cannot be written"):
        export(table, tmp_path / "nowhere" / "a.csv")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"not installed: pip install 'nestling\[data\]'"):
        export(table, tmp_path / "a.parquet")
    assert {file.read_text() for file in tmp_path.glob("a*")} == {"old"}
    assert len(list(tmp_path.glob(".*"))) == 0
