"""Children on shared nodes against each child alone: every family, any order, any cache, rung by rung or at once."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from search.evaluate import Limits, SharedEvaluator
from search.rungs import Rung
from search.trie import macs_alone, macs_shared
from supernet.arch import Arch
from supernet.data.arrays import ArraySource
from supernet.data.dataset import SplitImages
from supernet.errors import InputError
from supernet.evaluate import Evaluator
from supernet.model import Supernet
from supernet.samples import Samples
from supernet.space import Space
from supernet.task import Classification, Regression

DEFINITIONS: dict[str, dict[str, Any]] = {
    "mbconv": {
        "resolution": [6, 8], "stem": {"width": [8, 16], "stride": 1}, "head": {"expand_ratio": 2, "width": [16, 24]},
        "stages": [{"width": [8, 16], "depth": [1, 3], "kernel_size": [3, 5], "expand_ratio": [1, 2], "stride": 2,
                    "squeeze_excite": True}],
    },
    "resnet": {
        "resolution": [7, 8], "block": "basic", "activation": ["relu", "swish"], "chosen_per": {"expand_ratio": "network"},
        "stem": {"kind": "plain", "width": [8], "stride": 1},
        "stages": [{"width": [8, 16], "depth": [1, 3], "expand_ratio": [1.0, 2.0], "stride": 1}],
    },
    "vit": {
        "resolution": [4, 8], "patch_size": 2, "embed_dim": [7, 10], "depth": [1, 2, 3], "heads": [1, 3], "mlp_ratio": [0.5, 1.3],
        "chosen_per": {"heads": "block", "mlp_ratio": "network"}, "head_dim": 5, "qkv_bias": False, "pool": "token",
    },
    "cell": {
        "resolution": [6, 8], "stem": {"width": [3, 5]}, "stages": 2, "depth": [1, 2], "nodes": 3, "head": {"width": 7},
    },
    "mlp": {"resolution": 8, "depth": [1, 3], "width": [6, 9, 11], "activation": ["relu", "swish"]},
    "autoencoder": {
        "resolution": [6, 8], "stem": {"width": [3, 6]}, "bottleneck": {"width": [4, 7]},
        "stages": [{"width": [5, 8], "depth": [1, 2], "decoder_depth": [1, 3], "kernel_size": [1, 3]}],
    },
}  # fmt: skip
RUNGS = (Rung(11, 8), Rung(24, 16), Rung(40, 32))
MEAN, STD = (0.4,), (0.3,)


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Calibration by eights, so that a few images make several batches."""
    monkeypatch.setattr("search.evaluate.CALIBRATION_BATCH", 8)
    monkeypatch.setattr("supernet.evaluate.CALIBRATION_BATCH", 8)
    yield


def space_of(family: str) -> Space:
    head = {"format": 1, "name": f"tiny-{family}", "family": family, "in_channels": 1}
    classes = {} if family == "autoencoder" else {"classes": 3}
    return Space.from_definition({**head, **classes, **DEFINITIONS[family]})


def source() -> ArraySource:
    rng, labels = np.random.default_rng(0), np.arange(100) % 3
    pixels = rng.integers(0, 120, (100, 8, 8)) + 60 * labels[:, None, None]
    return ArraySource("images", ["a", "b", "c"], labels, [""] * 100, pixels.astype(np.uint8))


def split(name: str, start: int, stop: int) -> SplitImages:
    return SplitImages(name, source(), np.random.default_rng(3).permutation(100)[start:stop], 1.0, MEAN, STD)


@functools.cache
def kept(family: str) -> tuple[Space, Evaluator]:
    """For tests that change nothing in them."""
    return space_of(family), evaluator_of(space_of(family))


def evaluator_of(space: Space, *, double: bool = True) -> Evaluator:
    """Over weights of which none is left at its initial 0 or 1."""
    supernet, generator = Supernet(space), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in supernet.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    task = Regression(STD) if space.family.task == "regression" else Classification()
    return Evaluator(supernet.double() if double else supernet, task, split("train", 40, 100), batch_size=7)


def shared(evaluator: Evaluator, *, limits: Limits | None = None) -> SharedEvaluator:
    return SharedEvaluator(evaluator, split("search_val", 0, 40), RUNGS, limits=limits)


