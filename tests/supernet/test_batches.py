"""Training batches from (seed, step), augmentation, and the pixels of evaluation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from supernet.data.batches import Augment, TrainingBatches, channel_statistics, images_at
from supernet.data.sources import ArraySource, Source, open_source
from supernet.errors import InputError
from supernet.preprocess import Preprocessing

EVERYTHING = Augment(min_area=0.3, flip=0.5, shift=0.125, rotate_degrees=10)
PLAIN = Augment()


def source_of(count: int, channels: int = 3, side: int = 10) -> ArraySource:
    shape = (count, side, side, channels)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return ArraySource("toy", ["a", "b"], np.arange(count) % 2, [""] * count, pixels)


def photos(root: Path, count: int = 8) -> Source:
    rng = np.random.default_rng(1)
    for i in range(count):
        path = root / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20 + i, 25, 3), dtype=np.uint8)).save(path)
    return open_source(str(root))


def batches_of(
    source: Source, *, batch_size: int = 4, augment: Augment = EVERYTHING, seed: int = 0, workers: int = 0
) -> TrainingBatches:
    indices = np.arange(len(source))
    return TrainingBatches(
        source, indices, batch_size=batch_size, resolution=8, augment=augment, seed=seed, workers=workers
    )  # fmt: skip


def same(ours: list[tuple[torch.Tensor, torch.Tensor]], theirs: list[tuple[torch.Tensor, torch.Tensor]]) -> bool:
    pairs = zip(ours, theirs, strict=True)
    return all(torch.equal(x, y) for one, other in pairs for x, y in zip(one, other, strict=True))


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 3))
def test_an_epoch_is_every_image_at_most_once_and_nearly_all_of_them(count: int, batch_size: int, epoch: int) -> None:
    indices = np.arange(100, 100 + count)
    batches = TrainingBatches(source_of(40), indices, batch_size=batch_size, resolution=8, augment=PLAIN, seed=5)
    steps = batches.steps_per_epoch
    seen = [int(i) for step in range(epoch * steps, (epoch + 1) * steps) for i in batches.batch_indices(step)]
    assert steps == max(1, count // batch_size)
    assert len(seen) == len(set(seen)) == steps * min(batch_size, count)
    assert set(seen) <= set(indices.tolist())


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [
        batches_of(source_of(20), batch_size=20, seed=seed).batch_indices(step).tolist() for seed in (0, 1) for step in (0, 1)
    ]
    assert len({tuple(order) for order in orders}) == 4


def test_a_resume_sees_the_batches_of_an_uninterrupted_run() -> None:
    source = source_of(19)
    whole = list(batches_of(source).batches(0, 11))
    assert same(whole[6:], list(batches_of(source).batches(6, 11)))
    assert list(batches_of(source).batches(3, 3)) == []


def test_steps_may_be_asked_for_in_any_order() -> None:
    batches = batches_of(source_of(19))
    forwards = [batches.batch_indices(step).tolist() for step in range(9)]
    assert [batches.batch_indices(step).tolist() for step in reversed(range(9))] == forwards[::-1]


def test_a_batch_holds_the_images_and_labels_of_its_indices() -> None:
    source = source_of(12, side=8)
    batches = batches_of(source, augment=PLAIN)
    images, labels = next(batches.batches(1, 2))
    indices = batches.batch_indices(1)
    assert (images.dtype, images.shape, images.is_contiguous(), labels.dtype) == (torch.uint8, (4, 3, 8, 8), True, torch.int64)
    np.testing.assert_array_equal(images.numpy(), source.pixels[indices].transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(labels.numpy(), source.labels[indices])


def test_an_image_is_changed_anew_in_every_epoch() -> None:
    batches = batches_of(source_of(2), batch_size=2)
    places = [batches.batch_indices(step).tolist().index(0) for step in range(9)]
    views = [images[place] for place, (images, _) in zip(places, batches.batches(0, 9), strict=True)]
    assert len({view.numpy().tobytes() for view in views}) == 9


def test_batches_leave_torchs_and_numpys_global_generators_alone() -> None:
    torch_state = torch.random.get_rng_state()
    numpy_state = np.random.get_state()[1].tolist()  # type: ignore[index,union-attr]  # noqa: NPY002
    list(batches_of(source_of(9)).batches(0, 4))
    assert torch.equal(torch.random.get_rng_state(), torch_state)
    assert np.random.get_state()[1].tolist() == numpy_state  # type: ignore[index,union-attr]  # noqa: NPY002


def test_workers_change_no_bit(tmp_path: Path) -> None:
    for source in (source_of(19), photos(tmp_path)):
        alone = list(batches_of(source).batches(2, 9))
        torch_state = torch.random.get_rng_state()
        assert same(alone, list(batches_of(source, workers=2).batches(2, 9)))
        assert same(alone, list(batches_of(source, workers=99).batches(2, 9)))
        assert torch.equal(torch.random.get_rng_state(), torch_state)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_cannot_be_read_stops_with_one_line_that_names_it(tmp_path: Path, workers: int) -> None:
    source = photos(tmp_path)
    (tmp_path / "a" / "4.png").write_bytes((tmp_path / "a" / "4.png").read_bytes()[:-200])
    batches = batches_of(source, batch_size=1, workers=workers)
    bad = next(step for step in range(8) if source.identity(int(batches.batch_indices(step)[0])) == "a/4.png")
    steps = batches.batches(0, 8)
    assert len([next(steps) for _ in range(bad)]) == bad
    with pytest.raises(InputError, match=r"a/4\.png: .*: repair the file or remove it") as caught:
        next(steps)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change", [{"batch_size": 0}, {"resolution": 0}, {"seed": -1}, {"workers": -1}, {"indices": np.arange(0)}]
)
def test_numbers_without_a_meaning_are_refused(change: dict[str, object]) -> None:
    options = {"indices": np.arange(9), "batch_size": 2, "resolution": 8, "augment": PLAIN, "seed": 0} | change
    with pytest.raises(InputError):
        TrainingBatches(source_of(9), **options)  # type: ignore[arg-type]


@settings(deadline=None)
@given(
    st.tuples(st.integers(1, 30), st.integers(1, 30)),
    st.sampled_from(["L", "RGB"]),
    st.builds(
        Augment,
        min_area=st.floats(0.01, 1),
        flip=st.floats(0, 1),
        shift=st.floats(0, 0.5),
        rotate_degrees=st.floats(0, 180),
    ),
    st.integers(1, 20),
)
def test_any_augmentation_gives_the_resolution(size: tuple[int, int], mode: str, augment: Augment, resolution: int) -> None:
    pixels = augment(Image.new(mode, size), resolution, np.random.default_rng(0))
    assert (pixels.shape, pixels.dtype) == ((resolution, resolution, {"L": 1, "RGB": 3}[mode]), np.uint8)


def gradient(height: int, width: int) -> Image.Image:
    """Grey, brighter to the right by 5 per pixel."""
    return Image.fromarray(np.broadcast_to(np.arange(width, dtype=np.uint8) * 5, (height, width)).copy())


def test_the_default_keeps_the_short_sides_square() -> None:
    image = source_of(2, channels=1).image(0)
    np.testing.assert_array_equal(PLAIN(image, 10, np.random.default_rng(0))[..., 0], np.asarray(image))
    wide = gradient(10, 30)
    lefts = {int(PLAIN(wide, 10, np.random.default_rng(seed))[0, 0, 0]) // 5 for seed in range(200)}
    assert lefts == set(range(21))


def test_a_flip_of_probability_one_mirrors_and_of_zero_never() -> None:
    image = source_of(2, channels=1).image(0)
    for seed in range(20):
        flipped = Augment(flip=1.0)(image, 10, np.random.default_rng(seed))[..., 0]
        np.testing.assert_array_equal(flipped, np.asarray(image)[:, ::-1])
        np.testing.assert_array_equal(PLAIN(image, 10, np.random.default_rng(seed))[..., 0], np.asarray(image))


def test_a_shift_is_pad_by_reflection_and_crop() -> None:
    image = source_of(2, channels=1, side=8).image(0)
    padded = np.pad(np.asarray(image), 1, mode="reflect")
    possible = {padded[top : top + 8, left : left + 8].tobytes() for top in range(3) for left in range(3)}
    seen = {Augment(shift=0.125)(image, 8, np.random.default_rng(seed)).tobytes() for seed in range(200)}
    assert seen == possible


def test_crops_have_the_area_and_aspect_that_were_asked_for() -> None:
    image, areas, aspects = gradient(40, 50), [], []
    for seed in range(300):
        width, height = Augment(min_area=0.2)._crop_size(image, np.random.default_rng(seed))
        areas.append(width * height / 2000)
        aspects.append(width / height)
    assert 0.18 < min(areas) < 0.25
    assert 0.9 < max(areas) <= 1
    assert 0.72 < min(aspects) < 0.8
    assert 1.25 < max(aspects) < 1.37
    assert abs(np.mean(np.log(aspects))) < 0.05


def test_rotation_stays_within_its_angle() -> None:
    image = Image.new("L", (41, 41))
    image.putpixel((40, 20), 255)  # to the right of the centre
    angles = []
    for seed in range(100):
        pixels = Augment(rotate_degrees=30)(image, 41, np.random.default_rng(seed))[..., 0]
        row, column = np.unravel_index(pixels.argmax(), pixels.shape)
        angles.append(np.degrees(np.arctan2(20 - row, column - 20)))
    assert -32 < min(angles) < -24
    assert 24 < max(angles) < 32


@pytest.mark.parametrize(
    "change", [{"min_area": 0.0}, {"min_area": 1.1}, {"flip": -0.1}, {"shift": 0.6}, {"rotate_degrees": float("nan")}]
)
def test_an_augmentation_out_of_range_is_refused_by_name(change: dict[str, float]) -> None:
    with pytest.raises(InputError, match=rf"augment\.{next(iter(change))} lies in"):
        Augment(**change)


def test_evaluation_sees_exactly_what_deployment_sees(tmp_path: Path) -> None:
    preprocessing = Preprocessing(8, 0.875, mean=(0.5,) * 3, std=(0.5,) * 3)
    for source in (source_of(9), photos(tmp_path)):
        indices = np.array([5, 0, 3])
        pixels = images_at(source, indices, preprocessing)
        expected = preprocessing([source.image(int(i)) for i in indices])
        np.testing.assert_array_equal(preprocessing.normalise(pixels), expected)
        assert images_at(source, indices[:0], preprocessing).shape == (0, 8, 8, 3)


def test_evaluation_refuses_another_number_of_channels() -> None:
    with pytest.raises(InputError, match="has 3 channels, but the preprocessing is for 1"):
        images_at(source_of(3), np.arange(3), Preprocessing(8, mean=(0.5,), std=(0.5,)))


def test_evaluation_names_the_file_that_cannot_be_read(tmp_path: Path) -> None:
    source = photos(tmp_path)
    (tmp_path / "b" / "3.png").write_text("x")
    with pytest.raises(InputError, match=r"b/3\.png"):
        images_at(source, np.arange(8), Preprocessing(8, mean=(0.5,) * 3, std=(0.5,) * 3))


def test_statistics_are_those_of_all_pixels(tmp_path: Path) -> None:
    source = photos(tmp_path)
    pixels = np.concatenate([np.asarray(source.image(i)).reshape(-1, 3) for i in (1, 4, 6)]) / 255
    mean, std = channel_statistics(source, np.array([1, 4, 6]))
    assert mean == tuple(np.round(pixels.mean(0), 4).tolist())
    assert std == tuple(np.round(pixels.std(0), 4).tolist())


def test_statistics_read_no_more_images_than_the_limit() -> None:
    source = source_of(50, channels=1)
    assert channel_statistics(source, np.arange(50), limit=2) == channel_statistics(source, np.array([0, 49]))


def test_a_channel_that_does_not_vary_gets_a_deviation_of_one() -> None:
    source = ArraySource("flat", ["a", "b"], np.arange(2), ["", ""], np.full((2, 4, 4), 51, np.uint8))
    assert channel_statistics(source, np.arange(2)) == ((0.2,), (1.0,))
