"""A search for quantised children: what candidates are scored by, and what finalists are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from deploy import int8
from deploy.export import to_onnx
from deploy.formats import session
from deploy.gate import Images
from deploy.simulate import Simulation
from deploy.targets import Local
from search.commands import targets_of
from search.evaluate import SharedEvaluator
from search.found import Found
from search.loop import Asked, search, smallest_latency_ms, steps_of
from search.rungs import Rung
from search.settings import SearchConfig
from search.store import Store, latest_store, store_path
from supernet.errors import InputError
from supernet.run import Run
from tests.conftest import FakeTarget

SETTINGS = SearchConfig(strategy="coarse_to_fine", options={"coarse": 6, "parents": 2}, evaluations=8, random=2, polish=2, batch=3,
                        finalists=2, profile_children=8, zones=1, precision="int8")  # fmt: skip


def alone(run: Run, arch: Any, calibration: int) -> np.ndarray:
    """Scores of a child's own network, rounded by the ranges of the calibration images."""
    evaluator = replace(run.evaluator("cpu"), calibration_images=calibration)
    network, resolution = evaluator.calibrated(arch), run.space.resolution(arch)
    simulation, split = Simulation(network), run.dataset.split("search_val")
    pixels = evaluator.train.pixels(resolution, calibration)
    with torch.no_grad(), simulation.observing():
        network(evaluator.prepared(torch.from_numpy(pixels)))
    with simulation.rounding():
        return evaluator.scores(network, resolution, split)


def test_candidates_are_scored_as_each_alone_would_be_when_it_is_rounded(tiny_run: Run) -> None:
    rng = np.random.default_rng(0)
    archs = [tiny_run.space.smallest, tiny_run.space.largest, *(tiny_run.space.sample(rng) for _ in range(3))]
    split = tiny_run.dataset.split("search_val")
    rounds = [Rung(16, 64, "int8"), Rung(len(split), 64, "int8")]
    shared = SharedEvaluator(tiny_run.evaluator("cpu"), split, rounds)
    plain = SharedEvaluator(tiny_run.evaluator("cpu"), split, [replace(rung, precision="fp32") for rung in rounds])
    parts = [shared.advance(archs, rung) for rung in (0, 1)]
    exact = [plain.advance(archs, rung) for rung in (0, 1)]
    assert not shared.failed
    for arch in archs:
        rank = np.concatenate([part[arch]["rank"] for part in parts])
        expected = alone(tiny_run, arch, 64)
        assert (rank == 0).mean() == pytest.approx(expected.mean(), abs=1.01 / len(split))
        losses = [np.concatenate([part[arch]["loss"] for part in each]).astype(float) for each in (parts, exact)]
        assert 0 < np.abs(losses[0] - losses[1]).max() < 2  # rounding changes a little


def test_nothing_of_int8_stays_with_the_weights(tiny_run: Run) -> None:
    evaluator, split = tiny_run.evaluator("cpu"), tiny_run.dataset.split("search_val")
    arch = tiny_run.space.largest
    before = SharedEvaluator(evaluator, split, [Rung(16, 64)]).advance([arch], 0)
    SharedEvaluator(evaluator, split, [Rung(16, 64, "int8")]).advance([arch], 0)
    after = SharedEvaluator(evaluator, split, [Rung(16, 64)]).advance([arch], 0)
    np.testing.assert_array_equal(before[arch]["loss"], after[arch]["loss"])


def test_the_simulation_is_near_what_onnx_runtime_computes(tiny_run: Run) -> None:
    """Its error is of the size of the error of ONNX Runtime's quantisation of weighted layers, and mostly the same error."""
    evaluator, arch = tiny_run.evaluator("cpu"), tiny_run.space.largest
    network, resolution = evaluator.calibrated(arch), tiny_run.space.resolution(arch)
    model = to_onnx(network, channels=tiny_run.space.family.in_channels, resolution=resolution)
    batches = int8.calibration_batches(evaluator.train, resolution)
    small = int8.Quantiser(model, batches, "s8s8")(int8.Attempt("weighted"))
    images = Images(tiny_run.dataset.split("confirm"), resolution, tiny_run.task)
    exact, found = (images.outcome(session(each.SerializeToString())).outputs for each in (model, small))
    simulation = Simulation(network)
    with torch.no_grad(), simulation.observing():
        for batch in batches:
            network(torch.from_numpy(batch))
    with torch.no_grad(), simulation.rounding():
        simulated = images.outcome(lambda inputs: network(torch.from_numpy(inputs)).numpy()).outputs
    assert 0.3 < np.abs(simulated - exact).mean() / np.abs(found - exact).mean() < 3
    assert (simulated.argmax(1) == found.argmax(1)).mean() > 0.9


@pytest.mark.slow
def test_a_search_for_int8_keeps_its_own_file_and_confirms_what_is_quantised(searched_copy: Run) -> None:
    before = store_path(searched_copy.path).read_bytes()
    targets = {None: FakeTarget(precision="int8", milliseconds=nodes_of)}
    found = search(searched_copy, Asked((), settings=SETTINGS, targets=targets))
    assert found.precision == Found.load(searched_copy).precision == "int8"
    assert latest_store(searched_copy.path) == store_path(searched_copy.path, "int8")
    assert store_path(searched_copy.path).read_bytes() == before
    with Store.existing(latest_store(searched_copy.path)) as store:
        assert "precision" in store.identity["evaluation"]
        assert len(store.confirmed()) >= 2
    arch, evaluator = found.best.arch, searched_copy.evaluator("cpu")
    resolution = searched_copy.space.resolution(arch)
    model = to_onnx(evaluator.calibrated(arch), channels=searched_copy.space.family.in_channels, resolution=resolution)
    small = int8.Quantiser(model, int8.calibration_batches(evaluator.train, resolution), int8.recipe_here())(int8.Attempt())
    images = Images(searched_copy.dataset.split("confirm"), resolution, searched_copy.task)
    scores = images.outcome(session(small.SerializeToString())).scores
    assert found.best.confirm_score == pytest.approx(scores.mean())
    assert found.best.latency is not None
    assert found.best.latency.latency_ms == pytest.approx(nodes_of(small))


def nodes_of(model: onnx.ModelProto) -> float:
    """A latency that only a quantised graph has."""
    return 0.01 * len(model.graph.node)


def test_a_target_of_another_precision_is_refused(tiny_run: Run) -> None:
    with pytest.raises(InputError, match=r"the search is for int8 children, but fake times others"):
        search(tiny_run, Asked((), settings=SETTINGS, targets={None: FakeTarget()}))
    assert {target.precision for target in targets_of(["a=local:2"], 1, "int8").values()} == {"int8"}
    assert Asked().targets == {None: Local()}
    with pytest.raises(InputError, match="local:threads=1 times others"):
        search(tiny_run, Asked((), settings=SETTINGS, targets={None: Local(precision="int8"), "a": Local()}))


def test_the_least_latency_is_that_of_the_quantised_smallest_child(tiny_run: Run) -> None:
    found = smallest_latency_ms(tiny_run.space, FakeTarget(precision="int8", milliseconds=nodes_of))
    assert found > 1.5 * smallest_latency_ms(tiny_run.space, FakeTarget(milliseconds=nodes_of))


def test_rungs_carry_the_precision(tiny_run: Run) -> None:
    assert {rung.precision for rung in steps_of(tiny_run, SETTINGS)} == {"int8"}
    assert {rung.precision for rung in steps_of(tiny_run, SearchConfig())} == {"fp32"}
