"""Dividing a source into train, search_val, confirm and test."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from supernet.data import splits as splits_module
from supernet.data.sources import ArraySource, Flaw, Source, open_source
from supernet.data.splits import NAMES, Splits, divide, readable_splits
from supernet.errors import InputError


def source_of(labels: Sequence[int], parts: Sequence[str] | None = None) -> ArraySource:
    """Images 2 x 2 that are all different."""
    count = len(labels)
    pixels = np.arange(count, dtype=np.uint32).view(np.uint8).reshape(count, 2, 2)
    classes = [f"class {label}" for label in range(max(labels) + 1)]
    return ArraySource("toy", classes, np.array(labels, np.int64), parts or [""] * count, pixels)


def of_sizes(*sizes: int, part: str = "") -> ArraySource:
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    return source_of(labels, [part] * len(labels))


def divided(**counts: tuple[int, ...]) -> ArraySource:
    """Images per class of each part: `divided(train=(9, 9), test=(3, 3))`."""
    rows = [(label, part) for part, sizes in counts.items() for label, size in enumerate(sizes) for _ in range(size)]
    return source_of([label for label, _ in rows], [part for _, part in rows])


def as_sets(splits: Splits) -> list[set[int]]:
    return [set(getattr(splits, name).tolist()) for name in NAMES]


def as_lists(splits: Splits) -> dict[str, list[int]]:
    return {name: getattr(splits, name).tolist() for name in NAMES}


def per_class(source: ArraySource, indices: np.ndarray) -> list[int]:
    return np.bincount(source.labels[indices], minlength=len(source.classes)).tolist()


@settings(deadline=None)
@given(st.lists(st.integers(4, 60), min_size=2, max_size=6), st.integers(0, 2**40), st.integers(6, 80))
def test_every_image_is_used_once_and_every_class_is_in_every_split(sizes: list[int], seed: int, most: int) -> None:
    source = of_sizes(*sizes)
    splits = divide(source, seed=seed, most=most)
    lists = as_lists(splits)
    assert sorted(index for indices in lists.values() for index in indices) == list(range(len(source)))
    assert all(min(per_class(source, getattr(splits, name))) >= 1 for name in NAMES)
    assert len(splits.search_val) <= max(most, len(sizes))
    assert len(splits.confirm) <= max(most, len(sizes))


@settings(deadline=None)
@given(st.lists(st.integers(40, 200), min_size=2, max_size=5), st.integers(0, 99))
def test_classes_keep_their_shares(sizes: list[int], seed: int) -> None:
    source = of_sizes(*sizes)
    splits = divide(source, seed=seed)
    shares = np.array(sizes) / sum(sizes)
    for name, fraction in (("search_val", 0.1), ("confirm", 0.1), ("test", 0.2)):
        beyond_the_exact = per_class(source, getattr(splits, name)) - fraction * np.array(sizes)
        assert (beyond_the_exact <= 1).all()
        assert (beyond_the_exact >= -len(sizes) * shares).all()


def test_even_classes_are_divided_exactly() -> None:
    splits = divide(of_sizes(100, 100, 100), seed=0)
    assert [len(getattr(splits, name)) for name in NAMES] == [180, 30, 30, 60]


def test_the_same_seed_divides_alike_and_another_one_does_not() -> None:
    source = of_sizes(30, 40)
    first = divide(source, seed=7)
    assert as_lists(divide(source, seed=7)) == as_lists(first)
    other = as_sets(divide(source, seed=8))
    assert all(ours != theirs for ours, theirs in zip(as_sets(first), other, strict=True))


def test_the_first_images_of_a_split_are_a_fair_sample() -> None:
    source = of_sizes(400, 400, 400)
    splits = divide(source, seed=0)
    for name in NAMES:
        indices = getattr(splits, name)
        assert min(per_class(source, indices[: len(indices) // 2])) >= len(indices) // 12


def test_the_cap_leaves_the_rest_to_train() -> None:
    splits = divide(of_sizes(100, 100), seed=0, most=10)
    assert [len(getattr(splits, name)) for name in NAMES] == [140, 10, 10, 40]


def test_the_makers_test_part_is_the_test_split() -> None:
    source = divided(train=(40, 40), test=(5, 7))
    splits = divide(source, seed=0)
    assert sorted(splits.test) == list(range(80, 92))
    assert [len(getattr(splits, name)) for name in NAMES] == [64, 8, 8, 12]


def test_the_makers_only_val_part_is_the_test_split() -> None:
    splits = divide(divided(train=(40, 40), val=(5, 7)), seed=0)
    assert sorted(splits.test) == list(range(80, 92))
    assert len(splits.train) == 64


def test_the_makers_val_part_is_halved_when_there_is_a_test_part_too() -> None:
    source = divided(train=(40, 40), val=(5, 8), test=(3, 3))
    splits = divide(source, seed=0, most=2)
    assert sorted(splits.train) == list(range(80))
    assert sorted([*splits.search_val, *splits.confirm]) == list(range(80, 93))
    assert (per_class(source, splits.search_val), per_class(source, splits.confirm)) == ([3, 4], [2, 4])
    assert sorted(splits.test) == list(range(93, 99))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (of_sizes(20, 1), "class 'class 1' of toy has 1 images to divide, and at least 4 are needed"),
        (of_sizes(3, 20), "class 'class 0' of toy has 3 images to divide, and at least 4 are needed"),
        (divided(train=(9, 2), test=(1, 1)), "'class 1' of toy has 2 images to divide, and at least 3 are needed"),
        (divided(train=(9, 9), test=(0, 1)), "'class 0' of toy has 0 images for test, and at least 1"),
        (divided(train=(9, 9), val=(9, 1), test=(1, 1)), "'class 1' of toy has 1 images in the val part, and at least 2"),
        (divided(train=(0, 9), val=(9, 2), test=(1, 1)), "'class 0' of toy has 0 images for train, and at least 1"),
    ],
)
def test_a_class_with_too_few_images_is_named(source: ArraySource, message: str) -> None:
    with pytest.raises(InputError, match=message):
        divide(source, seed=0)


@pytest.mark.parametrize(
    "options", [{"test": 0.0}, {"test": 0.8}, {"search_val": -0.1}, {"confirm": 1.0}, {"most": 1}, {"search_val": float("nan")}]
)
def test_fractions_that_leave_a_split_empty_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match=r"between 0 and 1|at least the number of classes"):
        divide(of_sizes(50, 50), seed=0, **options)  # type: ignore[arg-type]


def test_digits_divide_with_every_class_everywhere() -> None:
    source = open_source("digits")
    splits = divide(source, seed=0)
    assert [round(len(getattr(splits, name)) / len(source), 2) for name in NAMES] == [0.61, 0.1, 0.1, 0.2]
    assert splits.train.dtype == np.int64


def test_splits_survive_json() -> None:
    source = divided(train=(40, 40), test=(5, 7))
    splits = divide(source, seed=3)
    value = json.loads(json.dumps(splits.to_json_dict(source)))
    assert as_lists(Splits.from_json_dict(value, source)) == as_lists(splits)


def test_splits_of_other_images_are_refused_with_what_to_do() -> None:
    value = divide(of_sizes(9, 9), seed=0).to_json_dict(of_sizes(9, 9))
    with pytest.raises(
        InputError, match=r"images of toy changed since the run began .*: put the files back.*or start a new run"
    ):
        Splits.from_json_dict(value, of_sizes(9, 10))


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"more": 1},
        {"test": None},
        {"test": ["1"]},
        {"test": []},
        {"test": [1.0]},
        {"test": [True]},
        {"test": [10**30]},
        {"test": [-1]},
    ],
)
def test_a_damaged_file_of_splits_is_refused(change: dict[str, object]) -> None:
    source = of_sizes(9, 9)
    value = divide(source, seed=0).to_json_dict(source)
    for wrong in (value | change, {}, [], None):
        with pytest.raises(InputError, match="damaged"):
            Splits.from_json_dict(wrong, source)


def test_a_file_of_splits_that_shares_or_lacks_an_image_is_refused() -> None:
    source = of_sizes(9, 9)
    value = divide(source, seed=0).to_json_dict(source)
    for train in (value["train"][1:], value["train"] + value["test"][:1]):
        with pytest.raises(InputError, match="each of the 18 images once"):
            Splits.from_json_dict(value | {"train": train}, source)


@pytest.mark.parametrize("stand_in", [1.0, True, "1"])
def test_only_whole_numbers_stand_for_images(stand_in: object) -> None:
    source = of_sizes(9, 9)
    value = divide(source, seed=0).to_json_dict(source)
    lists = {name: [stand_in if index == 1 else index for index in value[name]] for name in NAMES}
    with pytest.raises(InputError, match="lists of image numbers"):
        Splits.from_json_dict(value | lists, source)


# --- images that are left out ---


def flaw(image: int) -> Flaw:
    return Flaw(image, f"{image:05d}", "is damaged")


@settings(deadline=None)
@given(st.data(), st.lists(st.integers(14, 60), min_size=2, max_size=4), st.sampled_from(["", "test", "both"]))
def test_every_image_is_in_one_split_or_left_out(data: st.DataObject, sizes: list[int], made: str) -> None:
    parts = {"": {"": sizes}, "test": {"train": sizes, "test": sizes}, "both": {"train": sizes, "val": sizes, "test": sizes}}[
        made
    ]
    source = divided(**{part or "train": tuple(counts) for part, counts in parts.items()}) if made else of_sizes(*sizes)
    bad = data.draw(st.lists(st.integers(0, len(source) - 1), unique=True, max_size=6))
    splits = divide(source, seed=1, left_out=[flaw(i) for i in bad])
    lists = as_lists(splits)
    assert sorted([*(i for indices in lists.values() for i in indices), *bad]) == list(range(len(source)))
    assert [left.image for left in splits.left_out] == sorted(bad)
    value = json.loads(json.dumps(splits.to_json_dict(source)))
    again = Splits.from_json_dict(value, source)
    assert (as_lists(again), again.left_out) == (lists, splits.left_out)
    more = next(i for i in lists["train"])
    assert as_lists(splits.without([flaw(more)])) == lists | {"train": lists["train"][1:]}
    assert set(splits.without([flaw(more)]).left_out) == {*splits.left_out, flaw(more)}


def test_nothing_left_out_is_written_as_before() -> None:
    source = of_sizes(20, 20)
    assert set(divide(source, seed=0).to_json_dict(source)) == {"format", "source", "fingerprint", *NAMES}
    assert as_lists(divide(source, seed=0, left_out=[])) == as_lists(divide(source, seed=0))


@pytest.mark.parametrize(
    "left_out",
    [
        None,
        "0",
        [0],
        [{"image": 0}],
        [{"image": True, "identity": "00000", "reason": "x"}],
        [{"image": "0", "identity": "00000", "reason": "x"}],
        [{"image": 0, "identity": "00000", "reason": 5}],
        [{"image": 0, "identity": "00000", "reason": "x", "more": 1}],
    ],
)
def test_a_damaged_list_of_what_is_left_out_is_refused(left_out: object) -> None:
    source = of_sizes(9, 9)
    value = divide(source, seed=0, left_out=[flaw(0)]).to_json_dict(source)
    with pytest.raises(InputError, match="left_out lists images"):
        Splits.from_json_dict(value | {"left_out": left_out}, source)


@pytest.mark.parametrize("left_out", [[], [0, 0], [0, 1], [1]])
def test_what_is_left_out_is_in_no_split(left_out: list[int]) -> None:
    source = of_sizes(9, 9)
    value = divide(source, seed=0, left_out=[flaw(0)]).to_json_dict(source)
    with pytest.raises(InputError, match="each of the 18 images once"):
        Splits.from_json_dict(value | {"left_out": [flaw(i)._asdict() for i in left_out]}, source)


def test_a_class_that_is_too_small_without_them_is_named() -> None:
    with pytest.raises(InputError, match="'class 0' of toy has 3 images to divide, and at least 4 are needed"):
        divide(of_sizes(4, 20), seed=0, left_out=[flaw(2)])


def photos(root: Path, damaged: Sequence[str] = (), count: int = 40) -> Source:
    for i in range(count):
        path = root / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 5), (i, 0, 0)).save(path)
    for name in damaged:
        (root / name).write_text("a shopping list")
    return open_source(str(root))


def test_all_images_of_a_small_set_are_decoded_and_the_unreadable_left_out(tmp_path: Path) -> None:
    source = photos(tmp_path, ["a/4.png", "b/7.png"])
    splits = readable_splits(source, seed=0, skip_unreadable=0.05)
    assert [left.identity for left in splits.left_out] == ["a/4.png", "b/7.png"]
    assert all(left.reason.startswith("is not an image") for left in splits.left_out)
    assert as_lists(splits) == as_lists(divide(source, seed=0, left_out=splits.left_out))
    for limit, text in (
        (0.0, "every image must be readable, but 2 of 40 are not"),
        (0.04, r"2 of 40 images cannot be read, and skip_unreadable 0\.04 allows 1"),
    ):
        with pytest.raises(
            InputError, match=rf"{text} \(a/4\.png: is not an image.*; b/7\.png: .*\): repair or remove them"
        ) as caught:
            readable_splits(source, seed=0, skip_unreadable=limit)
        assert "\n" not in str(caught.value)


def test_of_a_large_set_those_are_decoded_that_are_not_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits_module, "MOST_CHECKED", 39)
    whole = divide(photos(tmp_path), seed=3)
    names = [photos(tmp_path).identity(int(getattr(whole, name)[0])) for name in NAMES]
    late = photos(tmp_path).identity(int(whole.train[-1]))
    source = photos(tmp_path, [*names, late])
    splits = readable_splits(source, seed=3, skip_unreadable=0.2)
    assert {left.identity for left in splits.left_out} == set(names[1:])
    assert as_lists(splits) == {name: indices[name != "train" :] for name, indices in as_lists(whole).items()}
    calibrated = readable_splits(source, seed=3, skip_unreadable=0.2, calibration=5)
    assert {left.identity for left in calibrated.left_out} == set(names)
    assert calibrated.train.tolist() == whole.train[1:].tolist()
    with pytest.raises(InputError, match=r"every image must be readable, but 3 of 40"):
        readable_splits(source, seed=3)


def test_a_large_set_that_lost_the_last_image_of_a_class_from_a_split_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(splits_module, "MOST_CHECKED", 9)
    whole = divide(photos(tmp_path, count=20), seed=3)
    source = photos(tmp_path, [photos(tmp_path, count=20).identity(int(whole.confirm[0]))], count=20)
    with pytest.raises(InputError, match="has 0 images for confirm, and at least 1 is needed"):
        readable_splits(source, seed=3, skip_unreadable=0.5)


def test_arrays_are_divided_as_they_are() -> None:
    source = of_sizes(30, 30)
    assert as_lists(readable_splits(source, seed=4)) == as_lists(divide(source, seed=4))
