"""Random changes of images: old recipes keep their pixels, the new changes work on grey and colour, and global state stays."""

from __future__ import annotations

import hashlib
import random
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from supernet.data.augment import Augment, Policy
from supernet.errors import InputError

Mode = Literal["L", "RGB"]
POLICIES: list[Policy] = ["auto", "auto-cifar", "rand", "trivial"]
NEW = [*(Augment(policy=policy) for policy in POLICIES), Augment(erase=1.0), Augment(jitter=0.4)]
ALL = Augment(
    min_area=0.3, flip=0.5, shift=0.1, rotate_degrees=9, policy="rand", magnitude=20, operations=3, erase=0.5, jitter=0.3
)


def noise(mode: Mode, seed: int = 0, width: int = 50, height: int = 37) -> Image.Image:
    shape = (height, width) if mode == "L" else (height, width, 3)
    return Image.fromarray(np.random.default_rng(seed).integers(256, size=shape, dtype=np.uint8))


def draw(augment: Augment, seed: int, mode: Mode = "RGB", resolution: int = 24) -> NDArray[np.uint8]:
    return augment(noise(mode), resolution, np.random.default_rng(seed))


# --- old recipes ---


@pytest.mark.parametrize(
    ("mode", "augment", "digest"),
    [
        ("L", Augment(), "4554aefe2b85a8df"),
        ("L", Augment(flip=0.5, shift=0.125), "b231a6e9b370a66f"),
        ("L", Augment(min_area=0.7, rotate_degrees=8), "2afee36ba1fe01b7"),
        ("L", Augment(min_area=0.08, flip=0.5), "fefe572aa4b7ad27"),
        ("RGB", Augment(), "3cf945356375d83e"),
        ("RGB", Augment(flip=0.5, shift=0.125), "71985d7e7114cb0e"),
        ("RGB", Augment(min_area=0.7, rotate_degrees=8), "823d6cc56fb23cd5"),
        ("RGB", Augment(min_area=0.08, flip=0.5), "240205efd7d4d400"),
    ],
)
def test_recipes_of_before_policies_keep_their_pixels_and_their_draws(mode: Mode, augment: Augment, digest: str) -> None:
    """Hashes of the pixels, and of what the generator gives next, as they were before there were policies (Pillow 13)."""
    found = hashlib.sha256()
    for seed in range(4):
        rng = np.random.default_rng(seed)
        shape = (37, 50) if mode == "L" else (37, 50, 3)
        image = Image.fromarray(rng.integers(256, size=shape, dtype=np.uint8))
        found.update(augment(image, 24, rng).tobytes())
        found.update(rng.bytes(8))
    assert found.hexdigest()[:16] == digest


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_new_draws_come_after_the_old_ones(mode: Mode) -> None:
    """So erasing that hardly ever comes leaves the crops and flips of a recipe as they were."""
    plain = Augment(min_area=0.3, flip=0.5)
    unlikely = Augment(min_area=0.3, flip=0.5, erase=1e-12)
    for seed in range(5):
        np.testing.assert_array_equal(draw(unlikely, seed, mode), draw(plain, seed, mode))


# --- new changes ---


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(st.integers(1, 30), st.integers(1, 30)),
    st.sampled_from(["L", "RGB"]),
    st.builds(
        Augment, policy=st.sampled_from(["none", *POLICIES]), magnitude=st.integers(0, 30), operations=st.integers(1, 4),
        erase=st.sampled_from([0.0, 0.5, 1.0]), jitter=st.floats(0, 1), flip=st.floats(0, 1), rotate_degrees=st.floats(0, 180),
    ),
    st.integers(1, 20),
    st.integers(0, 2**32),
)  # fmt: skip
def test_any_change_gives_bytes_of_the_resolution(
    size: tuple[int, int], mode: Mode, augment: Augment, resolution: int, seed: int
) -> None:
    pixels = augment(noise(mode, 1, *size), resolution, np.random.default_rng(seed))
    assert (pixels.shape, pixels.dtype) == ((resolution, resolution, {"L": 1, "RGB": 3}[mode]), np.uint8)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("augment", NEW, ids=str)
def test_each_changes_most_images_and_differently(augment: Augment, mode: Mode) -> None:
    assert len({draw(augment, seed, mode).tobytes() for seed in range(20)}) > 10
    changed = [not np.array_equal(_square(augment, seed, mode), _square(Augment(), seed, mode)) for seed in range(20)]
    assert sum(changed) > 10


