"""Mixing images and labels: what is mixed with what, and that it follows from the seed alone."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from supernet.data.mix import Mix, mix_groups
from supernet.errors import InputError

LABELS = torch.arange(12) % 5
IMAGES = torch.randint(0, 256, (12, 3, 8, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
MIXUP, CUTMIX, BOTH = Mix(mixup=0.8), Mix(cutmix=1.0), Mix(mixup=0.8, cutmix=1.0)
EACH = pytest.mark.parametrize("mix", [MIXUP, CUTMIX, BOTH, Mix(mixup=0.2, cutmix=3.0, probability=0.5)])


def share(images: Tensor, mixed: Tensor) -> tuple[Tensor, Tensor]:
    """Of each image, whether every pixel is its own or that of the image before, and the fraction of its own pixels."""
    own, other = (mixed == images).all(1), (mixed == images.roll(1, 0)).all(1)
    return (own | other).all((1, 2)), own.float().mean((1, 2))


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 9), st.integers(2, 6), st.sampled_from([0.0, 0.2, 1.0, 5.0]), st.sampled_from([0.0, 0.5, 1.0]),
    st.floats(0, 1), st.integers(0, 2**63 - 1),
)  # fmt: skip
def test_probabilities_are_shares_of_the_images_own_label_and_of_the_one_before(
    count: int, classes: int, mixup: float, cutmix: float, probability: float, seed: int
) -> None:
    mix, labels = Mix(mixup, cutmix, probability), LABELS[:count] % classes
    images, targets = mix(IMAGES[:count].float(), labels, classes, (seed,))
    assert images.shape == (count, 3, 8, 6)
    if not mix.on:
        assert targets is labels
        return
    assert targets.shape == (count, classes) and targets.dtype == torch.float32
    torch.testing.assert_close(targets.sum(1), torch.ones(count))
    assert targets.min() >= 0
    own, other = F.one_hot(labels, classes), F.one_hot(labels.roll(1, 0), classes)
    assert (targets * (1 - own) * (1 - other) == 0).all()


def test_mixup_is_the_same_mixture_of_pixels_as_of_labels() -> None:
    shares = []
    for step in range(30):
        images, targets = MIXUP(IMAGES.float(), torch.arange(12), 12, (0, step))
        own = targets.diagonal()
        torch.testing.assert_close(own, own[:1].expand(12))  # one share for the group
        torch.testing.assert_close(targets, own[0] * torch.eye(12) + (1 - own[0]) * torch.eye(12).roll(1, 0))
        torch.testing.assert_close(
            images, own[0] * IMAGES.float() + (1 - own[0]) * IMAGES.float().roll(1, 0), rtol=1e-5, atol=1e-3
        )
        shares.append(float(own[0]))
    assert min(shares) < 0.2 and max(shares) > 0.8


def test_cutmix_labels_are_the_areas() -> None:
    areas = []
    for step in range(30):
        images, targets = CUTMIX(IMAGES, torch.arange(12), 12, (0, step))
        whole, own = share(IMAGES.float(), images)
        assert whole.all()
        torch.testing.assert_close(targets.diagonal(), own)
        areas.append(float(own[0]))
    assert min(areas) < 0.6 and max(areas) > 0.9


def test_each_kind_has_an_equal_chance_and_the_rest_is_left_as_it_is() -> None:
    kinds = {"mixup": 0, "cutmix": 0, "none": 0}
    for step in range(400):
        images, targets = Mix(1.0, 1.0, probability=0.6)(IMAGES.float(), torch.arange(12), 12, (0, step))
        if torch.equal(images, IMAGES.float()) and targets.max() == 1:
            kinds["none"] += 1
            assert torch.equal(targets, torch.eye(12))
        else:
            kinds["cutmix" if share(IMAGES.float(), images)[0].all() else "mixup"] += 1
    # cutmix of an empty box counts for "none"; 4 standard errors
    assert {kind: count / 400 for kind, count in kinds.items()} == pytest.approx(
        {"mixup": 0.3, "cutmix": 0.3, "none": 0.4}, abs=0.1
    )


@EACH
def test_the_result_follows_from_the_seed_alone_and_leaves_global_generators_alone(mix: Mix) -> None:
    images = IMAGES.float()
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002
    found = [mix(images, LABELS, 5, (7, step)) for step in range(8)]
    assert torch.equal(images, IMAGES.float()), "the input is not written to"
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1:] == (random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[index]  # noqa: NPY002
    torch.manual_seed(99)
    for step in reversed(range(8)):
        again = mix(images, LABELS, 5, (7, step))
        assert all(torch.equal(one, other) for one, other in zip(found[step], again, strict=True))
    others = [*found, *(mix(images, LABELS, 5, seed) for seed in ((8, 0), (7, 0, 0), (7, 0, 1)))]
    moved = [images for images, targets in others if targets.max() < 1]
    assert len(moved) >= 3
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(moved, 2))


@EACH
def test_bytes_are_mixed_as_their_floats(mix: Mix) -> None:
    for step in range(4):
        images, targets = mix(IMAGES, LABELS, 5, (0, step))
        expected, same = mix(IMAGES.float(), LABELS, 5, (0, step))
        assert images.dtype == torch.float32
        assert torch.equal(images, expected) and torch.equal(targets, same)


@pytest.mark.parametrize("mix", [Mix(), Mix(mixup=1.0, cutmix=1.0, probability=0.0)])
def test_off_leaves_images_and_hard_labels_as_they_are(mix: Mix) -> None:
    assert not mix.on
    for images, targets in (mix(IMAGES, LABELS, 5, (0,)), mix_groups(IMAGES, LABELS, 5, mix, (0,), 4, 0)):
        assert images is IMAGES and targets is LABELS


@EACH
@pytest.mark.parametrize("group", [1, 3, 5, 12, 50])
def test_a_group_is_mixed_by_itself_with_its_own_number(mix: Mix, group: int) -> None:
    images, targets = mix_groups(IMAGES, LABELS, 5, mix, (3, 1), group, 0)
    assert images.shape == IMAGES.shape and targets.shape == (12, 5)
    for number, start in enumerate(range(0, 12, group)):
        part = slice(start, start + group)
        alone, own = mix(IMAGES[part], LABELS[part], 5, (3, 1, number))
        assert torch.equal(images[part], alone) and torch.equal(targets[part], own)


@EACH
@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_processes_get_the_images_that_one_would(mix: Mix, ranks: int) -> None:
    """Or the parts of one that gathers gradients."""
    whole, targets = mix_groups(IMAGES, LABELS, 5, mix, (0, 9), 2, 0)
    count = 12 // ranks
    for rank in range(ranks):
        part = slice(rank * count, (rank + 1) * count)
        images, own = mix_groups(IMAGES[part], LABELS[part], 5, mix, (0, 9), 2, rank * count // 2)
        assert torch.equal(images, whole[part]) and torch.equal(own, targets[part])


@EACH
def test_groups_of_a_batch_are_mixed_differently(mix: Mix) -> None:
    same = IMAGES[:4].repeat(8, 1, 1, 1)
    images, _ = mix_groups(same, LABELS[:4].repeat(8), 5, mix, (0, 0), 4, 0)
    assert len({group.numpy().tobytes() for group in images.split(4)}) >= 4


def test_one_image_alone_stays_itself() -> None:
    images, targets = BOTH(IMAGES[:1], LABELS[:1], 5, (0,))
    torch.testing.assert_close(images, IMAGES[:1].float(), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(targets, F.one_hot(LABELS[:1], 5).float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mixup": -1.0}, "mix.mixup is 0 or at least 0.05, not -1.0"),
        ({"mixup": 1e-6}, "mix.mixup is 0 or at least"),
        ({"cutmix": float("inf")}, "mix.cutmix is 0 or at least"),
        ({"cutmix": float("nan")}, "mix.cutmix is 0 or at least"),
        ({"probability": 1.5}, "mix.probability lies in 0 to 1, not 1.5"),
        ({"probability": float("nan")}, "mix.probability"),
    ],
)
def test_numbers_without_a_meaning_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Mix(**change)


@pytest.mark.parametrize("change", [{"group": 0}, {"first_group": -1}, {"labels_n": LABELS[:5]}, {"images_nchw": IMAGES[:0]}])
def test_groups_without_a_meaning_are_refused(change: dict[str, Any]) -> None:
    given = {"images_nchw": IMAGES, "labels_n": LABELS, "group": 4, "first_group": 0} | change
    with pytest.raises(InputError, match="images are mixed in groups of at least 1, numbered from 0, a label to each, not"):
        mix_groups(classes=5, mix=BOTH, seed=(0,), **given)
