"""Evaluation on Ray's actors against evaluation here: the same results, whoever is killed meanwhile; and what is refused."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from search.actor import Holder, Order, opened, packed, shared
from search.cluster import INSTALL, TRIES, RayEvaluator, Workers
from search.evaluate import SharedEvaluator, Spent
from search.rungs import Rung
from supernet.arch import Arch
from supernet.errors import InputError
from supernet.run import Run
from supernet.samples import Samples, unpack

ROOT = Path(__file__).parents[2]
RUNGS = (Rung(16, 16), Rung(24, 32))
TWO = Workers(actors=2)


def archs_of(run: Run, count: int = 9) -> list[Arch]:
    rng = np.random.default_rng(0)
    return list(dict.fromkeys([run.space.smallest, run.space.largest, *(run.space.sample(rng) for _ in range(count))]))


def alone(run: Run) -> SharedEvaluator:
    return SharedEvaluator(run.evaluator(), run.dataset.split("search_val"), RUNGS)


def assert_same(found: Mapping[Arch, Samples], wanted: Mapping[Arch, Samples]) -> None:
    assert list(found) == list(wanted)
    for arch, samples in wanted.items():
        assert found[arch].keys() == samples.keys()
        for name, column in samples.items():
            assert found[arch][name].dtype == column.dtype
            if column.dtype.kind == "f":
                np.testing.assert_allclose(found[arch][name], column, rtol=2e-2, atol=2e-3)  # float16
            else:
                np.testing.assert_array_equal(found[arch][name], column)


def order(run: Run, **changes: Any) -> Order:
    return replace(Order(run.path, run.weights_hash, "search_val", RUNGS, "cpu", 1, shared, packed(run)), **changes)


def disturbed(folder: Path, kind: str, key: str = "") -> Any:
    """What actors evaluate with: as `shared`, but a child `key` is trouble, or the first chunk of several ends its worker.

    A function within a function, so that Ray sends it by value.
    """

    def build(run: Run, split: str, rungs: Sequence[Rung], device: str) -> Any:
        from search.actor import shared

        evaluator = shared(run, split, rungs, device)

        class Disturbed:
            @property
            def spent(self) -> Spent:
                return evaluator.spent

            @property
            def failed(self) -> Mapping[Arch, str]:
                return evaluator.failed

            def advance(self, archs: Sequence[Arch], rung: int) -> Mapping[Arch, Samples]:
                with (folder / "log.jsonl").open("a") as log:
                    log.write(json.dumps([os.getpid(), [arch.key for arch in archs]]) + "\n")
                if kind == "killed once" and len(archs) > 1 and rung == 1:
                    evaluator.advance(archs[:1], rung)
                    try:
                        (folder / "armed").rename(folder / "fired")
                    except FileNotFoundError:
                        pass
                    else:
                        os.kill(os.getpid(), signal.SIGKILL)
                if kind == "kills" and key in {arch.key for arch in archs}:
                    os.kill(os.getpid(), signal.SIGKILL)
                if kind == "raises" and key in {arch.key for arch in archs}:
                    raise FloatingPointError("overflow")
                if kind == "cannot read":
                    raise OSError("no such image")
                return evaluator.advance(archs, rung)

        return Disturbed()

    return build


@pytest.mark.parametrize(("text", "wanted"), [
    ("ray", Workers()), ("ray:4", Workers(None, 4)), ("ray://head:10001", Workers("ray://head:10001")),
    ("ray://[::1]:10001/64", Workers("ray://[::1]:10001", 64)),
])  # fmt: skip
def test_workers_are_read(text: str, wanted: Workers) -> None:
    assert Workers.parse(text) == wanted


@pytest.mark.parametrize("text", ["", "4", "dask", "ray:", "ray:0", "ray:-1", "ray:two", "ray://", "ray://head", "ray://head:x", "ray://h:1/0",
                                  "ray://h:1/", "Ray", "ray\n", "ray:9999999"])  # fmt: skip
def test_other_texts_are_refused_in_a_line(text: str) -> None:
    with pytest.raises(InputError) as error:
        Workers.parse(text)
    assert "\n" not in str(error.value).replace("\\n", "")
    assert "--workers" in str(error.value)


def test_without_ray_the_line_to_install_it_is_given(tiny_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match="pip install") as error:
        RayEvaluator(tiny_run, "search_val", RUNGS)
    assert str(error.value) == INSTALL


def test_a_machine_without_the_run_gets_it_from_the_object_store(tiny_run: Run, tmp_path: Path) -> None:
    there = opened(order(tiny_run, path=tmp_path / "elsewhere"))
    here = tiny_run.supernet().state_dict()
    assert all((value == here[name]).all() for name, value in there.supernet().state_dict().items())
    assert there.weights_hash == tiny_run.weights_hash
    holder = Holder(order(tiny_run, path=tmp_path / "elsewhere"))
    assert holder.open() == ""
    arch = tiny_run.space.largest
    found = unpack(holder.advance({3: arch.as_dict()}, 0).packed[3], RUNGS[0].images, tiny_run.task.columns)
    assert_same({arch: found}, alone(tiny_run).advance([arch], 0))


def test_a_machine_with_other_weights_or_damaged_ones_says_so(tiny_run: Run, tmp_path: Path) -> None:
    assert "copy the run there anew" in Holder(order(tiny_run, weights_hash="0" * 64)).open()
    files = {**packed(tiny_run), "weights": b"other"}
    assert "are damaged" in Holder(order(tiny_run, path=tmp_path / "elsewhere", files=files)).open()


def test_a_run_whose_weights_changed_is_not_packed(run_copy: Run) -> None:
    _ = run_copy.weights_hash
    for file in run_copy.checkpoints.glob("*/*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1] + b"\1")
    with pytest.raises(InputError):
        packed(run_copy)


@pytest.mark.nightly
def test_two_actors_find_what_one_process_finds_and_leave_nothing_behind(
    tiny_run: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import ray

    monkeypatch.chdir(ROOT)
    archs, here, before = archs_of(tiny_run), alone(tiny_run), signal.getsignal(signal.SIGTERM)
    with RayEvaluator(tiny_run, "search_val", RUNGS, TWO) as there:
        assert_same(there.advance(archs, 0), here.advance(archs, 0))
        assert_same(there.advance(archs[::-2], 1), here.advance(archs[::-2], 1))
        assert there.advance([], 0) == {}
        assert there.spent.image_forwards == here.spent.image_forwards
        assert there.spent.macs >= here.spent.macs  # fewer neighbours share
        assert there.failed == {}
        assert there.busy_s > 0
        assert ray.cluster_resources()["CPU"] == 2
        assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert not ray.is_initialized()
    assert signal.getsignal(signal.SIGTERM) == before
    assert capfd.readouterr() == ("", "")
    with pytest.raises(InputError, match="search again"):
        there.advance(archs, 0)


@pytest.mark.slow
def test_an_actor_is_killed_in_mid_generation_and_nothing_is_lost_or_doubled(
    tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / "armed").touch()
    archs, here, said = archs_of(tiny_run), alone(tiny_run), list[str]()
    build = disturbed(tmp_path, "killed once")
    with RayEvaluator(tiny_run, "search_val", RUNGS, TWO, build=build, told=said.append) as there:
        assert_same(there.advance(archs, 0), here.advance(archs, 0))
        assert_same(there.advance(archs, 1), here.advance(archs, 1))
        assert_same(there.advance(archs[:3], 1), here.advance(archs[:3], 1))
        assert there.failed == {}
    assert (tmp_path / "fired").exists()
    assert len(said) == 1
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param("kills", marks=pytest.mark.nightly), "raises"])
def test_a_child_that_cannot_be_evaluated_fails_alone(
    tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(ROOT)
    archs = archs_of(tiny_run)
    bad = archs[4]
    with RayEvaluator(tiny_run, "search_val", RUNGS, TWO, build=disturbed(tmp_path, kind, bad.key)) as there:
        found = there.advance(archs, 0)
    wanted = alone(tiny_run).advance([arch for arch in archs if arch != bad], 0)
    assert_same(found, wanted)
    assert there.failed.keys() == {bad}
    assert there.failed[bad] == {
        "kills": f"{TRIES} workers ended while they evaluated it", "raises": "FloatingPointError: overflow"
    }[kind]  # fmt: skip
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    met = [pid for pid, keys in log if bad.key in keys]
    assert len(met) == (TRIES if kind == "kills" else 2)
    assert len(set(met)) == (TRIES if kind == "kills" else 1)  # of two actors: others took the place of the killed ones


@pytest.mark.slow
def test_what_is_wrong_with_all_children_is_told_at_once_and_the_actors_end(
    tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.chdir(ROOT)
    there = RayEvaluator(tiny_run, "search_val", RUNGS, TWO, build=disturbed(tmp_path, "cannot read"))
    with pytest.raises(InputError, match="no such image"):
        there.advance(archs_of(tiny_run), 0)
    assert not ray.is_initialized()


@pytest.mark.slow
def test_a_cluster_that_does_not_answer_is_told_in_a_line(tiny_run: Run) -> None:
    with pytest.raises(InputError, match=r"no Ray cluster answers at ray://127\.0\.0\.1:9") as error:
        RayEvaluator(tiny_run, "search_val", RUNGS, Workers("ray://127.0.0.1:9"))
    assert "\n" not in str(error.value)