def _square(augment: Augment, seed: int, mode: Mode) -> NDArray[np.uint8]:
    """Of a square image at its own size nothing is cropped, so what differs is what is new."""
    return augment(noise(mode, 3, 24, 24), 24, np.random.default_rng(seed))


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("augment", [*NEW, ALL], ids=str)
def test_the_pixels_follow_from_the_generator_and_global_state_stays(augment: Augment, mode: Mode) -> None:
    torch.manual_seed(1)
    expected = [draw(augment, seed, mode) for seed in range(6)]
    torch.manual_seed(2)
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002
    image = noise(mode)
    before = image.tobytes()
    for seed in reversed(range(6)):
        rng = np.random.default_rng(seed)
        np.testing.assert_array_equal(augment(image, 24, rng), expected[seed])
    assert image.tobytes() == before, "the image is not written to"
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1:] == (random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[index]  # noqa: NPY002


def test_other_devices_generators_are_not_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.manual_seed` would seed every accelerator's generator too, and a fork of the CPU's not put it back."""

    def refuse(seed: int) -> None:
        raise AssertionError(f"seeded with {seed}")

    monkeypatch.setattr(torch, "manual_seed", refuse)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)
    draw(ALL, 0)


class Drawn(Dataset[bytes]):
    def __getitem__(self, seed: int) -> bytes:
        return draw(ALL, seed).tobytes()

    def __len__(self) -> int:
        return 8


def test_worker_processes_make_the_same_pixels() -> None:
    loader: DataLoader[bytes] = DataLoader(Drawn(), batch_size=None, num_workers=2, generator=torch.Generator())
    assert list(loader) == [Drawn()[seed] for seed in range(8)]


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_erasing_makes_one_rectangle_grey(mode: Mode) -> None:
    fractions = []
    for seed in range(30):
        before, after = _square(Augment(), seed, mode), _square(Augment(erase=1.0), seed, mode)
        changed = (before != after).any(2)
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        inside = after[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert (inside == 128).all()
        fractions.append(inside.shape[0] * inside.shape[1] / 24**2)
    assert 0.005 < min(fractions) < 0.08 and 0.25 < max(fractions) < 0.37


def test_erasing_comes_as_often_as_was_asked_for() -> None:
    erased = [not np.array_equal(_square(Augment(erase=0.25), seed, "L"), _square(Augment(), seed, "L")) for seed in range(400)]
    assert np.mean(erased) == pytest.approx(0.25, abs=0.09)  # 4 standard errors


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_jitter_changes_values_but_moves_nothing(mode: Mode) -> None:
    """A plain image stays plain, and its brightness within the factor."""
    plain = Image.new(mode, (9, 9), 100 if mode == "L" else (100, 100, 100))
    found = [Augment(jitter=0.2)(plain, 9, np.random.default_rng(seed)) for seed in range(60)]
    assert all(len(np.unique(pixels)) == 1 for pixels in found)
    values = [int(pixels.flat[0]) for pixels in found]
    assert 78 <= min(values) < 86 and 114 < max(values) <= 122


def test_jitter_keeps_the_hue() -> None:
    red = Image.new("RGB", (5, 5), (150, 60, 60))
    for seed in range(20):
        first, second, third = Augment(jitter=0.4)(red, 5, np.random.default_rng(seed))[0, 0].astype(int)
        assert abs(second - third) <= 1 < first - second


def test_the_magnitude_is_the_strength_of_randaugment() -> None:
    def distance(magnitude: int, operations: int) -> float:
        augment = Augment(policy="rand", magnitude=magnitude, operations=operations)
        moved = [_square(augment, seed, "RGB").astype(int) - _square(Augment(), seed, "RGB") for seed in range(60)]
        return float(np.abs(moved).mean())

    assert distance(2, 1) < distance(28, 1) < distance(28, 4)


def test_policies_differ() -> None:
    seen = {
        policy: b"".join(_square(Augment(policy=policy), seed, "RGB").tobytes() for seed in range(5)) for policy in POLICIES
    }
    assert len(set(seen.values())) == len(POLICIES)


# --- mistakes ---


@pytest.mark.parametrize(
    "change",
    [
        {"min_area": 0.0}, {"flip": -0.1}, {"shift": 0.6}, {"rotate_degrees": float("nan")}, {"magnitude": 31}, {"magnitude": -1},
        {"operations": 0}, {"operations": 11}, {"erase": 1.1}, {"erase": float("nan")}, {"jitter": -0.1}, {"jitter": 2.0},
    ],
)  # fmt: skip
def test_an_augmentation_out_of_range_is_refused_by_name(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=rf"augment\.{next(iter(change))} lies in"):
        Augment(**change)


def test_a_policy_that_is_none_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"augment\.policy is one of \['none', 'auto', 'auto-cifar', 'rand', 'trivial'\], not 'augmix'"
    ):
        Augment(policy="augmix")  # type: ignore[arg-type]