def alone(evaluator: Evaluator, arch: Arch, rung: int) -> Samples:
    """The reference: the child by itself, calibrated on as many images, on the images that the rung adds."""
    one = replace(evaluator, calibration_images=RUNGS[rung].calibration_images)
    start = RUNGS[rung - 1].images if rung else 0
    images = split("search_val", start, RUNGS[rung].images)
    return one.samples(one.calibrated(arch), one.supernet.space.resolution(arch), images)


@functools.cache
def alone_(family: str, arch: Arch, rung: int) -> Samples:
    return alone(kept(family)[1], arch, rung)


def drawn(space: Space, count: int, seed: int = 0) -> list[Arch]:
    """Relatives, so that there is much to share, and strangers."""
    rng = np.random.default_rng(seed)
    parents = [space.sample(rng) for _ in range(2)]
    archs = [*parents, *(space.mutate(parents[i % 2], rng, 0.1) for i in range(count - 3)), space.sample(rng)]
    return list(dict.fromkeys(archs))


def same(found: Samples, wanted: Samples) -> None:
    assert found.keys() == wanted.keys()
    for name, column in wanted.items():
        assert found[name].dtype == column.dtype
        if column.dtype.kind == "f":
            np.testing.assert_allclose(found[name], column, rtol=2e-3 if column.dtype == np.float16 else 1e-5)
        else:
            assert found[name].tolist() == column.tolist(), name


def same_all(found: dict[Arch, Samples], wanted: dict[Arch, Samples]) -> None:
    assert list(found) == list(wanted)
    for arch, samples in wanted.items():
        same(found[arch], samples)


families = pytest.mark.parametrize("family", DEFINITIONS)


@families
def test_children_together_are_each_child_alone(family: str) -> None:
    space, evaluator = kept(family)
    archs = drawn(space, 5)
    together = shared(evaluator)
    for rung in range(3):  # calibration goes on from rung to rung
        found = together.advance(archs, rung)
        assert list(found) == archs
        for arch in archs:
            same(found[arch], alone_(family, arch, rung))
    columns = [[str(column.tolist()) for column in samples.values()] for samples in found.values()]
    assert len({column[-1] for column in columns}) > len(archs) // 2, "the children really differ"


@families
def test_in_single_precision_scores_are_nearly_all_equal(family: str) -> None:
    space = space_of(family)
    evaluator, archs = evaluator_of(space, double=False), drawn(space, 5)
    for arch, found in shared(evaluator).advance(archs, 2).items():
        wanted = alone(evaluator, arch, 2)
        for name, column in wanted.items():
            close = np.isclose(found[name].astype(float), column.astype(float), rtol=1e-2, atol=1e-3)
            assert close.mean() > 0.9, name


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 5), st.lists(st.integers(0, 2), min_size=1, max_size=3), st.randoms())
def test_any_history_gives_what_each_child_gives_alone(seed: int, count: int, history: list[int], random: Any) -> None:
    """Rungs in any order, other archs before, any order of archs, hits and misses of the cache."""
    space, evaluator = kept("mbconv")
    archs = drawn(space, count + 3, seed)
    limits = random.choice([None, Limits(0, 0, 0, 0), Limits(3000, 10**6, 20_000, 2000)])
    together, last = shared(evaluator, limits=limits), random.randrange(3)
    for rung in history:
        together.advance(random.sample(archs, random.randint(0, len(archs))), rung)
    random.shuffle(archs)
    same_all(together.advance(archs, last), {arch: alone_("mbconv", arch, last) for arch in archs})


def test_fewer_calibration_images_than_a_batch() -> None:
    space, evaluator = space_of("mbconv"), evaluator_of(space_of("mbconv"))
    rungs, archs = (Rung(11, 5), Rung(24, 5), Rung(40, 24)), drawn(space, 5)
    together = SharedEvaluator(evaluator, split("search_val", 0, 40), rungs)
    for rung, bounds in enumerate([(0, 11), (11, 24), (24, 40)]):
        one = replace(evaluator, calibration_images=rungs[rung].calibration_images)
        found = together.advance(archs, rung)
        for arch in archs:
            same(found[arch], one.samples(one.calibrated(arch), space.resolution(arch), split("search_val", *bounds)))


