"""`nestling measure`: the card, where it lies, what is refused, and what --verify says of it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import nestling
from deploy import measure as measuring
from deploy.bundle import Bundle, write_manifest, write_model
from deploy.measure import measured, models_of, parse_target, pooled
from deploy.measurement import Measurement, markdown, signed
from deploy.remeasure import SPREAD, bundle_of, measure_again, ratio_of
from deploy.targets import Local, Model, Weight
from deploy.timing import WIDTH, Timing
from supernet import durable
from supernet.errors import InputError


def timing(ms: float, width: float = 0.01, **changed: Any) -> Timing:
    """A latency known within `width` of itself to both sides."""
    made = Timing(
        ms, ms * (1 - width), ms * (1 + width), ms * (1 - width), ms, ms, ms * 1.02, ms, ms * 1.01, ms * 1.03, 40, True, False, "",
        "cpu", 0.5, 0.0,
    )  # fmt: skip
    return replace(made, **changed)


DEVICE = {"processor": "a chip", "machine": "arm64", "cores": 4, "runtime": "fake 1", "threads": 1,
          "clock": "CPU time of the one thread", "precision": "fp32", "batch": 1, "hash": "0123456789ab"}  # fmt: skip
CONDITIONS = {"governor": "performance", "frequency_mhz": 2000.0, "temperature_c": 40.0, "load": 0.1}


@dataclass
class Fake:
    """A target that takes what it is told to take, a sitting after the other."""

    sittings: list[Timing] = field(default_factory=lambda: [timing(2.0)])
    device: Mapping[str, Any] = field(default_factory=lambda: dict(DEVICE))
    now: Mapping[str, Any] = field(default_factory=lambda: dict(CONDITIONS))
    name: str = "fake"
    precision: str = "fp32"
    asked: list[float] = field(default_factory=list)

    def fingerprint(self) -> dict[str, Any]:
        return dict(self.device)

    def measure(self, models: Sequence[Model], *, width: float, most_seconds: float, each: Any = None) -> list[Timing]:
        self.asked.append(most_seconds)
        return [self.sittings[(len(self.asked) - 1) % len(self.sittings)] for _ in models]

    def conditions(self) -> dict[str, Any]:
        return dict(self.now)

    def weigh(self, models: Sequence[Model], *, batch: int = 8) -> list[Weight]:
        return [Weight(60_000_000, 9_000_000, 25.0, 3.0, 1234.5, batch) for _ in models]


class Deaf:
    """A target that gives latencies and nothing else."""

    name, precision = "deaf", "fp32"

    def fingerprint(self) -> dict[str, Any]:
        return dict(DEVICE)

    def measure(self, models: Sequence[Model], *, width: float, most_seconds: float, each: Any = None) -> list[Timing]:
        return [timing(2.0) for _ in models]


def made_bundle(folder: Path, model: bytes, shape: Sequence[int], precision: str = "fp32") -> Bundle:
    folder.mkdir()
    (folder / "images.json").write_text("{}")
    write_model(folder, model, manifest := {
        "format": 1, "key": "abcdefabcdef", "precision": precision, "model_size_bytes": 77, "classes": ["a", "b"],
        "input": {"name": "images", "shape": ["batch", *shape]}, "files": {}, "preprocessing": {},
    })  # fmt: skip
    write_manifest(folder, manifest)
    return Bundle.open(folder)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return made_bundle(tmp_path / "my model", b"a model", (3, 16, 16))


Use = Callable[[Any], Any]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    """Let a target be what every text names; nothing sleeps."""
    monkeypatch.setattr(measuring, "PAUSE_SECONDS", 0.0)

    def use(target: Any) -> Any:
        monkeypatch.setattr(measuring, "parse_target", lambda text, **_: target)
        return target

    return use


def command(*arguments: object) -> tuple[int, str]:
    """Exit code and standard output; an `InputError` passes through."""
    done = CliRunner().invoke(nestling.app, ["measure", *map(str, arguments)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout


# --- the card ---


def test_a_bundle_with_a_card_is_as_whole_as_without(bundle: Bundle, use: Use) -> None:
    use(Fake())
    before = {path.name: path.read_bytes() for path in bundle.path.iterdir()}
    card, path = measured(bundle, "local", 8, None, None)
    assert path.parent == bundle.path and re.fullmatch(r"measurement-[0-9a-f]{12}\.json", path.name)
    assert {path.name for path in bundle.path.iterdir()} == {*before, path.name, path.with_suffix(".md").name}
    assert all((bundle.path / name).read_bytes() == content for name, content in before.items())
    again = Bundle.open(bundle.path)
    assert again.manifest == bundle.manifest and path.name not in again.manifest["files"]
    assert Measurement.open(path) == card


def test_measured_again_the_card_is_replaced_and_elsewhere_another_is_written(bundle: Bundle, use: Use) -> None:
    use(Fake())
    _, first = measured(bundle, "local", 8, None, None)
    use(Fake([timing(3.0)]))
    card, second = measured(bundle, "local", 8, None, None)
    assert second == first and Measurement.open(first).models[0].timing.latency_ms == card.models[0].timing.latency_ms == 3.0
    use(Fake(device={**DEVICE, "hash": "ba9876543210"}))
    assert measured(bundle, "local", 8, None, None)[1] != first


def test_an_export_does_not_remove_cards(bundle: Bundle, use: Use) -> None:
    from deploy.bundle import being_written

    use(Fake())
    _, path = measured(bundle, "local", 8, None, None)
    with (
        pytest.raises(InputError, match=r"measurement-.*which no export wrote and which would be lost"),
        being_written(bundle.path),
    ):
        raise AssertionError
    assert path.is_file()


def test_the_card_says_all_of_it(bundle: Bundle, use: Use) -> None:
    target = use(Fake([timing(ms) for ms in (2.0, 2.01, 1.99, 2.02, 2.0, 2.0)]))
    card, path = measured(bundle, "local:1", 16, 3.0, None)
    value = json.loads(path.read_text())
    assert value["format"] == 1
    assert value["bundle"] == {"name": "my model", "key": "abcdefabcdef", "precision": "fp32", "model_size_bytes": 77}
    assert value["device"] == DEVICE and value["conditions"] == {"before": CONDITIONS, "after": CONDITIONS}
    (model,) = value["models"]
    assert (model["sha256"], model["file_bytes"]) == (bundle.manifest["files"]["model.onnx"], 7)
    assert model["input_shape"] == [1, 3, 16, 16]
    assert model["timing"] == card.models[0].timing.as_dict() and model["timing"]["stable"]
    assert model["sittings_ms"] == [2.0, 2.01, 1.99, 2.02, 2.0, 2.0]
    assert model["weight"] == {"resident_bytes": 60_000_000, "added_bytes": 9_000_000, "load_ms": 25.0, "first_ms": 3.0,
                               "images_per_s": 1234.5, "batch": 16}  # fmt: skip
    assert {"clock", "statistic", "interval", "warm_ups", "rounds", "width_asked", "inside", "outside"} <= set(
        value["protocol"]
    )
    assert value["command"] == "nestling measure 'my model' --target local:1 --batch 16 --most-seconds 3"
    assert target.asked == [0.5] * 6
    text = path.with_suffix(".md").read_text()
    high = card.models[0].timing.high_ms
    for part in (f"**1.99 ms** (up to {high:.4g})", "resizing", "1,234", "first inference", "SHA-256",
                 signed(card.models[0].apart),
                 "performance", value["command"], "a chip"):  # fmt: skip
        assert part in text, part


def test_a_target_that_only_times_gives_a_card_that_says_so(bundle: Bundle, use: Use) -> None:
    use(Deaf())
    card, path = measured(bundle, "local", 8, None, None)
    assert (card.before, card.after, card.models[0].weight, card.models[0].sittings_ms) == (None, None, None, (2.0,))
    assert Measurement.open(path) == card
    text = path.with_suffix(".md").read_text()
    assert "not measured on this target" in text and "| governor | not readable | not readable |" in text


def test_wall_clock_and_cpu_time_that_differ_are_told(bundle: Bundle, use: Use) -> None:
    use(Fake([timing(2.0, wall_median_ms=2.1)]))
    assert measured(bundle, "local", 8, None, None)[0].models[0].remarks() == []
    use(Fake([timing(2.0, wall_median_ms=3.0, load=7.5)]))
    card, path = measured(bundle, "local", 8, None, None)
    (remark,) = card.models[0].remarks()
    assert "3 ms, +50 % against the least CPU time of 2 ms" in remark and "load 7.5" in remark
    assert remark in path.with_suffix(".md").read_text()
    assert json.loads(path.read_text())["models"][0]["wall_median_over_latency"] == 1.5
    assert signed(-0.0001) == "+0 %"


def test_what_is_throttled_or_not_known_well_is_told(bundle: Bundle, use: Use) -> None:
    use(Fake([timing(ms, throttled=ms > 2, why="", wall_median_ms=2.0) for ms in (2.0, 3.0, 3.1, 3.2, 3.3, 3.4)]))
    card, path = measured(bundle, "local", 8, None, None)
    assert json.loads(path.read_text())["throttled"] is True
    unknown, throttled = card.models[0].remarks()
    assert "the sittings gave 2 to 3.4 ms" in unknown and throttled.startswith("throttled")


def test_texts_of_a_machine_cannot_break_the_readable_card(bundle: Bundle, use: Use) -> None:
    use(Fake(device={**DEVICE, "processor": "a | <b>\n# chip`"}))
    card, _ = measured(bundle, "local", 8, None, None)
    assert "<b>" not in markdown(card) and "\n# chip" not in markdown(card)


# --- sittings ---


@pytest.mark.parametrize("clock", ["cpu", "wall"])
def test_the_least_sitting_counts_as_far_as_a_second_one_came_near(clock: str) -> None:
    parts = [replace(timing(ms), clock=clock, low_ms=ms, high_ms=ms * 1.005) for ms in (3.0, 2.0, 2.02, 5.0, 9.0, 2.9)]
    found = pooled(parts, WIDTH)
    assert (found.latency_ms, found.low_ms, found.high_ms, found.stable, found.why) == (2.0, 2.0, 2.02, True, "")
    assert found.samples == 6 * parts[0].samples
    assert not pooled(parts[:2], WIDTH).stable


# --- where a card may lie ---


def test_a_card_goes_where_it_is_told(bundle: Bundle, use: Use, tmp_path: Path) -> None:
    use(Fake())
    for _ in range(2):
        code, out = command(bundle.path, "--out", tmp_path / "pi.json", "--json")
        assert code == 0 and json.loads(out)["card"] == str(tmp_path / "pi.json")
    assert (tmp_path / "pi.md").is_file() and len(list(bundle.path.iterdir())) == 5


@pytest.mark.parametrize("name", ["manifest.json", "images.json", "my model/card.json", "notes.json", "kept.json", "x.txt",
                                  "none/x.json"])  # fmt: skip
def test_a_card_takes_the_place_of_nothing_else(bundle: Bundle, use: Use, tmp_path: Path, name: str) -> None:
    target = use(Fake())
    (bundle.path / "card.md").write_text("the bundle's own")
    write_manifest(bundle.path, {key: value for key, value in bundle.manifest.items() if key != "files"})
    (tmp_path / "notes.md").write_text("mine")
    (tmp_path / "kept.json").write_text("{}")
    inside = name in {"manifest.json", "images.json"}
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="--out"):
        command(bundle.path, "--out", (bundle.path if inside else tmp_path) / name)
    assert target.asked == []
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "arguments, word",
    [
        ((), "takes the BUNDLE"),
        (("{}", "--batch", "5000"), "batch of the throughput"),
        (("{}", "--most-seconds", "0"), "more than 0"),
        (("{}", "--most-seconds", "nan"), "more than 0"),
        (("{}", "--target", "local:0"), "from 1 to 1024"),
        (("{}", "--target", "local?runtime=tensorrt"), "runtime of a target"),
        (("{}", "--target", "pi"), "a target is"),
        (("none",), "not a bundle"),
        (("--verify", "none.json"), "cannot be read"),
        (("--verify", "{}/manifest.json"), "no measurement card"),
    ],
)
def test_mistakes_are_one_line_and_measure_nothing(bundle: Bundle, arguments: tuple[str, ...], word: str) -> None:
    with pytest.raises(InputError, match=word) as raised:
        command(*(argument.replace("{}", str(bundle.path)) for argument in arguments))
    assert "\n" not in str(raised.value)
    assert len(list(bundle.path.iterdir())) == 5


def test_a_changed_model_is_not_measured(bundle: Bundle, use: Use) -> None:
    use(Fake())
    (bundle.path / "model.onnx").write_bytes(b"another")
    with pytest.raises(InputError, match="was changed"):
        models_of(bundle)
    with pytest.raises(InputError, match="was changed"):
        command(bundle.path)


def test_a_runtime_that_reads_other_files_finds_them_or_none(bundle: Bundle, use: Use) -> None:
    assert [name for name, _ in models_of(bundle, "openvino")] == ["model.onnx"]
    use(Fake(device={**DEVICE, "runtime": "executorch 1.5.1"}))
    with pytest.raises(InputError, match=r"no \.pte file, which executorch runs"):
        command(bundle.path)


def test_the_precision_of_the_manifest_is_that_of_the_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(measuring, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(measuring, "parse_target", lambda text, **given: seen.update(given) or Fake())
    card, path = measured(made_bundle(tmp_path / "int8", b"m", (1, 8, 8), "int8"), "local", 8, None, None)
    assert seen == {"precision": "int8"} and card.precision == "int8" and Measurement.open(path).precision == "int8"


def test_targets_on_this_machine() -> None:
    assert parse_target("local") == Local() and parse_target("local:3", precision="int8") == Local(3, precision="int8")
    assert parse_target("local?runtime=openvino") == Local(runtime="openvino")


# --- again ---


def again(bundle: Bundle, use: Use, then: Fake, now: Fake) -> tuple[int, str]:
    """Measure, measure again: exit code and what is printed."""
    use(then)
    _, path = measured(bundle, "local", 8, None, None)
    use(now)
    return command("--verify", path)


def test_the_same_again_is_within_noise(bundle: Bundle, use: Use) -> None:
    code, out = again(bundle, use, Fake(), Fake([timing(2.03)]))
    assert (code, len(out.splitlines())) == (0, 1)
    assert out.startswith("model.onnx: within noise: 2 ms then, 2.03 ms now, +1.5 %")


@pytest.mark.parametrize("now, word", [(3.0, "slower by 50.0 % (4"), (1.0, "faster by 50.0 % (4")])
def test_another_latency_ends_with_1_and_says_by_how_much(bundle: Bundle, use: Use, now: float, word: str) -> None:
    code, out = again(bundle, use, Fake(), Fake([timing(now)]))
    assert code == 1 and word in out and len(out.splitlines()) == 1


def test_what_differs_is_told(bundle: Bundle, use: Use) -> None:
    device = {**DEVICE, "processor": "another chip", "cores": 2, "runtime": "fake 2", "threads": 4, "hash": "ffffffffffff"}
    conditions = {"governor": "powersave", "frequency_mhz": 600.0, "temperature_c": 85.0, "load": 9.0}
    slow = timing(4.0, throttled=True, load=9.0, steal=0.1)
    code, out = again(bundle, use, Fake(), Fake([slow], device, conditions))
    assert code == 1
    for part in ("processor: a chip in the card, another chip now", "cores: 4 in", "runtime: fake 1 in the card, fake 2 now",
                 "threads: 1 in the card, 4 now", "governor: performance in the card, powersave now",
                 "2000 MHz in the card, 600 MHz now", "40 degrees Celsius in the card, 85 now",
                 "load: 0.5 in the card, 9.0 now, on 2 cores", "throttled: no in the card, yes",
                 "stolen by the host: 0.0% of the time in the card, 10.0% now"):  # fmt: skip
        assert part in out, part
    assert "hash" not in out


def test_what_differs_is_told_where_the_latency_is_the_same(bundle: Bundle, use: Use) -> None:
    code, out = again(bundle, use, Fake(), Fake(device={**DEVICE, "runtime": "fake 2"}))
    assert code == 0 and "runtime: fake 1 in the card, fake 2 now" in out


def test_another_file_ends_with_1_also_where_it_is_as_fast(bundle: Bundle, use: Use, tmp_path: Path) -> None:
    use(Fake())
    _, path = measured(bundle, "local", 8, None, tmp_path / "card.json")
    other = made_bundle(tmp_path / "other", b"other model", (3, 16, 16))
    code, out = command("--verify", path, other.path, "--json")
    (value,) = json.loads(out)
    assert (code, value["same_file"], value["within_noise"], value["holds"]) == (1, False, True, False)
    assert value["differences"][0].startswith("another file")


def test_the_bundle_is_the_folder_of_the_card_or_is_given(bundle: Bundle, use: Use, tmp_path: Path) -> None:
    use(Fake())
    _, path = measured(bundle, "local", 8, None, tmp_path / "card.json")
    with pytest.raises(InputError, match="does not lie in a bundle"):
        bundle_of(path)
    assert command("--verify", path, bundle.path)[0] == 0
    assert bundle_of(shutil.copy(path, bundle.path / "card-of-mine.json")).path == bundle.path


@pytest.mark.parametrize("text", ["ssh:me@elsewhere", "adb:serial", "local?python=evil", "kit:x.zip", "local:1;x", "local\n"])
def test_a_card_does_not_choose_where_files_go(bundle: Bundle, use: Use, text: str) -> None:
    use(Fake())
    card, path = measured(bundle, text, 8, None, None)
    target = use(Fake())
    with pytest.raises(InputError, match="add --target"):
        measure_again(card, bundle)
    assert target.asked == []
    assert command("--verify", path, "--target", text)[0] == 0


def test_the_ratio_counts_both_intervals_and_what_runs_differ_by() -> None:
    ratio, low, high = ratio_of(timing(2.0, 0.0), timing(2.0, 0.0))
    assert (ratio, low, high) == (1.0, pytest.approx(1 / (1 + SPREAD)), pytest.approx(1 + SPREAD))
    wide = ratio_of(timing(2.0, 0.03), timing(2.0, 0.04))
    assert 1 + np.hypot(0.03, 0.04) < wide[2] < 1.06 and wide[1] == pytest.approx(1 / wide[2])
    one_sided = replace(timing(2.0), low_ms=2.0, high_ms=2.4)  # as by the wall clock
    assert ratio_of(timing(2.0, 0.0), one_sided)[1] < 1 / 1.2


def test_two_runs_of_the_same_agree_as_often_as_promised() -> None:
    rng, agreed = np.random.default_rng(0), 0
    for _ in range(500):
        runs = [pooled([timing(float(ms), 1e-4) for ms in 2 * np.exp(0.01 * rng.standard_normal(6))], WIDTH) for _ in range(2)]
        _, low, high = ratio_of(*runs)
        agreed += low <= 1 <= high
    assert agreed / 500 > 0.95


def test_wide_intervals_are_no_proof(bundle: Bundle, use: Use) -> None:
    noisy = [timing(ms, load=9.0) for ms in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)]
    code, out = again(bundle, use, Fake(noisy), Fake(noisy))
    assert (
        code == 0
        and "so wide that a smaller difference would not be seen" in out
        and "card's own latency is not known well" in out
    )


# --- damaged cards ---


def values(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values within a value of JSON."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, item in items for found in values(item, (*path, key)))]


def test_a_card_with_anything_amiss_is_read_as_it_is_or_refused(bundle: Bundle, use: Use, tmp_path: Path) -> None:
    use(Fake())
    _, path = measured(bundle, "local", 8, None, None)
    whole = json.loads(path.read_text())
    for place in values(whole)[1:]:
        for wrong in (None, -1, 1e400, [], True, "x" * 2000):
            changed = json.loads(path.read_text())
            inner = changed
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = wrong
            (tmp_path / "changed.json").write_text(json.dumps(changed))
            try:
                markdown(Measurement.open(tmp_path / "changed.json"))
            except InputError as error:
                assert "changed.json is no measurement card" in str(error) and len(str(error)) < 1000


@pytest.mark.parametrize("content", [b"", b"null", b"[]", b"{", bytes(range(256)), b"[" * 100_000,
                                     b'{"kind": "measurement", "format": 2}', b" " * (2 << 20)])  # fmt: skip
def test_what_is_no_card_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "card.json").write_bytes(content)
    with pytest.raises(InputError, match=r"card\.json is no measurement card") as raised:
        Measurement.open(tmp_path / "card.json")
    assert "\n" not in str(raised.value)


def test_a_full_disk_leaves_the_old_card(bundle: Bundle, use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    use(Fake())
    _, path = measured(bundle, "local", 8, None, None)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(durable.WriteError, match="No space left"):
        measured(bundle, "local", 8, None, None)
    assert path.read_bytes() == before and Bundle.open(bundle.path)


# --- for real ---


@pytest.mark.slow
def test_a_real_bundle_is_measured_and_again(tmp_path: Path) -> None:
    from deploy.probe import probe
    from supernet.space import load_space

    space = load_space("digits")
    side = space.resolution(space.largest)
    real = made_bundle(tmp_path / "digits", probe(space, space.largest), (1, side, side))
    code, out = command(real.path, "--target", "local", "--most-seconds", "1", "--batch", "4")
    assert code == 0 and "images/s at batch 4" in out and "6 sittings" in out
    (path,) = real.path.glob("measurement-*.json")
    card = Measurement.open(path)
    (model,) = card.models
    assert model.weight is not None and model.weight.load_ms > 0 and model.weight.resident_bytes > 10_000_000
    assert card.before is not None and set(card.before) == set(CONDITIONS)
    code, out = command("--verify", path, "--json")
    (value,) = json.loads(out)
    assert code == (0 if value["holds"] else 1)  # it may have become slower: the machine is not ours alone
    assert value["same_file"] and value["ratio_low"] < value["ratio"] < value["ratio_high"]
