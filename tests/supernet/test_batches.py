"""Training batches from (seed, step), augmentation, and the pixels of evaluation."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from supernet.data.batches import Augment, Batch, TrainingBatches, channel_statistics, images_at
from supernet.data.sources import ArraySource, Source, Unreadable, open_source
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


def same(ours: list[Batch], theirs: list[Batch]) -> bool:
    pairs = zip(ours, theirs, strict=True)
    return all(torch.equal(x.images, y.images) and torch.equal(x.labels, y.labels) for x, y in pairs)


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
    images, labels, _ = next(batches.batches(1, 2))
    indices = batches.batch_indices(1)
    assert (images.dtype, images.shape, images.is_contiguous(), labels.dtype) == (torch.uint8, (4, 3, 8, 8), True, torch.int64)
    np.testing.assert_array_equal(images.numpy(), source.pixels[indices].transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(labels.numpy(), source.labels[indices])


def test_an_image_is_changed_anew_in_every_epoch() -> None:
    batches = batches_of(source_of(2), batch_size=2)
    places = [batches.batch_indices(step).tolist().index(0) for step in range(9)]
    views = [images[place] for place, (images, *_) in zip(places, batches.batches(0, 9), strict=True)]
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


# --- repeats, balance, ranks ---


def uneven(sizes: Sequence[int], side: int = 4) -> ArraySource:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    pixels = np.random.default_rng(0).integers(0, 256, (len(labels), side, side), dtype=np.uint8)
    return ArraySource("uneven", [str(i) for i in range(len(sizes))], labels, [""] * len(labels), pixels)


def made_of(source: Source, **options: object) -> TrainingBatches:
    given = {"batch_size": 12, "resolution": 4, "augment": EVERYTHING, "seed": 0} | options
    return TrainingBatches(source, np.arange(len(source)), **given)  # type: ignore[arg-type]


def epoch_of(batches: TrainingBatches, epoch: int = 0) -> np.ndarray:
    steps = batches.steps_per_epoch
    return np.concatenate([batches.batch_indices(step) for step in range(epoch * steps, (epoch + 1) * steps)])


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 40), st.integers(0, 2))
def test_repeats_show_a_part_of_the_images_so_many_times_in_one_batch(repeats: int, times: int, more: int, epoch: int) -> None:
    batch_size = repeats * times
    source = uneven([batch_size + more, 3])
    once, batches = made_of(source, batch_size=batch_size), made_of(source, batch_size=batch_size, repeats=repeats)
    assert batches.steps_per_epoch == once.steps_per_epoch
    seen: list[int] = []
    for step in range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch):
        images, counts = np.unique(batches.batch_indices(step), return_counts=True)
        assert counts.tolist() == [repeats] * times
        seen += images.tolist()
    assert len(seen) == len(set(seen)) == batches.steps_per_epoch * times
    assert set(seen) <= set(epoch_of(once, epoch).tolist()) | set(range(len(source)))


def test_the_copies_of_an_image_are_changed_each_in_its_own_way() -> None:
    batches = made_of(uneven([12, 12], side=12), batch_size=24, repeats=4, resolution=8)
    images, labels, _ = next(batches.batches(3, 4))
    indices = batches.batch_indices(3)
    assert len({image.numpy().tobytes() for image in images}) == 24
    assert labels.tolist() == batches.source.labels[indices].tolist()
    first = made_of(uneven([12, 12], side=12), batch_size=6, resolution=8)
    assert len(set(indices[:6].tolist())) == 6
    still = made_of(uneven([12, 12], side=12), batch_size=24, repeats=4, resolution=8, augment=PLAIN)
    images, _, _ = next(still.batches(3, 4))
    assert torch.equal(images[:6], images[6:12])
    assert first.steps_per_epoch == 4


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), min_size=2, max_size=6), st.sampled_from([1, 2, 3]), st.integers(0, 2))
def test_balanced_classes_come_equally_often_and_images_of_a_class_too(sizes: list[int], repeats: int, epoch: int) -> None:
    source = uneven(sizes)
    if len(source) < 6:
        return
    batches = made_of(source, batch_size=6, repeats=repeats, balance="class")
    seen = epoch_of(batches, epoch)
    assert len(seen) == batches.steps_per_epoch * 6
    per_class = np.bincount(source.labels[seen], minlength=len(sizes)) / repeats
    assert per_class.max() - per_class.min() <= 1
    for label in range(len(sizes)):
        per_image = np.bincount(seen, minlength=len(source))[source.labels == label] / repeats
        assert per_image.max() - per_image.min() <= 1


def test_sqrt_draws_by_the_square_root_of_the_class_and_orders_follow_seed_and_epoch() -> None:
    source = uneven([400, 100, 25])
    batches = made_of(source, batch_size=35, balance="sqrt")
    assert np.bincount(source.labels[epoch_of(batches)]).tolist() == [300, 150, 75]
    orders = [epoch_of(made_of(source, balance=balance, seed=seed), epoch) for balance in ("class", "sqrt") for seed in (0, 1)
              for epoch in (0, 1)]  # fmt: skip
    assert len({order.tobytes() for order in orders}) == 8
    assert epoch_of(made_of(source, balance="class"), 1).tobytes() == orders[1].tobytes()


def test_an_image_drawn_several_times_is_changed_each_time_in_its_own_way() -> None:
    batches = made_of(uneven([20, 1], side=12), batch_size=21, resolution=8, balance="class")
    images, labels, _ = next(batches.batches(0, 1))
    alone = [image.numpy().tobytes() for image, label in zip(images, labels, strict=True) if label == 1]
    assert len(alone) == len(set(alone)) >= 10


@pytest.mark.parametrize("options", [{}, {"repeats": 2}, {"balance": "class"}, {"repeats": 3, "balance": "sqrt"}])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_ranks_batches_make_up_that_of_one_process(options: dict[str, object], ranks: int) -> None:
    source = uneven([40, 17])
    whole = list(made_of(source, **options).batches(2, 7))
    pieces = [list(made_of(source, **options, rank=rank, ranks=ranks).batches(2, 7)) for rank in range(ranks)]
    for step, batch in enumerate(whole):
        images = torch.cat([piece[step].images for piece in pieces])
        labels = torch.cat([piece[step].labels for piece in pieces])
        assert torch.equal(images, batch.images)
        assert torch.equal(labels, batch.labels)
        assert {len(piece[step].labels) for piece in pieces} == {12 // ranks}


def test_with_repeats_and_balance_workers_and_resumes_change_no_bit(tmp_path: Path) -> None:
    source = photos(tmp_path, 18)
    options = {"repeats": 2, "balance": "class", "rank": 1, "ranks": 2, "batch_size": 8}
    alone = list(made_of(source, **options).batches(0, 9))
    assert same(alone, list(made_of(source, **options, workers=2).batches(0, 9)))
    assert same(alone[4:], list(made_of(source, **options).batches(4, 9)))


def test_a_small_split_makes_the_batch_smaller_so_that_ranks_and_repeats_divide_it() -> None:
    assert made_of(uneven([10, 7]), batch_size=64).batch_size == 17
    assert made_of(uneven([10, 7]), batch_size=64, ranks=4).batch_size == 16
    assert made_of(uneven([10, 7]), batch_size=60, ranks=4, repeats=3).batch_size == 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"repeats": 0}, "repeats is at least 1, not 0"),
        ({"ranks": 0}, "ranks is at least 1, not 0"),
        ({"repeats": 5}, "repeats divides it, but 12 is no multiple of 5"),
        ({"ranks": 5}, "ranks divides it, but 12 is no multiple of 5"),
        ({"rank": 2, "ranks": 2}, "rank is 0 to 1 of 2 ranks, not 2"),
        ({"rank": -1}, "rank is 0 to 0"),
        ({"balance": "classes"}, "balance is one of none, class, sqrt"),
        ({"skip_unreadable": 1.0}, "fraction of the images"),
        ({"skip_unreadable": -0.1}, "fraction of the images"),
        ({"skip_unreadable": float("nan")}, "fraction of the images"),
        ({"batch_size": 120, "ranks": 60}, "17 images to train on make no batch of 60 ranks"),
    ],
)
def test_options_without_a_meaning_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        made_of(uneven([10, 7]), **change)


class OneMissing(ArraySource):
    def image(self, i: int) -> Image.Image:
        if i == 5:
            raise Unreadable("5", "is missing")
        return super().image(i)


def test_batches_keep_no_more_of_many_epochs_than_of_few() -> None:
    plain = uneven([300, 100])
    source = OneMissing("toy", plain.classes, plain.labels, plain.parts, plain.pixels)
    batches = made_of(source, batch_size=200, repeats=2, balance="sqrt", skip_unreadable=0.01, augment=PLAIN)

    def bytes_after(first: int, last: int) -> int:
        for _ in batches.batches(first, last):
            pass
        return len(pickle.dumps(batches))

    assert bytes_after(0, 6) == bytes_after(6, 20)
    assert batches.unreadable == {5: "5: is missing"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_may_lie_in_pinned_memory() -> None:
    batches = [*made_of(uneven([12, 12]), pin=True, workers=2).batches(0, 3)]
    assert all(batch.images.is_pinned() and batch.labels.is_pinned() for batch in batches)
    assert same(batches, [*made_of(uneven([12, 12])).batches(0, 3)])


# --- images that cannot be read ---


def damaged(root: Path, *names: str, count: int = 20) -> Source:
    """Photos of which some became unreadable after they were opened."""
    source = photos(root, count)
    for name in names:
        path = root / name
        path.write_bytes(path.read_bytes()[:-200])
    return source


@pytest.mark.parametrize("workers", [0, 2])
def test_another_image_of_the_class_stands_in_and_each_is_told_once(tmp_path: Path, workers: int) -> None:
    source = damaged(tmp_path, "a/4.png", "b/7.png", "b/9.png")
    batches = made_of(source, batch_size=5, resolution=8, workers=workers, skip_unreadable=0.2)
    made = list(batches.batches(0, 24))
    told = [text for batch in made for text in batch.unreadable]
    assert sorted(told) == sorted(set(told))
    assert [text.split(": ")[0] for text in sorted(told)] == [
        str(tmp_path / name) for name in ("a/4.png", "b/7.png", "b/9.png")
    ]
    assert set(batches.unreadable.values()) == set(told)
    for step, batch in enumerate(made):
        assert batch.labels.tolist() == source.labels[batches.batch_indices(step)].tolist()
    assert same(made, list(made_of(source, batch_size=5, resolution=8, skip_unreadable=0.9).batches(0, 24)))
    assert same(made[7:], list(made_of(source, batch_size=5, resolution=8, skip_unreadable=0.2).batches(7, 24)))


def test_what_stands_in_is_another_image_of_the_class_and_not_always_the_same(tmp_path: Path) -> None:
    source = damaged(tmp_path, "a/4.png")
    plain = {
        Augment()(source.image(i), 8, np.random.default_rng(0)).tobytes(): i
        for i in range(20)
        if source.identity(i) != "a/4.png"
    }
    bad = next(i for i in range(20) if source.identity(i) == "a/4.png")
    batches = made_of(source, batch_size=20, resolution=8, augment=CentreOnly(), skip_unreadable=0.1)
    others = []
    for step, batch in enumerate(batches.batches(0, 12)):
        row = batches.batch_indices(step).tolist().index(bad)
        others.append(plain[batch.images[row].permute(1, 2, 0).contiguous().numpy().tobytes()])
    assert {int(source.labels[i]) for i in others} == {int(source.labels[bad])}
    assert len(set(others)) > 3


class CentreOnly(Augment):
    """Changes nothing by chance, so that an image can be recognised."""

    def __call__(self, image: Image.Image, resolution: int, rng: np.random.Generator) -> np.ndarray:
        return super().__call__(image, resolution, np.random.default_rng(0))


@pytest.mark.parametrize("workers", [0, 2])
def test_above_the_limit_the_run_ends_naming_paths(tmp_path: Path, workers: int) -> None:
    source = damaged(tmp_path, "a/4.png", "b/7.png", "b/9.png")
    batches = made_of(source, batch_size=5, resolution=8, workers=workers, skip_unreadable=0.1)
    with pytest.raises(
        InputError, match=r"3 of 20 training images cannot be read, and skip_unreadable 0\.1 allows 2 \("
    ) as caught:
        list(batches.batches(0, 8))
    assert all(str(tmp_path / name) in str(caught.value) for name in ("a/4.png", "b/7.png", "b/9.png"))
    assert "\n" not in str(caught.value)


def test_a_class_without_any_readable_image_ends_the_run(tmp_path: Path) -> None:
    source = damaged(tmp_path, *(f"a/{i}.png" for i in range(0, 8, 2)), count=8)
    with pytest.raises(InputError, match="no image of class 'a' can be read"):
        list(made_of(source, batch_size=2, resolution=8, skip_unreadable=0.9).batches(0, 4))


def test_statistics_pass_over_what_cannot_be_read_only_when_told_to(tmp_path: Path) -> None:
    source = damaged(tmp_path, "a/4.png", count=8)
    with pytest.raises(InputError, match=r"a/4\.png"):
        channel_statistics(source, np.arange(8))
    whole = np.array([i for i in range(8) if source.identity(i) != "a/4.png"])
    assert channel_statistics(source, np.arange(8), skip_unreadable=True) == channel_statistics(source, whole)
    with pytest.raises(InputError, match="of 1 training images none can be read"):
        channel_statistics(source, np.setdiff1d(np.arange(8), whole), skip_unreadable=True)