def test_more_calibration_images_than_there_are() -> None:
    space = space_of("mbconv")
    evaluator, arch = replace(evaluator_of(space), train=split("train", 79, 100)), space.largest
    together = SharedEvaluator(evaluator, split("search_val", 0, 40), [Rung(40, 1000)])
    one = replace(evaluator, calibration_images=1000)
    wanted = one.samples(one.calibrated(arch), space.resolution(arch), split("search_val", 0, 40))
    same(together.advance([arch], 0)[arch], wanted)


# --- what it takes ---


def ends_of(space: Space) -> list[Arch]:
    """Children that part behind the first blocks."""
    largest = space.largest.as_dict()
    return [space.arch({**largest, "stage1.depth": depth, "head.width": width}) for depth in (1, 3) for width in (16, 24)]


def test_shared_nodes_are_computed_once_and_counted_so() -> None:
    space, evaluator = kept("mbconv")
    archs, together = ends_of(space), shared(evaluator)
    together.advance(archs, 0)
    assert together.spent.image_forwards == 11 * len(archs)
    assert together.spent.calibration_forwards == 8 * len(archs)
    assert macs_shared(space, archs) < 0.7 * macs_alone(space, archs)
    assert together.spent.macs == (11 + 8) * macs_shared(space, archs)


@pytest.mark.slow
def test_calibration_goes_on_where_it_was() -> None:
    space, evaluator = kept("mbconv")
    archs, together = drawn(space, 8), shared(evaluator)
    together.advance(archs, 0)
    before = together.spent
    together.advance(archs, 1)  # 8 images are behind it
    assert together.spent.calibration_forwards - before.calibration_forwards == 8 * len(archs)
    assert together.spent.macs - before.macs == (24 - 11 + 8) * macs_shared(space, archs)
    before = together.spent
    together.advance(archs, 1)
    assert together.spent.calibration_forwards == before.calibration_forwards
    assert together.spent.macs - before.macs == (24 - 11) * macs_shared(space, archs)


def test_statistics_of_a_lower_rung_serve_again_after_a_higher_one() -> None:
    space, evaluator = kept("mbconv")
    archs, together = drawn(space, 4), shared(evaluator)
    for rung in (0, 2, 0):
        before = together.spent
        together.advance(archs, rung)
    assert together.spent.calibration_forwards == before.calibration_forwards


def test_a_prefix_that_is_calibrated_runs_only_to_feed_what_is_new() -> None:
    space, evaluator = kept("mbconv")
    one = space.arch({**space.largest.as_dict(), "head.width": 16})
    together = shared(evaluator)
    together.advance([space.largest], 0)
    before = together.spent
    together.advance([space.largest, one], 0)
    assert together.spent.calibration_forwards - before.calibration_forwards == 8
    assert together.spent.macs - before.macs == 11 * macs_shared(space, [space.largest, one]) + 8 * macs_alone(space, [one])


def test_networks_without_batch_norm_are_not_calibrated() -> None:
    space, evaluator = kept("vit")
    together = shared(evaluator)
    together.advance([space.largest], 0)
    assert together.spent.calibration_forwards == 0
    assert together.spent.macs == 11 * macs_alone(space, [space.largest])


def test_images_are_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    (space, evaluator), decoded = kept("mbconv"), []
    real = SplitImages.pixels

    def spy(self: SplitImages, resolution: int, images: int | None = None) -> Any:
        decoded.extend((self.name, resolution, int(index)) for index in self.indices[:images])
        return real(self, resolution, images)

    monkeypatch.setattr(SplitImages, "pixels", spy)
    together, archs = shared(evaluator), drawn(space, 8)
    assert len({space.resolution(arch) for arch in archs}) == 2
    for rung in (0, 0, 1, 2, 2):
        together.advance(archs, rung)
    assert len(decoded) == len(set(decoded)) == 2 * (32 + 40)


def test_activations_wait_only_where_paths_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain of blocks holds no more than a block's input and output."""
    (space, evaluator), alive, most = kept("mbconv"), [], []
    real = nn.Module.__call__

    def spy(self: nn.Module, *args: Any) -> Any:
        outputs = real(self, *args)
        if self.__class__.__name__ in {"ConvNorm", "MBConv"}:
            alive.append(weakref.ref(outputs))
            most.append(sum(one() is not None for one in alive))
        return outputs

    monkeypatch.setattr(nn.Module, "__call__", spy)
    shared(evaluator).advance([space.largest], 0)
    assert len(most) > 10
    assert max(most) <= 5


