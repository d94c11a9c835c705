"""Which part of a stored parameter a child uses."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from supernet.slicing import part_of


def test_channels_lead_and_kernels_are_central() -> None:
    assert part_of((8, 4, 5, 5), (6, 3, 3, 3)) == (slice(0, 6), slice(0, 3), slice(1, 4), slice(1, 4))
    assert part_of((8, 4, 7, 7), (8, 4, 1, 1)) == (slice(0, 8), slice(0, 4), slice(3, 4), slice(3, 4))


def test_vectors_and_matrices_have_no_window() -> None:
    assert part_of((10,), (4,)) == (slice(0, 4),)
    assert part_of((10, 10), (4, 9)) == (slice(0, 4), slice(0, 9))
    assert part_of((), ()) == ()


def test_even_kernels_within_even_ones_have_a_centre() -> None:
    assert part_of((1, 1, 4), (1, 1, 2))[2] == slice(1, 3)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 4)), min_size=1, max_size=4))
def test_the_part_has_the_asked_shape_and_sits_where_the_rule_says(axes: list[tuple[int, int]]) -> None:
    part = tuple(small for small, _ in axes)
    whole = tuple(small + extra * (2 if axis >= 2 else 1) for axis, (small, extra) in enumerate(axes))
    piece = np.arange(np.prod(whole)).reshape(whole)[part_of(whole, part)]
    assert piece.shape == part
    first = np.unravel_index(piece.flat[0], whole)
    assert first == tuple(0 if axis < 2 else extra for axis, (_, extra) in enumerate(axes))


@given(st.lists(st.integers(1, 4), min_size=3, max_size=3), st.lists(st.integers(0, 3), min_size=3, max_size=3))
def test_a_part_of_a_part_is_a_part_of_the_whole(small: list[int], extra: list[int]) -> None:
    middle = [a + b * 2 for a, b in zip(small, extra, strict=True)]
    whole = [a + 2 for a in middle]
    store = np.arange(np.prod(whole)).reshape(whole)
    assert np.array_equal(store[part_of(whole, small)], store[part_of(whole, middle)][part_of(middle, small)])


@pytest.mark.parametrize(
    ("whole", "part"), [((4, 4), (5, 4)), ((4, 4), (4, 5)), ((4, 4), (4,)), ((4,), (4, 1)), ((1, 1, 3), (1, 1, 5))]
)
def test_what_does_not_fit_is_an_error(whole: tuple[int, ...], part: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="a part must fit into the whole axis by axis"):
        part_of(whole, part)


def test_an_even_kernel_has_no_centre_within_an_odd_one() -> None:
    with pytest.raises(ValueError, match="a kernel of 4 has no centre within 7"):
        part_of((1, 1, 7, 7), (1, 1, 4, 4))
