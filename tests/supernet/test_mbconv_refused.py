"""Inverted-residual spaces that are no networks: each mistake is named in one line, with its key and the remedy."""

from __future__ import annotations

import json

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from supernet.errors import InputError
from supernet.space import Space
from tests.supernet.test_mbconv import small, space_of

REFUSED: list[tuple[str, object, str]] = [
    ("stages.0.kernel_size", [2], "stages.0.kernel_size: kernel sizes must be odd"),
    ("stages.0.kernel_size", 3, "stages.0.kernel_size: must be a list of choices"),
    ("stages.0.kernel_size", [5, 3], "stages.0.kernel_size: choices must be listed smallest first"),
    ("stages.0.kernel_size", [], "stages.0.kernel_size: choices must be listed smallest first"),
    ("stages.0.kernel_size", [[3], []], "stages.0.kernel_size: choices must be listed smallest first"),
    ("stages.0.kernel_size", [[3], [3]], "stages.0.kernel_size: a list for each block needs chosen_per: {kernel_size: block}"),
    ("stages.0.kernel_size", [3, [3]], "stages.0.kernel_size: every choice must be a whole number from 1 to 100000"),
    ("stages.0.kernel_size", [3.5], "stages.0.kernel_size: every choice must be a whole number"),
    ("stages.1.kernel_size", [3, 9],
     "stages.1.kernel_size: the map that enters this stage has 4 x 4 pixels at resolution 8, and a kernel larger than twice that, 9"),
    ("stages.0.expand_ratio", [1.1], "stages.0.expand_ratio: an expand_ratio is 1 (no expansion) or at least 1.2"),
    ("stages.0.expand_ratio", [0.5], "stages.0.expand_ratio: every choice must be a number from 1 to 100000"),
    ("stages.0.expand_ratio", [float("nan")], "stages.0.expand_ratio: every choice must be a number"),
    ("stages.0.expand_ratio", [True], "stages.0.expand_ratio: every choice must be a number"),
    ("stages.0.expand_ratio", [6, 2.5], "stages.0.expand_ratio: choices must be listed smallest first"),
    ("stages.0.depth", [2, 1], "stages.0.depth: choices must be listed smallest first"),
    ("stages.0.activation", "gelu", "stages.0.activation: activations are relu, hard_swish, swish"),
    ("stages.0.activation", ["swish", "relu"], "stages.0.activation: activations are listed in the order relu, hard_swish, swish"),
    ("stages.0.activation", [], "stages.0.activation: activations are relu"),
    ("head.activation", [["relu"]], "head.activation: activations are relu"),
    ("stages.0.squeeze_excite", [True, False], "stages.0.squeeze_excite: a choice of squeeze_excite is written [false, true]"),
    ("stages.0.squeeze_excite", [], "stages.0.squeeze_excite: a choice of squeeze_excite is written"),
    ("stages.0.squeeze_excite", "on", "stages.0.squeeze_excite: Input should be a valid boolean"),
    ("channel_divisor", [8, 12], "channel_divisor: each channel_divisor must divide the next"),
    ("channel_divisor", 512, "channel_divisor: a channel_divisor is at most 256"),
    ("channel_divisor", 0, "channel_divisor: every choice must be a whole number"),
    ("chosen_per.kernel_size", "layer", "chosen_per.kernel_size: Input should be 'network', 'stage' or 'block'"),
    ("chosen_per.width", "block", "chosen_per.width: unknown key"),
    ("chosen_per.expand_ratio", "network", None),
    ("resolution", [1], "stages.0.stride: the map that enters this stage has 1 x 1 pixels at resolution 1, too small for a stride"),
    ("resolution", [2], "stages.0.kernel_size: the map that enters this stage has 2 x 2 pixels at resolution 2"),
    ("stem.stride", 4, "stages.0.kernel_size: the map that enters this stage has 2 x 2 pixels at resolution 8"),
    ("gate", "soft", "gate: Input should be 'mobilenetv3' or 'efficientnet'"),
    ("shortcut", "none", "shortcut: Input should be 'projected' or 'identity'"),
    ("head.kind", "short", "head.kind: Input should be 'mobilenetv3' or 'efficientnet'"),
    ("head", {"kind": "efficientnet", "width": [32], "expand_ratio": 6}, "head: an efficientnet head has width and activation only"),
    ("head", {"width": [32], "expand_ratio": 6, "expand_width": 64}, "head: a head has expand_ratio or expand_width, not both"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value", "message"), REFUSED, ids=lambda value: str(value)[:30])
def test_an_impossible_space_is_refused_in_one_line(path: str, value: object, message: str | None) -> None:
    if message is None:  # possible after all
        assert space_of(**{path: value}).size > 1
        return
    with pytest.raises(InputError) as caught:
        space_of(**{path: value})
    assert str(caught.value).startswith(f"space: {message}")
    assert "\n" not in str(caught.value)


def test_lists_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(InputError, match="kernel_size is chosen per network, so all lists of it must be equal"):
        space_of(**{"chosen_per.kernel_size": "network", "stages.0.kernel_size": [1, 3]})
    with pytest.raises(InputError, match="must hold a list for each of the 2 blocks of the deepest stage, but got 1"):
        space_of(**{"chosen_per.kernel_size": "block", "stages.0.kernel_size": [[3]]})
    with pytest.raises(InputError, match="with shortcut: identity, the first block"):
        space_of(**{"shortcut": "identity", "stages.0.stride": 1})
    with pytest.raises(
        InputError, match="resolution: the stem's 3x3 convolution of stride 4 sees nothing of images of 3 pixels"
    ):
        definition = small(**{"stem.stride": 4, "resolution": [3]})
        Space.from_definition(
            {**definition, "stages": [{**stage, "stride": 1, "kernel_size": [1]} for stage in definition["stages"]]}
        )


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from([row[0] for row in REFUSED]),
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-2, 40)
        | st.floats()
        | st.sampled_from(["relu", "swish", "block", "network", "", "8"]),
        lambda inner: st.lists(inner, max_size=3),
        max_leaves=5,
    ),
)
def test_whatever_stands_under_a_key_makes_a_space_or_an_input_error(path: str, value: object) -> None:
    try:
        space = space_of(**{path: value})
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert space.contains(space.largest)
        again = Space.from_definition(yaml.safe_load(yaml.safe_dump(json.loads(json.dumps(space.definition)))))
        assert again.key == space.key
