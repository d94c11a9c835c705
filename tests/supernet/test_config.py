"""Strict reading: whatever people write is a configuration, or an error of one line that names file, key and remedy."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from supernet import config
from supernet.config import Config, Number
from supernet.errors import InputError
from supernet.families import FAMILIES
from supernet.space import Space, load_space

TINY = """\
format: 1
name: tiny
family: mbconv
resolution: [6, 8]
stem: {width: [8, 16], stride: 1}
stages:
  - {width: [8, 16], depth: [1, 2], kernel_size: [3, 5], expand_ratio: [1, 2], stride: 2, squeeze_excite: true}
head: {expand_ratio: 2, width: [16, 24]}
classes: 3
in_channels: 1
"""
Refused = Callable[[str | bytes], str]


@pytest.fixture
def refused(tmp_path: Path) -> Refused:
    """The message with which the text of a space is refused: one line, beginning with the file."""

    def refused(text: str | bytes) -> str:
        path = tmp_path / "mine.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(InputError) as caught:
            load_space(str(path))
        message = str(caught.value)
        assert message.startswith(f"{path}: ")
        assert "\n" not in message
        assert len(message) < 1000
        return message.removeprefix(f"{path}: ")

    return refused


def test_the_text_that_the_others_damage_is_a_space(tmp_path: Path) -> None:
    for name, text in (
        ("a.yaml", TINY),
        ("b.yml", TINY.replace("\n", "\r\n")),
        ("c.yaml", "\ufeff" + TINY),
        ("d.yaml", f"---\n{TINY}...\n"),
    ):
        (tmp_path / name).write_bytes(text.encode())
        assert load_space(str(tmp_path / name)).size == 128
    (tmp_path / "e.json").write_text(json.dumps(yaml.safe_load(TINY)))
    assert load_space(str(tmp_path / "e.json")).size == 128


@pytest.mark.parametrize("name", config.names("spaces"))
def test_every_shipped_space_loads_under_its_own_name(name: str) -> None:
    assert load_space(name).name == name


# --- text that is no mapping of keys to values ---


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold a mapping of keys to values, but holds NoneType"),
        ("# only a comment\n", "must hold a mapping of keys to values, but holds NoneType"),
        ("- 1\n- 2\n", "must hold a mapping of keys to values, but holds list"),
        ("just words", "must hold a mapping of keys to values, but holds str"),
        ("42", "must hold a mapping of keys to values, but holds int"),
        (TINY + "---\na: 1\n", "not readable as YAML"),
        (TINY + "\tclasses: 4\n", "not readable as YAML: while scanning for the next token"),
        (TINY.replace("[6, 8]", "[6, 8"), "not readable as YAML"),
        (TINY + "classes: 4\n", "line 11: the key 'classes' stands here twice"),
        (TINY.replace("expand_ratio: 2,", "width: [1], expand_ratio: 2,"), "line 8: the key 'width' stands here twice"),
        (TINY + "5: 4\n", "line 11: keys must be text, but got 5"),
        (TINY + "no: 4\n", "line 11: keys must be text, but got False"),
        (TINY + "? [a, b]\n: 4\n", "keys must be text"),
        (TINY + "? {a: b}\n: 4\n", "keys must be text"),
        (TINY + "<<: {classes: 4}\n", "not readable as YAML"),
        (TINY + "source: !!python/object/apply:os.system [ls]\n", "line 11: tags (tag:yaml.org,2002:python/object/apply:os.system)"),
        (TINY + "source: !!binary aGVsbG8=\n", "line 11: tags (tag:yaml.org,2002:binary) are not allowed here: write the plain value"),
        (TINY.replace("classes: 3", "classes: !!int '3'"), "line 9: tags (tag:yaml.org,2002:int) are not allowed here"),
        (TINY + "source: !mine x\n", "line 11: tags (!mine) are not allowed here"),
        (TINY + "source: !!set {a, b}\n", "line 11: tags (tag:yaml.org,2002:set)"),
        (TINY + "source: 2020-13-45\n", "not readable as YAML: month must be in 1..12"),
        (f"{TINY}source: {'9' * 5000}\n", "not readable as YAML: Exceeds the limit"),
        (TINY + "source: " + "[" * 5000, "not readable as YAML: maximum recursion depth exceeded"),
        (TINY + "source: \0\n", "not readable as YAML: unacceptable character"),
        ("\ud800", "must be UTF-8 text"),
    ],
    ids=range(25),
)  # fmt: skip
def test_text_that_is_not_plain_yaml_is_refused_with_the_line(text: str, message: str, refused: Refused) -> None:
    assert message in refused(text.encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1", "utf-32"])
def test_other_encodings_are_refused_with_the_byte(encoding: str, refused: Refused) -> None:
    message = refused((TINY + "source: Zürich\n").encode(encoding))
    assert message.startswith("must be UTF-8 text")
    assert "at byte" in message


def test_an_alias_bomb_ends_at_its_first_alias(refused: Refused) -> None:
    bomb = 'a: &a ["lol","lol"]\n' + "".join(
        f"{name}: &{name} [*{before},*{before},*{before},*{before}]\n"
        for before, name in zip("abcdefgh", "bcdefghi", strict=True)
    )
    assert "line 2: anchors and aliases are not allowed here: write the value out" in refused(bomb)
    assert "anchors and aliases" in refused("a: &a [*a]\n")


def test_a_huge_file_is_refused_before_it_is_read(refused: Refused) -> None:
    assert "a configuration holds at most 1000000 bytes, this one has 3000" in refused("#" * 3_000_000)


def test_a_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(InputError, match=r"folder.yaml: cannot be read \(Is a directory\): give the path of a readable file"):
        config.read(tmp_path / "folder.yaml")
    with pytest.raises(InputError, match=r"gone.yaml: cannot be read \(No such file or directory\)"):
        config.read(tmp_path / "gone.yaml")


@pytest.mark.parametrize(
    "name", ["", "digit.yaml", "nothing", "x" * 4000 + ".yaml", "\0.yaml", ".", "../spaces/digits", "spaces"]
)
def test_what_is_neither_shipped_nor_a_file_lists_what_there_is(name: str) -> None:
    with pytest.raises(InputError, match=f"spaces are named {', '.join(config.names('spaces'))} or are the path of"):
        config.find("spaces", name)


# --- keys and values ---


def changed(path: str, value: object) -> str:
    """The text of the tiny space with the value at a dotted path replaced (or, where it is ..., removed)."""
    definition = yaml.safe_load(TINY)
    place: Any = definition
    *way, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in way:
        place = place[part]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return json.dumps(definition)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("resolutions", [6], "resolutions: unknown key. Did you mean 'resolution'?"),
        ("stages.0.kernel_sizes", [3], "stages.0.kernel_sizes: unknown key. Did you mean 'kernel_size'?"),
        ("stem.colour", 1, "stem.colour: unknown key; known are ["),
        ("a\nb", 1, "a b: unknown key"),
        ("resolution", ..., "resolution: this key is required: add it"),
        ("stages.0.stride", ..., "stages.0.stride: this key is required: add it"),
        ("stages", ..., "stages: this key is required: add it"),
        ("head.width", ..., "head.width: this key is required: add it"),
        ("family", ..., f"family: must be one of {sorted(FAMILIES)}, but got None"),
        ("family", "mbcon", f"family: must be one of {sorted(FAMILIES)}, but got 'mbcon'. Did you mean 'mbconv'?"),
        ("family", ["mbconv"], f"family: must be one of {sorted(FAMILIES)}, but got ['mbconv']"),
        ("format", 2, "format: Input should be 1 (got 2)"),
        ("name", "", "name: String should have at least 1 character"),
        ("name", "two words", "name: String should match pattern"),
        ("name", "line\n", "name: String should match pattern"),
        ("name", "../up", "name: String should match pattern"),
        ("name", 5, "name: Input should be a valid string (got 5)"),
        ("name", "x" * 61, "name: String should have at most 60 characters"),
        ("resolution", [], "resolution: choices must be listed smallest first, each once, and at least one: reorder the list (got [])"),
        ("resolution", [8, 6], "resolution: choices must be listed smallest first, each once, and at least one: reorder the list"),
        ("resolution", [6, 6], "resolution: choices must be listed smallest first"),
        ("resolution", 6, "resolution: must be a list, such as [1, 2] (got 6)"),
        ("resolution", "6", "resolution: must be a list"),
        ("resolution", None, "resolution: must be a list, such as [1, 2] (got null)"),
        ("resolution", {"a": 6}, "resolution: must be a list"),
        ("resolution", [[6]], "resolution.0: Input should be a valid integer (got [6])"),
        ("resolution", [6, 8.0], "resolution.1: Input should be a valid integer (got 8.0)"),
        ("resolution", ["6"], "resolution.0: Input should be a valid integer (got \"6\")"),
        ("resolution", [0], "resolution.0: Input should be greater than or equal to 1 (got 0)"),
        ("resolution", [-4], "resolution.0: Input should be greater than or equal to 1 (got -4)"),
        ("resolution", [10**6], "resolution.0: Input should be less than or equal to 100000 (got 1000000)"),
        ("resolution", [10**400], "resolution.0: Input should be less than or equal to 100000"),
        ("resolution", [float("inf")], "resolution.0: Input should be a valid integer"),
        ("stages.0.depth", [True], "stages.0.depth.0: Input should be a valid integer (got true)"),
        ("stages.0.kernel_size", [2], "stages.0.kernel_size: kernel sizes must be odd (a small kernel is the centre of"),
        ("stages.0.kernel_size", [3, 4], "stages.0.kernel_size: kernel sizes must be odd"),
        ("stages.0.kernel_size", [17], "stages.0.kernel_size: kernel sizes must be odd"),
        ("stages.0.stride", 0, "stages.0.stride: Input should be greater than or equal to 1"),
        ("stages.0.stride", 5, "stages.0.stride: Input should be less than or equal to 4"),
        ("stages.0.stride", [2], "stages.0.stride: Input should be a valid integer"),
        ("stages.0.squeeze_excite", 1, "stages.0.squeeze_excite: Input should be a valid boolean (got 1)"),
        ("stages.0.squeeze_excite", "yes", "stages.0.squeeze_excite: Input should be a valid boolean"),
        ("stages", [], "stages: must hold at least one entry"),
        ("stages", {}, "stages: must be a list"),
        ("stages", [5], "stages.0: Input should be a valid dictionary"),
        ("stages", [None], "stages.0: Input should be a valid dictionary"),
        ("stem", [8], "stem: Input should be a valid dictionary"),
        ("head.expand_ratio", [2], "head.expand_ratio: Input should be a valid integer"),
        ("classes", 0, "classes: Input should be greater than or equal to 1"),
        ("in_channels", 5, "in_channels: Input should be less than or equal to 4"),
        ("source", 5, "source: Input should be a valid string"),
    ],
)  # fmt: skip
def test_a_wrong_key_or_value_is_named_with_the_remedy(path: str, value: object, message: str, refused: Refused) -> None:
    assert refused(changed(path, value)).startswith(message)


def test_a_long_wrong_value_is_shown_in_part(refused: Refused) -> None:
    assert len(refused(changed("resolution", "x" * 100_000))) < 200


def test_too_many_stages_are_refused(refused: Refused) -> None:
    stage = yaml.safe_load(TINY)["stages"][0]
    assert refused(changed("stages", [stage] * 21)).startswith("stages: Tuple should have at most 20 items")


def test_a_definition_that_is_no_mapping_is_an_input_error() -> None:
    for value in (None, 5, "tiny", [1], b"x"):
        with pytest.raises(InputError, match="space: must be a mapping of keys to values, but got"):
            Space.from_definition(value)  # type: ignore[arg-type]


class Rate(Config):
    rate: Number


@pytest.mark.parametrize(("text", "value"), [("1e-5", 1e-5), ("1.0e-5", 1e-5), ("3", 3.0), ("-.5", -0.5), ("'0.1'", 0.1)])
def test_numbers_are_read_as_people_write_them(text: str, value: float, tmp_path: Path) -> None:
    path = tmp_path / "rate.yaml"
    path.write_text(f"rate: {text}\n")  # YAML 1.1 takes 1e-5 for text
    assert config.parse(Rate, config.read(path), "rate.yaml").rate == value


@pytest.mark.parametrize(
    "text", ["true", "no", "null", ".inf", "-.inf", ".nan", "nan", "1e999", "[1]", "{a: 1}", "2020-01-01", "a", "''"]
)
def test_what_is_no_finite_number_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "rate.yaml"
    path.write_text(f"rate: {text}\n")
    with pytest.raises(InputError, match=r"rate.yaml: rate: "):
        config.parse(Rate, config.read(path), "rate.yaml")


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Rate(rate=1.0).rate = 2.0  # type: ignore[misc]


# --- anything at all ---

leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-3, 20), st.floats(), st.text(max_size=8),
    st.sampled_from(["mbconv", "1e-5", "\n", "~", "!!int", "*a", "&a", 10**400]),
)  # fmt: skip
trees = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=6
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of everything within a tree."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(deeper for key, item in inner for deeper in places(item, (*path, key)))][0 if path else 1 :]


def space_or_input_error(load: Callable[[], Space]) -> None:
    try:
        space = load()
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert space.size >= 1
        assert space.contains(space.smallest)
        assert Space.from_definition(json.loads(json.dumps(space.definition))).key == space.key


@pytest.mark.slow
@settings(deadline=None, max_examples=300)
@given(st.data())
def test_any_damage_to_a_definition_is_a_space_or_an_input_error(data: st.DataObject) -> None:
    definition = yaml.safe_load(TINY)
    for _ in range(data.draw(st.integers(1, 3))):
        *way, last = data.draw(st.sampled_from(places(definition)))
        place = definition
        for part in way:
            place = place[part]
        action = data.draw(st.sampled_from(["replace", "remove", "rename", "repeat"]))
        value = place.pop(last) if action in {"remove", "rename"} else place[last]
        if action == "replace":
            place[last] = data.draw(trees)
        elif action == "rename" and isinstance(place, dict):
            place[data.draw(st.text(max_size=8))] = value
        elif action == "repeat" and isinstance(place, list):
            place.insert(0, copy.deepcopy(value))
        if not places(definition):
            break
    space_or_input_error(lambda: Space.from_definition(definition))


@settings(deadline=None)
@given(trees)
def test_any_value_is_a_space_or_an_input_error(value: Any) -> None:
    space_or_input_error(lambda: Space.from_definition(value))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("config") / "fuzzed.yaml"


SPECIAL = [
    "\t",
    "\0",
    "\n",
    ": ",
    "- ",
    "[",
    "]",
    "{",
    "}",
    "&a ",
    "*a",
    "!!int ",
    "!",
    "|",
    ">",
    "#",
    "'",
    '"',
    "?",
    "%",
    "@",
    "<<",
    "\u2028",
    "é",
]


@pytest.mark.slow
@settings(deadline=None, max_examples=300)
@given(st.integers(0, len(TINY)), st.integers(0, 12), st.lists(st.sampled_from(SPECIAL) | st.text(max_size=3), max_size=3))
@example(0, 0, ["\ufeff\ufeff"])
@example(0, 0, ["%YAML 9.9\n---\n"])
@example(0, 0, ["%TAG ! tag:x,2000:\n---\n"])
def test_any_damage_to_the_text_is_a_space_or_an_input_error(scratch: Path, start: int, length: int, pieces: list[str]) -> None:
    text = TINY[:start] + "".join(pieces) + TINY[start + length :]
    scratch.write_bytes(text.encode("utf-8", "surrogatepass"))
    space_or_input_error(lambda: load_space(str(scratch)))


@settings(deadline=None)
@given(st.integers(0, len(TINY) - 1), st.integers(0, 255))
def test_any_damaged_byte_is_a_space_or_an_input_error(scratch: Path, position: int, byte: int) -> None:
    text = bytearray(TINY.encode())
    text[position] = byte
    scratch.write_bytes(text)
    space_or_input_error(lambda: load_space(str(scratch)))
