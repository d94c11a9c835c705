"""Every shipped space, damaged at random: what still loads is a space whose networks run; all else is one line with file and key."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from supernet import config
from supernet.costs import arch_costs
from supernet.errors import InputError
from supernet.model import plain
from supernet.space import Space, load_space

SHIPPED = {name: yaml.safe_load(config.find("spaces", name).read_text()) for name in config.names("spaces")}
VALUES = [
    None,
    True,
    False,
    0,
    1,
    2,
    4,
    7,
    -1,
    3.5,
    1e9,
    10**30,
    "",
    "relu",
    "block",
    "network",
    [],
    [3],
    [5, 3],
    [2, 2],
    [1, 2, 3],
    {},
    float("nan"),
]

Path_ = tuple[str | int, ...]


def places(value: Any, here: Path_ = ()) -> list[Path_]:
    """Paths of everything within nested mappings and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, inner in items for path in ((*here, key), *places(inner, (*here, key)))]


def damaged(definition: dict[str, Any], draw: Any) -> tuple[dict[str, Any], str]:
    """A copy with one thing changed, and what was done."""
    copied = copy.deepcopy(definition)
    path = draw(st.sampled_from(places(copied)))
    holder: Any = copied
    for key in path[:-1]:
        holder = holder[key]
    key, old = path[-1], holder[path[-1]]
    ways = ["replace", "remove", "repeat", *(["rename"] if isinstance(key, str) else []),
            *(["reverse", "shorten"] if isinstance(old, list) and old else [])]  # fmt: skip
    way = draw(st.sampled_from(ways))
    if way == "replace":
        holder[key] = draw(st.sampled_from(VALUES))
    elif way == "remove":
        del holder[key]
    elif way == "repeat" and isinstance(holder, list):
        holder.insert(int(key), copy.deepcopy(old))
    elif way == "repeat":
        holder[key] = [old, old]
    elif way == "rename":
        holder[f"{key}x"] = holder.pop(key)
    elif way == "reverse":
        old.reverse()
    else:
        old.pop()
    return copied, f"{way} {'.'.join(map(str, path))}"


def run_on_meta(space: Space, what: str) -> None:
    """Forward passes of some children: shapes only."""
    rng = np.random.default_rng(0)
    for arch in (space.smallest, space.largest, space.sample(rng)):
        costs, size = arch_costs(space, arch), space.resolution(arch)
        assert costs["macs"] > 0 and costs["params"] > 0, what
        with torch.device("meta"):
            network = plain(space, arch).eval()
            output = network(torch.empty(2, space.family.in_channels, size, size))
        assert output.shape[0] == 2 and min(output.shape) > 0, what


@pytest.mark.parametrize(
    "examples", [3, pytest.param(10, marks=pytest.mark.slow), pytest.param(100, marks=pytest.mark.nightly)]
)
@pytest.mark.parametrize("name", SHIPPED)
def test_a_damaged_space_is_a_space_that_runs_or_one_line(
    name: str, examples: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("fuzz") / f"{name}.yaml"

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def check(data: st.DataObject) -> None:
        definition, what = damaged(SHIPPED[name], data.draw)
        file.write_text(yaml.safe_dump(definition))
        try:
            space = load_space(str(file))
        except InputError as error:
            text = str(error)
            assert "\n" not in text and str(file) in text, what
            assert len(text) > len(str(file)) + 10, what
            return
        run_on_meta(space, what)

    check()


def test_the_damage_reaches_every_key_and_is_noticed() -> None:
    """The test above can fail: a space that loads whatever is written would be caught by these."""
    definition = SHIPPED["digits"]
    assert ("stages", 1, "kernel_size", 0) in places(definition)
    for path in places(definition):
        if isinstance(path[-1], str):
            broken = copy.deepcopy(definition)
            holder: Any = broken
            for key in path[:-1]:
                holder = holder[key]
            holder[f"{path[-1]}x"] = holder.pop(path[-1])
            with pytest.raises(InputError, match=f"{path[-1]}"):
                Space.from_definition(broken, "it")


@pytest.mark.parametrize(
    "text", ["family: mbconv\nfamily: vit\n", "stages: &a [1]\nhead: *a\n", "name: !!python/object:os.system x\n"]
)
def test_tricks_of_yaml_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"space\.yaml"):
        load_space(str(path))
