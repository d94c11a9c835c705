"""On the digits all children tie. Here they do not: Fashion-MNIST, until smallest and largest differ, and the search must tell."""

from __future__ import annotations

from pathlib import Path

import pytest

import nestling
from supernet.costs import arch_costs
from tests.real_data import fashion_npz


@pytest.mark.nightly
def test_the_search_tells_children_apart_where_they_really_differ(tmp_path: Path) -> None:
    data = fashion_npz(tmp_path / "fashion.npz", train=8000, test=2000)
    run = nestling.train(data, out=tmp_path / "run", space="digits", epochs=3, overrides={"calibration_images": 512})
    smallest = arch_costs(run.space, run.space.smallest)["macs"]

    tight = nestling.search(run, budgets=[f"macs<={1.1 * smallest}"])
    loose = nestling.search(run)

    evaluator, task, confirm = run.evaluator(), run.task, run.dataset.split("confirm")
    scores = {
        name: evaluator.evaluate(arch, confirm)
        for name, arch in (("smallest", run.space.smallest), ("largest", run.space.largest))
    }
    ends = task.compare(scores["largest"], scores["smallest"])
    assert ends.low > 0 and ends.p_value < 0.01, "the two ends must differ for this test to mean anything"

    assert tight.best.costs["macs"] <= 1.1 * smallest
    assert loose.best.arch != run.space.smallest and loose.best.costs["macs"] > tight.best.costs["macs"]
    test = run.test_images("proof that the search chose rightly")
    chosen = {name: evaluator.evaluate(found.best.arch, test) for name, found in (("tight", tight), ("loose", loose))}
    gain = task.compare(chosen["loose"], chosen["tight"])
    # of those that the confirm images cannot tell from the best it is the cheapest, so some of the gain is given away
    assert gain.difference > 0.005 and gain.p_value < 0.2
    worse = task.compare(chosen["loose"], evaluator.evaluate(run.space.largest, test))
    assert worse.high > -0.02, "the chosen child must not be far behind the largest"
