"""Objectives against scikit-learn, and their paired statistics against the bootstrap of the objective itself."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, top_k_accuracy_score

from search.objective import OBJECTIVES, PerImage, fingerprint, objective_named, on_first
from search.statistics import compare, confidence_set, shrunk
from supernet.errors import InputError
from supernet.samples import Samples
from supernet.task import Classification, Regression


def guesses(labels: np.ndarray, classes: int, accuracy: float | np.ndarray, rng: np.random.Generator) -> Samples:
    """What a child with this accuracy (a number, or one a class) does; wrong ones fall on lower classes more often."""
    right = rng.random(len(labels)) < np.broadcast_to(accuracy, classes)[labels]
    other = (rng.random(len(labels)) ** 2 * (classes - 1)).astype(np.int64)
    other += other >= labels
    rank = np.where(right, 0, rng.integers(1, classes, len(labels)))
    return {"rank": rank.astype(np.uint16), "predicted": np.where(right, labels, other).astype(np.uint16)}


def unequal_labels(images: int, classes: int, rng: np.random.Generator) -> np.ndarray:
    shares = 1.0 / np.arange(1, classes + 1)
    return rng.choice(classes, images, p=shares / shares.sum())


@st.composite
def outcomes(draw: st.DrawFn) -> tuple[Samples, np.ndarray, int]:
    """Few images of many classes: classes that never occur, are never predicted, or are only predicted."""
    classes, images = draw(st.integers(2, 9)), draw(st.integers(1, 30))
    labels = np.array(draw(st.lists(st.integers(0, classes - 1), min_size=images, max_size=images)))
    predicted = np.array(draw(st.lists(st.integers(0, classes - 1), min_size=images, max_size=images)))
    rank = np.where(predicted == labels, 0, classes - 1)
    return {"rank": rank.astype(np.uint16), "predicted": predicted.astype(np.uint16)}, labels, classes


@given(outcomes())
@settings(deadline=None, max_examples=40)
@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true:UserWarning")
def test_means_are_those_of_scikit_learn(drawn: tuple[Samples, np.ndarray, int]) -> None:
    samples, labels, classes = drawn
    expected = {
        "top1": accuracy_score(labels, samples["predicted"]),
        "balanced_accuracy": balanced_accuracy_score(labels, samples["predicted"]) if len(set(labels)) > 1 else None,
        "macro_f1": f1_score(labels, samples["predicted"], average="macro"),
    }
    for name, value in expected.items():
        values = OBJECTIVES[name].values(samples, labels, classes)
        assert values.shape == labels.shape
        if value is not None:  # scikit-learn remarks on a single class
            assert values.mean() == pytest.approx(value)


def test_top5_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(300, 12)), rng.integers(12, size=300)
    rank = (logits > logits[np.arange(300), labels][:, None]).sum(1).astype(np.uint16)
    values = OBJECTIVES["top5"].values({"rank": rank}, labels, 12)
    assert values.dtype == bool
    assert values.mean() == pytest.approx(top_k_accuracy_score(labels, logits, k=5))


def test_samples_of_the_task_fit() -> None:
    torch = pytest.importorskip("torch")
    outputs, labels = torch.randn(40, 7, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 7
    samples = {name: column.numpy() for name, column in Classification().samples(outputs, labels).items()}
    for name in ("top1", "top5", "balanced_accuracy", "macro_f1"):
        values = objective_named(name, Classification).values(samples, labels.numpy(), 7)
        assert np.isfinite(values).all()
    top1 = objective_named("top1", Classification).values(samples, labels.numpy(), 7)
    assert (top1 == Classification().scores(outputs, labels).numpy()).all()


@pytest.mark.parametrize("name", ["macro_f1", "balanced_accuracy"])
def test_the_paired_test_of_values_agrees_with_the_bootstrap_of_the_objective(name: str) -> None:
    """The bootstrap draws images and computes the whole objective anew, by scikit-learn's definition."""
    rng = np.random.default_rng(0)
    classes, images = 6, 1500
    labels = unequal_labels(images, classes, rng)
    one = guesses(labels, classes, 0.74, rng)
    copied = rng.random(images) < 0.8  # both see the same images
    fresh = guesses(labels, classes, np.linspace(0.75, 0.6, classes), rng)
    other = {column: np.where(copied, one[column], fresh[column]) for column in one}
    objective = OBJECTIVES[name]
    found = compare(objective.values(one, labels, classes), objective.values(other, labels, classes))
    differences = []
    for _ in range(800):
        drawn = rng.integers(images, size=images)
        means = [
            objective.values({column: given[drawn] for column, given in samples.items()}, labels[drawn], classes).mean()
            for samples in (one, other)
        ]
        differences.append(means[0] - means[1])
    reach, drawn_reach = (found.high - found.low) / 2, 1.96 * np.std(differences)
    assert found.difference == pytest.approx(np.mean(differences), abs=0.1 * reach)
    if name == "macro_f1":
        assert reach == pytest.approx(drawn_reach, rel=0.08)
    else:  # the sizes of the classes are taken as given
        assert reach == pytest.approx(drawn_reach, rel=0.15)


