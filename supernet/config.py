"""Reading what people write: strict YAML and JSON, checked by pydantic models, with errors that name file, key and remedy."""

from __future__ import annotations

import difflib
import json
from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from supernet.errors import InputError

MOST_BYTES = 1_000_000
"""A configuration is a page of text; what is larger is not one (and may be an attack)."""


class Config(BaseModel):
    """Base of every configuration: frozen, no unknown keys, no silent conversion of types (but 1e-5 is a number)."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Model = TypeVar("Model", bound=BaseModel)


def _no_truth_value(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    return value


Number = Annotated[float, BeforeValidator(_no_truth_value), Field(allow_inf_nan=False)]
"""A finite number, also one that YAML 1.1 takes for text (1e-5)."""


CALLED = {"train": "recipes", "search": "search settings"}
"""What people call the configurations of a folder."""


def configs_folder() -> Path:
    """Where the configurations lie: inside the installed package, or at the top of a checkout."""
    installed = Path(__file__).parent / "configs"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "configs"


def names(kind: str) -> list[str]:
    """Names of the shipped configurations of a kind: "spaces", "train" or "search"."""
    return sorted(path.stem for path in (configs_folder() / kind).glob("*.yaml"))


def find(kind: str, name: str) -> Path:
    """Path of a shipped configuration by its name, or of the user's own by its path.

    Raises `InputError` listing what there is.
    """
    shipped = configs_folder() / kind / f"{name}.yaml"
    if name in names(kind):
        return shipped
    path = Path(name)
    if path.suffix in {".yaml", ".yml", ".json"} and is_file(path):
        return path
    raise InputError(
        f"{CALLED.get(kind, kind)} are named {', '.join(names(kind))} or are the path of a YAML file, "
        f"but got {name!r}{nearest(name, names(kind))}"
    )


def is_file(path: Path) -> bool:
    """Whether a file is there; False also for what cannot be a path (a text that is too long for one)."""
    try:
        return path.is_file()
    except OSError:
        return False


def nearest(given: str, known: list[str]) -> str:
    """A question that offers the nearest known name, or nothing."""
    close = difflib.get_close_matches(given, known, n=1)
    return f". Did you mean {close[0]!r}?" if close else ""


def read(path: Path) -> dict[str, Any]:
    """A mapping from a YAML or JSON file.

    No tags, no anchors, no key twice. Raises `InputError` with the file and line.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise InputError(f"{path}: a configuration holds at most {MOST_BYTES} bytes, this one has {path.stat().st_size}")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): give the path of a readable file") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: must be UTF-8 text ({error.reason} at byte {error.start})") from error
    try:
        value = yaml.load(text, Loader=_StrictLoader)  # a SafeLoader: builds no objects
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise InputError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: must hold a mapping of keys to values, but holds {type(value).__name__}")
    return value


def parse(model: type[Model], value: Any, where: str) -> Model:
    """Check `value` against a model; the first mistake becomes an `InputError` that names its key."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        text = f"{where}: {key + ': ' if key else ''}{_message(model, first)}"
        raise InputError(" ".join(text.split())) from error  # a key may hold line breaks


def _message(model: type[BaseModel], error: Any) -> str:
    if error["type"] == "extra_forbidden":
        known = sorted(_keys_at(model, error["loc"][:-1]))
        return f"unknown key{nearest(str(error['loc'][-1]), known) or f'; known are {known}'}"
    if error["type"] == "missing":
        return "this key is required: add it"
    if error["type"] == "tuple_type":
        return f"must be a list, such as [1, 2] (got {json.dumps(error['input'], default=str)[:80]})"
    if error["type"] == "too_short":
        return "must hold at least one entry: add one"
    message = str(error["msg"]).removeprefix("Value error, ")
    given = f" (got {json.dumps(error['input'], default=str)[:80]})" if not isinstance(error["input"], dict) else ""
    return f"{message}{given}"


def _keys_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> set[str]:
    """Keys of the model at a place within another."""
    for part in loc:
        field = model.model_fields.get(str(part))
        inner = [field.annotation, *_arguments(field.annotation)] if field else []
        found = next((kind for kind in inner if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        model = found or model  # numbers are places in a list
    return set(model.model_fields)


def _arguments(annotation: Any) -> list[Any]:
    """Types within a generic one, at any depth."""
    arguments = list(getattr(annotation, "__args__", ()))
    return [*arguments, *(inner for argument in arguments for inner in _arguments(argument))]


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses tags, repeated keys and aliases (a few hundred bytes of which can unfold into gigabytes)."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.YAMLError(f"line {mark.line + 1}: anchors and aliases are not allowed here: write the value out")
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "tag", None) is not None:
            raise yaml.YAMLError(
                f"line {event.start_mark.line + 1}: tags ({event.tag}) are not allowed here: write the plain value"
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: keys must be text, but got {key!r}")
            if key in seen:
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: the key {key!r} stands here twice")
            seen.add(key)
        return super().construct_mapping(node, deep)