# --- failures ---


def test_no_archs_and_the_same_arch_twice() -> None:
    space, evaluator = kept("mbconv")
    together = shared(evaluator)
    assert together.advance([], 0) == {}
    assert together.spent.macs == 0
    assert list(together.advance([space.largest] * 3, 0)) == [space.largest]
    assert together.spent.image_forwards == 11


def test_weights_that_are_not_finite_make_a_child_wrong_and_leave_the_others() -> None:
    space = space_of("mbconv")
    evaluator = evaluator_of(space)
    narrow, wide = (space.arch({**space.largest.as_dict(), "head.width": width}) for width in (16, 24))
    wanted = shared(evaluator).advance([narrow], 0)[narrow]
    with torch.no_grad():
        evaluator.supernet.get_parameter("head.classifier.weight")[:, 20] = torch.nan
    found = shared(evaluator).advance([narrow, wide], 0)
    same(found[narrow], wanted)
    assert (found[wide]["rank"] == 2).all()
    assert np.isfinite(found[wide]["loss"]).all()


@pytest.mark.parametrize("where", ["extracting", "calibrating", "scoring"])
def test_a_child_that_fails_takes_no_other_with_it(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    space = space_of("mbconv")
    evaluator = evaluator_of(space)
    narrow, wide = (space.arch({**space.largest.as_dict(), "head.width": width}) for width in (16, 24))
    wanted, together = shared(evaluator).advance([narrow], 0)[narrow], shared(evaluator)
    if where == "extracting":
        real = Supernet.extract_block

        def extract_block(self: Supernet, slot: str, spec: Any) -> nn.Module:
            if slot == "head" and spec == space.plan(wide)["head"]:
                raise RuntimeError("no memory")
            return real(self, slot, spec)

        monkeypatch.setattr(Supernet, "extract_block", extract_block)
    else:
        calls = []
        forward = nn.Linear.forward

        def linear(self: nn.Linear, x: Tensor) -> Tensor:
            calls.append(x.shape)
            if self.in_features == 24 and self.out_features == 3 and len(calls) > {"calibrating": 0, "scoring": 2}[where]:
                raise RuntimeError("no memory")
            return forward(self, x)

        monkeypatch.setattr(nn.Linear, "forward", linear)
    found = together.advance([wide, narrow], 0)
    assert list(found) == [narrow]
    same(found[narrow], wanted)
    assert together.failed == {wide: "RuntimeError: no memory"}
    monkeypatch.undo()


def test_after_an_interrupt_nothing_wrong_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    space, evaluator = kept("mbconv")
    archs = drawn(space, 4)
    together, real, calls = shared(evaluator), nn.Conv2d.forward, []

    def interrupted(self: nn.Conv2d, x: Tensor) -> Tensor:
        calls.append(None)
        if len(calls) == 70:
            raise KeyboardInterrupt
        return real(self, x)

    monkeypatch.setattr(nn.Conv2d, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        together.advance(archs, 2)
    same_all(together.advance(archs, 2), shared(evaluator).advance(archs, 2))


@pytest.mark.parametrize(
    "rungs", [(), (Rung(41, 8),), (Rung(20, 8), Rung(20, 8)), (Rung(20, 8), Rung(10, 8)), (Rung(0, 8),)], ids=str
)
def test_rungs_that_add_no_images(rungs: tuple[Rung, ...]) -> None:
    with pytest.raises(InputError, match=r"rungs add images up to those of the split, 40, but got .*: give other rungs"):
        SharedEvaluator(evaluator_of(space_of("mbconv")), split("search_val", 0, 40), rungs)


@pytest.mark.parametrize(("train", "calibration_images"), [(100, 8), (40, 0)])
def test_nothing_to_calibrate_by(train: int, calibration_images: int) -> None:
    evaluator = replace(evaluator_of(space_of("mbconv")), train=split("train", train, 100))
    with pytest.raises(InputError, match="calibration needs at least 1 training image, but there is none: give more images"):
        SharedEvaluator(evaluator, split("search_val", 0, 40), [Rung(40, calibration_images)])