def test_macro_f1_of_equal_children_is_not_called_different() -> None:
    false = 0
    for seed in range(300):
        rng = np.random.default_rng([seed, 2])
        labels = unequal_labels(800, 5, rng)
        one, other = (OBJECTIVES["macro_f1"].values(guesses(labels, 5, 0.7, rng), labels, 5) for _ in range(2))
        false += compare(one, other).p_value < 0.05
    assert 3 <= false <= 26  # 15 are expected


def test_every_statistic_takes_the_values() -> None:
    rng = np.random.default_rng(0)
    labels = unequal_labels(600, 5, rng)
    children = [guesses(labels, 5, accuracy, rng) for accuracy in (0.5, 0.7, 0.9)]
    for name in ("top1", "balanced_accuracy", "macro_f1"):
        values = np.stack([OBJECTIVES[name].values(child, labels, 5) for child in children])
        assert confidence_set(values, rng, resamples=200).tolist() == [False, False, True]
        assert [one.value for one in shrunk(values)] == pytest.approx(values.mean(1), abs=0.02)


def test_values_are_those_of_the_images_in_any_order() -> None:
    rng = np.random.default_rng(0)
    labels = unequal_labels(200, 5, rng)
    samples, turned = guesses(labels, 5, 0.7, rng), rng.permutation(200)
    for name in ("top1", "top5", "balanced_accuracy", "macro_f1"):
        classes = 7  # two of them never occur
        values = OBJECTIVES[name].values(samples, labels, classes)
        again = OBJECTIVES[name].values({key: column[turned] for key, column in samples.items()}, labels[turned], classes)
        assert again == pytest.approx(values[turned])


def test_values_on_the_first_images_are_computed_of_them_alone() -> None:
    rng = np.random.default_rng(0)
    labels = unequal_labels(200, 5, rng)
    samples = guesses(labels, 5, 0.7, rng)
    known = on_first(OBJECTIVES["macro_f1"], samples, labels, 5)
    assert known(50).mean() == pytest.approx(f1_score(labels[:50], samples["predicted"][:50], average="macro"))
    assert known(200) == pytest.approx(OBJECTIVES["macro_f1"].values(samples, labels, 5))
    assert known(50) is known(50)


def test_psnr_and_texts() -> None:
    values = objective_named(None, Regression).values({"psnr_db": np.float32([20, 30])}, np.zeros(2, np.int64), 1)
    assert values.tolist() == [20, 30]
    assert objective_named("psnr_db", Regression).show(values.mean()) == "25.00 dB"
    assert OBJECTIVES["macro_f1"].show(0.9312) == "93.12%"
    for name, objective in OBJECTIVES.items():
        assert objective.name == name
        assert objective.title
        assert objective.unit == "%"


def test_objectives_of_tasks() -> None:
    assert objective_named(None, Classification).name == "top1"
    assert objective_named(None, Regression()).name == "psnr_db"
    assert objective_named("macro_f1", Classification()).name == "macro_f1"


def test_a_tasks_own_metric_is_an_objective_where_it_is_a_column() -> None:
    class Own(Classification):
        metric, title, unit, columns = "margin", "margin of the label", "nats", {"margin": "<f4"}

        @staticmethod
        def show(value: float) -> str:
            return f"{value:.1f} nats"

    own, samples = objective_named(None, Own), {"margin": np.float32([0.5, 1.5])}
    assert (own.name, own.title, own.unit, own.show(1.0)) == ("margin", "margin of the label", "nats", "1.0 nats")
    values = own.values(samples, np.zeros(2, np.int64), 3)
    assert values.tolist() == [0.5, 1.5] and values.dtype == np.float64
    assert objective_named("margin", Own()).name == "margin"
    with pytest.raises(InputError, match="must be one of"):
        objective_named("margin", Classification)
    Own.columns = {"loss": "<f4"}
    with pytest.raises(InputError, match="must be one of"):
        objective_named(None, Own)


