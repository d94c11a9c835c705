"""The Task is a seam: a task of one's own, a number for each image, is trained, searched and stored by the same code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from deploy.ship import ship
from search.found import Found
from search.loop import Asked, search
from search.records import Confirmed, Row
from search.settings import SearchConfig
from search.store import Store
from supernet import durable
from supernet.errors import InputError
from supernet.families.mbconv import MBConvFamily
from supernet.losses import SOFT, Distillation
from supernet.run import Run
from supernet.samples import pack, unpack
from supernet.task import TASKS, Comparison, Estimate, Scores, Task
from supernet.train import train

pytestmark = pytest.mark.slow

SETTINGS = SearchConfig(
    strategy="coarse_to_fine",
    options={"coarse": 4},
    evaluations=7,
    random=2,
    polish=0,
    batch=3,
    finalists=2,
    profile_children=8,
    zones=2,
)


class Numbers:
    """The label is a number; the first output should be it. An image's score is the squared error, negative."""

    name = "numbers"
    metric = "negative_squared_error"
    title = "negative squared error"
    unit = "classes squared"
    loss_title = "squared error"
    own_images = False
    columns: ClassVar = {"negative_squared_error": "<f8"}

    @classmethod
    def of(cls, std: tuple[float, ...]) -> Numbers:
        return cls()

    @staticmethod
    def show(value: float) -> str:
        return f"{value:.3g}"

    def targets(self, images: Tensor, labels: Tensor) -> Tensor:
        return labels

    def label_loss(self, outputs: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        return (outputs[:, 0].float() - targets).square().mean()

    def soft_targets(self, outputs: Tensor, distillation: Distillation = SOFT) -> Tensor:
        return outputs.detach()[:, 0].float()

    def student_loss(
        self, outputs: Tensor, targets: Tensor, soft: Tensor, weight: float, distillation: Distillation = SOFT
    ) -> Tensor:
        return (outputs[:, 0].float() - (1 - weight) * targets - weight * soft).square().mean()

    def chance_loss(self, frequencies: np.ndarray) -> float:
        return float("inf")

    def scores(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return -(outputs[:, 0].double() - targets).square()

    def samples(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {self.metric: self.scores(outputs, targets)}

    def estimate(self, scores: Scores) -> Estimate:
        error = stats.sem(scores) * stats.t.ppf(0.975, len(scores) - 1)
        mean = float(scores.mean())
        return Estimate(mean, mean - float(error), mean + float(error), len(scores))

    def compare(self, one: Scores, other: Scores) -> Comparison:
        difference = one - other
        if not difference.any():
            return Comparison(0.0, 0.0, 0.0, 1.0)
        found = stats.ttest_rel(one, other)
        interval = found.confidence_interval()
        return Comparison(float(difference.mean()), float(interval.low), float(interval.high), float(found.pvalue))


@pytest.fixture
def registered() -> Any:
    """The task, and a family that learns it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS, "numbers", Numbers)
        patch.setattr(MBConvFamily, "task", "numbers")
        yield


@pytest.fixture(scope="module")
def trained_once(tiny_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run as a regression on the class numbers, to be trained anew."""
    path = Path(shutil.copytree(tiny_run.path, tmp_path_factory.mktemp("numbers") / "run"))
    shutil.rmtree(path / "checkpoints")
    config = json.loads((path / "config.json").read_text())
    recipe = {**config["recipe"], "learning_rate": 0.05, "epochs": 4}
    (path / "config.json").write_text(json.dumps({**config, "task": "numbers", "recipe": recipe}))
    return path


@pytest.fixture
def trained(trained_once: Path, registered: None) -> Run:
    run = Run.open(trained_once)
    train(run)
    return run


@pytest.fixture
def own(trained: Run, tmp_path: Path) -> Run:
    shutil.copytree(trained.path, tmp_path / "run")
    return Run.open(tmp_path / "run")


def test_the_task_has_all_that_a_task_must_bring() -> None:
    task: Task = Numbers()
    outputs, targets = torch.rand(7, 3, dtype=torch.float64), torch.arange(7)
    samples = {name: column.numpy() for name, column in task.samples(outputs, targets).items()}
    assert np.array_equal(unpack(pack(samples, task.columns), 7, task.columns)[task.metric], task.scores(outputs, targets))


def test_training_logs_the_metric_of_the_task_and_learns(trained: Run) -> None:
    lines = durable.read_lines(trained.path / "metrics.jsonl")
    losses = [line["children"]["largest"]["loss"] for line in lines]
    assert all(set(child) == {"loss", Numbers.metric} for line in lines for child in line["children"].values())
    assert np.mean(losses[-2:]) < losses[0]


def test_evaluation_gives_a_float_an_image(trained: Run) -> None:
    split = trained.dataset.split("search_val")
    scores = trained.evaluator().evaluate(trained.space.largest, split)
    assert scores.shape == (len(split),)
    assert scores.dtype.kind == "f"
    assert (scores <= 0).all() and len(np.unique(scores)) > 3


@pytest.mark.parametrize("budgets", [["macs<=700K"], ["latency_ms<=0.02"]])
def test_a_search_chooses_by_the_mean_score_and_keeps_every_float(
    own: Run, fake_target: Any, probes: None, budgets: list[str]
) -> None:  # fmt: skip
    found = search(own, Asked(tuple(budgets), settings=SETTINGS, targets={None: fake_target()}))
    split = own.dataset.split("search_val")
    with Store.existing(own.path / "search" / "search.sqlite") as store:
        for row in store.rows():
            scores = kept(own, row)
            assert row.score == scores.mean() < 0
            assert len(scores) == row.images <= len(split)
        confirmed = {row.key: kept(own, row) for row in store.confirmed()}
    chosen = found.best
    assert chosen.key in {child.key for child in found.finalists}
    assert chosen.confirm_score == confirmed[chosen.key].mean()
    for child in found.finalists:  # none is better for certain
        assert child.key == chosen.key or own.task.compare(confirmed[child.key], confirmed[chosen.key]).low < 0
    assert Found.load(own) == found


def test_children_are_compared_by_the_test_of_the_task(own: Run, fake_target: Any, probes: None) -> None:
    found = search(own, Asked(("macs<=700K",), settings=SETTINGS, targets={None: fake_target()}))
    with Store.existing(own.path / "search" / "search.sqlite") as store:
        rows = {row.key: kept(own, row) for row in store.confirmed()}
    p_value = float(stats.ttest_rel(rows[found.best.key], rows[found.largest.key]).pvalue)
    assert any(f"p = {p_value:.3g}" in note and "largest child" in note for note in found.notes)


def kept(run: Run, row: Row | Confirmed) -> np.ndarray:
    """The value of every image that the search kept of a child."""
    return unpack(row.samples, row.images, run.task.columns)[run.task.metric]


def test_the_strategy_prefers_less_error(own: Run, fake_target: Any, probes: None) -> None:
    found = search(own, Asked((), settings=SETTINGS, targets={None: fake_target()}))
    with Store.existing(own.path / "search" / "search.sqlite") as store:
        best = max(store.rows(), key=lambda row: row.score)
    assert best.key in {child.key for child in found.finalists}
    assert best.key in found.front


def test_the_store_of_one_task_is_not_taken_for_that_of_another(
    own: Run, fake_target: Any, probes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Floats read as bits would be nonsense; a run's weights belong to one task, but nothing else says so."""
    search(own, Asked((), settings=SETTINGS, targets={None: fake_target()}))
    config = json.loads((own.path / "config.json").read_text())
    (own.path / "config.json").write_text(json.dumps({**config, "task": "classification"}))
    monkeypatch.setattr(MBConvFamily, "task", "classification")
    with pytest.raises(InputError, match="task is numbers there"):
        search(Run.open(own.path), Asked(settings=SETTINGS, targets={None: fake_target()}))


def test_a_bundle_of_a_task_that_bundles_do_not_know_is_refused(own: Run, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"bundles are of the tasks classification, regression, but .* learnt numbers"):
        ship(own, own.space.smallest, tmp_path / "bundle")
    assert own.test_reads == 0


def test_an_unknown_task_is_named(own: Run) -> None:
    config = json.loads((own.path / "config.json").read_text())
    (own.path / "config.json").write_text(json.dumps({**config, "task": "segmentation"}))
    with pytest.raises(InputError, match="segmentation"):
        Run.open(own.path)


def test_a_run_whose_task_is_not_that_of_its_family_is_refused(own: Run) -> None:
    config = json.loads((own.path / "config.json").read_text())
    (own.path / "config.json").write_text(json.dumps({**config, "task": "regression"}))
    with pytest.raises(InputError, match="the space digits learns numbers, but task is 'regression': restore the file"):
        Run.open(own.path)


def test_gradients_of_the_students_lead_to_the_teacher() -> None:
    task, outputs = Numbers(), torch.tensor([[1.0, 9.0], [2.0, 9.0]], requires_grad=True)
    task.student_loss(outputs, torch.tensor([0, 0]), torch.tensor([5.0, 5.0]), 1.0).backward()
    assert outputs.grad is not None
    assert (outputs.grad[:, 0] < 0).all() and (outputs.grad[:, 1] == 0).all()