def test_an_objective_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    sure = PerImage("sure", "certainty", "nats", lambda samples, labels: -samples["loss"])
    samples = {"loss": np.float16([0.5, 1.5])}
    values = sure.values(samples, np.zeros(2, np.int64), 3)
    assert values.dtype == np.float64
    assert sure.show(values.mean()) == "-1.00 nats"
    bools = PerImage("right", "right", "%", lambda samples, labels: samples["rank"] == 0)
    assert bools.values({"rank": np.array([0, 1])}, np.zeros(2, np.int64), 3).dtype == bool
    monkeypatch.setitem(OBJECTIVES, "sure", sure)
    assert objective_named("sure", Classification) is sure


def of(function: Any) -> str:
    return fingerprint(PerImage("sure", "sure", "", function))


def not_class(number: int) -> Any:
    return lambda samples, labels: samples["predicted"] != number


def test_a_changed_function_is_another_objective() -> None:
    assert of(lambda samples, labels: -samples["loss"]) == of(lambda samples, labels: -samples["loss"])
    different = [
        of(lambda samples, labels: -samples["loss"]), of(lambda samples, labels: samples["loss"]), of(not_class(3)), of(not_class(5)),
        of(lambda samples, labels: [each + 1 for each in labels]), of(lambda samples, labels: [each + 2 for each in labels]),
        of(functools.partial(not_class, 3)), of(functools.partial(not_class, 5)), of(lambda samples, labels, most=3: labels < most),
    ]  # fmt: skip
    assert len(set(different)) == len(different)
    assert fingerprint(OBJECTIVES["top1"]) == fingerprint(OBJECTIVES["top5"])  # their names differ


@pytest.mark.slow
def test_the_fingerprint_is_the_same_in_every_process() -> None:
    program = (
        "from search.objective import PerImage, fingerprint;"
        "print(fingerprint(PerImage('x', 'x', '', lambda s, l: l in {'a', 'b', 'c', 'd'})))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(found) == 1


# -- mistakes ----------------------------------------------------------------------------------------------------------------

TWO = np.zeros(2, np.int64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: objective_named("top2", Classification), "must be one of"),
        (lambda: objective_named("psnr_db", Classification), "must be one of"),
        (lambda: objective_named("top1", Regression), "must be one of"),
        (lambda: OBJECTIVES["top5"].values({"rank": TWO}, TWO, 5), "more than 5 classes"),
        (lambda: OBJECTIVES["top1"].values({"psnr_db": TWO}, TWO, 5), "needs the column 'rank'"),
        (lambda: OBJECTIVES["top1"].values({"rank": TWO}, TWO[:1], 5), "2 images and 1 labels"),
        (lambda: OBJECTIVES["macro_f1"].values({"predicted": TWO[:0]}, TWO[:0], 5), "at least one image"),
        (lambda: PerImage("x", "x", "", lambda samples, labels: TWO[:1]).values({}, TWO, 1), "correct its function"),
        (
            lambda: PerImage("x", "x", "", lambda samples, labels: np.array([0.0, np.nan])).values({}, TWO, 1),
            "gave nan for image 1, one of 1 that are not finite: correct its function",
        ),
        (
            lambda: PerImage("x", "x", "", lambda samples, labels: 1 / 0).values({"rank": TWO}, TWO, 1),
            r"its function failed .ZeroDivisionError: division by zero.: correct it; samples have rank",
        ),
        (
            lambda: PerImage("x", "x", "", lambda samples, labels: samples["sure"]).values({"rank": TWO}, TWO, 1),
            "its function failed .KeyError: 'sure'.: correct it; samples have rank",
        ),
        (lambda: PerImage("x", "x", "", lambda samples, labels: [[1], [1, 2]]).values({}, TWO, 1), "its function failed"),
        (lambda: PerImage("top1", "x", "", lambda samples, labels: TWO), "has a name of its own, but got 'top1'"),
        (lambda: PerImage("", "x", "", lambda samples, labels: TWO), "has a name of its own, but got ''"),
        (
            lambda: PerImage("x", "x", "", lambda samples, labels: np.array(["a", "b"])).values({}, TWO, 1),
            "correct its function",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(call: object, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        call()  # type: ignore[operator]
    assert "\n" not in str(caught.value)
