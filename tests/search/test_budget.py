"""Budgets as text."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from search.budget import MEASURED, METRICS, Budget, parse_all, parse_set
from supernet.errors import InputError

positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False, allow_nan=False)


@pytest.mark.parametrize(
    ("text", "metric", "bound", "canonical"),
    [
        ("latency_ms<=8", "latency_ms", 8.0, "latency_ms<=8"),
        ("latency_ms<=0.250", "latency_ms", 0.25, "latency_ms<=0.25"),
        ("macs<=8e6", "macs", 8_000_000.0, "macs<=8M"),
        ("macs <= +1.5G", "macs", 1_500_000_000.0, "macs<=1.5G"),
        ("params<=2M", "params", 2_000_000.0, "params<=2M"),
        (" params\t<=  2.3 K ", "params", 2300.0, "params<=2300"),
        ("params<=123", "params", 123.0, "params<=123"),
        ("peak_memory_bytes<=512KiB", "peak_memory_bytes", 524_288.0, "peak_memory_bytes<=512KiB"),
        ("peak_memory_bytes<=1.5MiB", "peak_memory_bytes", 1_572_864.0, "peak_memory_bytes<=1.5MiB"),
        ("peak_memory_bytes<=.5M", "peak_memory_bytes", 500_000.0, "peak_memory_bytes<=500K"),
        ("model_size_bytes<=2048", "model_size_bytes", 2048.0, "model_size_bytes<=2KiB"),
    ],
)
def test_a_budget_is_read_and_written_in_its_canonical_form(text: str, metric: str, bound: float, canonical: str) -> None:
    assert Budget.parse(text) == Budget(metric, bound)
    assert str(Budget.parse(text)) == canonical


@pytest.mark.parametrize(
    ("text", "budget", "canonical"),
    [
        ("macs>=1M", Budget("macs", 1e6, lower=True), "macs>=1M"),
        (" params  >= 2e3 ", Budget("params", 2000, lower=True), "params>=2K"),
        ("latency_ms@pi4<=12", Budget("latency_ms", 12, "pi4"), "latency_ms@pi4<=12"),
        (" latency_ms @ Pi-4_b.2 >= 1.50 ", Budget("latency_ms", 1.5, "Pi-4_b.2", lower=True), "latency_ms@Pi-4_b.2>=1.5"),
    ],
)
def test_lower_bounds_and_targets_are_read_and_written(text: str, budget: Budget, canonical: str) -> None:
    assert Budget.parse(text) == budget
    assert str(budget) == canonical
    assert budget.column == canonical[: canonical.index("=") - 1]


targets = st.none() | st.from_regex(r"[A-Za-z0-9._-]{1,60}", fullmatch=True)


@given(metric=st.sampled_from(sorted(METRICS)), bound=positive, target=targets, lower=st.booleans())
@example(metric="macs", bound=math.nextafter(math.inf, 0), target=None, lower=False)
@example(metric="peak_memory_bytes", bound=5e-324, target=None, lower=True)
@example(metric="params", bound=2300.0000000000005, target=None, lower=False)
@example(metric="latency_ms", bound=2.2250738585072014e-308, target="x" * 60, lower=True)
def test_the_canonical_text_reads_back_as_the_same_budget(metric: str, bound: float, target: str | None, lower: bool) -> None:
    budget = Budget(metric, bound, target if metric in MEASURED else None, lower)
    assert Budget.parse(str(budget)) == budget
    assert str(Budget.parse(str(budget))) == str(budget)


@given(number=st.decimals(min_value="0.001", max_value=10**9, places=3), suffix=st.sampled_from(["K", "M", "G"]))
def test_a_suffix_is_exact_in_decimals(number: object, suffix: str) -> None:
    power = {"K": "e3", "M": "e6", "G": "e9"}[suffix]
    assert Budget.parse(f"params<={number}{suffix}").bound == float(f"{number}{power}")


@pytest.mark.parametrize(
    ("text", "part_of_the_message"),
    [
        ("latency_m<=8", "Did you mean 'latency_ms'?"),
        ("accuracy<=8", "one of latency_ms, macs, params, peak_memory_bytes"),
        ("<=8", "one of latency_ms"),
        ("latency_ms", "is written metric<=number"),
        ("", "is written metric<=number"),
        ("latency_ms 8", "is written metric<=number"),
        ("latency_ms<8", "write <= or >= in place of <"),
        ("latency_ms=>8", "write <= or >= in place of =>"),
        ("latency_ms=8", "write <= or >= in place of ="),
        ("latency_ms≤8", "write <= or >= in place of ≤"),
        (
            "macs@pi4<=8M",
            "macs is the same on every target, only latency_ms, resident_bytes, load_ms, first_ms, images_per_s are",
        ),
        ("latency_ms@<=8", "a target's name is 1 to 60 letters, digits, dots, underscores and hyphens, but is ''"),
        ("latency_ms@pi 4<=8", "but is 'pi 4'"),
        ("latency_ms@pi@4<=8", "but is 'pi@4'"),
        ("latency_ms@pi4,<=8", "but is 'pi4,'"),
        ("latency_ms@" + "x" * 61 + "<=8", "a target's name is 1 to 60"),
        ("latency_s@pi4<=8", "Did you mean 'latency_ms'?"),
        ("4<=latency_ms<=8", "one of latency_ms"),
        ("latency_ms<=", "positive finite number, but is ''"),
        ("latency_ms<=fast", "positive finite number, but is 'fast'"),
        ("latency_ms<=8<=9", "positive finite number"),
        ("latency_ms<=nan", "positive finite number"),
        ("latency_ms<=inf", "positive finite number"),
        ("latency_ms<=1e999", "positive finite number"),
        ("macs<=1e308G", "positive finite number"),
        ("macs<=1e-999999999999G", "positive finite number"),
        ("latency_ms<=-8", "positive finite number"),
        ("latency_ms<=0", "positive finite number"),
        ("latency_ms<=1_000", "positive finite number"),
        ("latency_ms<=٣", "positive finite number"),
        ("latency_ms<=8ms", "after the number of latency_ms stands nothing, but got 'ms'"),
        ("macs<=8m", "stands one of K, M, G or nothing, but got 'm'"),
        ("macs<=8MiB", "stands one of K, M, G or nothing, but got 'MiB'"),
        ("peak_memory_bytes<=8MB", "stands one of KiB, MiB, K, M, G or nothing, but got 'MB'"),
    ],
)
def test_a_mistake_is_refused_with_what_holds_and_what_was_given(text: str, part_of_the_message: str) -> None:
    with pytest.raises(InputError) as caught:
        Budget.parse(text)
    assert part_of_the_message in str(caught.value)
    assert "\n" not in str(caught.value)


@given(
    text=st.text()
    | st.from_regex(
        r"\s*(latency_ms|macs|params|model_size_bytes)(@[a-z.]*)?\s*(<|<=|>=|=)\s*[-+.0-9eEKMGiB_]*", fullmatch=True
    )
)
@example(text="macs<=" + "9" * 10_000)
@example(text="macs<=1e" + "9" * 80)
@example(text="<=" * 10_000)
@example(text="\ud800<=1")
def test_parsing_any_text_gives_a_budget_or_an_input_error(text: str) -> None:
    try:
        budget = Budget.parse(text)
    except InputError as error:
        assert len(str(error)) < 500
    else:
        assert math.isfinite(budget.bound)
        assert budget.bound > 0


@given(bound=positive, value=st.floats())
def test_a_budget_holds_up_to_and_including_its_bound(bound: float, value: float) -> None:
    budget = Budget("latency_ms", bound)
    assert budget.holds(bound)
    assert not budget.holds(math.nextafter(bound, math.inf))
    assert not budget.holds(math.nan)
    assert budget.holds(value) == (value <= bound)


@given(bound=positive, value=st.floats())
def test_a_lower_bound_holds_from_its_bound_on(bound: float, value: float) -> None:
    budget = Budget("latency_ms", bound, lower=True)
    assert budget.holds(bound)
    assert not budget.holds(math.nextafter(bound, 0))
    assert not budget.holds(math.nan)
    assert budget.holds(value) == (value >= bound)


@given(bound=positive, lower=st.booleans(), low=st.floats(), high=st.floats())
def test_an_interval_holds_where_all_of_it_does(bound: float, lower: bool, low: float, high: float) -> None:
    budget = Budget("latency_ms", bound, lower=lower)
    ends = not (math.isnan(low) or math.isnan(high)) and low <= high
    assert budget.holds_interval(low, high) == (ends and budget.holds(low) and budget.holds(high))


@pytest.mark.parametrize("bound", [0.0, -1.0, math.nan, math.inf])
def test_the_constructor_refuses_what_the_text_may_not_say(bound: float) -> None:
    with pytest.raises(InputError, match="positive finite number"):
        Budget("macs", bound)
    with pytest.raises(InputError, match="Did you mean 'macs'"):
        Budget("mac", 1.0)


def test_the_constructor_refuses_targets_as_the_text_does() -> None:
    with pytest.raises(InputError, match="macs is the same on every target"):
        Budget("macs", 1.0, "pi4")
    with pytest.raises(InputError, match="a target's name"):
        Budget("latency_ms", 1.0, "pi4\n")


def test_budgets_keep_their_order_and_a_metric_has_one_upper_bound() -> None:
    assert parse_all([]) == ()
    assert [str(budget) for budget in parse_all(["params<=2M", "latency_ms<=8"])] == ["params<=2M", "latency_ms<=8"]
    with pytest.raises(InputError, match=r"one upper bound, but macs has two \(macs<=8M and macs<=9M\): keep the smaller"):
        parse_all(["macs<=8M", "latency_ms<=1", "macs<=9e6"])


def test_a_metric_may_have_a_lower_bound_too_and_every_target_its_own() -> None:
    texts = ["macs<=8M", "macs>=1M", "latency_ms<=8", "latency_ms@a<=9", "latency_ms@b<=9", "latency_ms@b>=9"]
    assert [str(budget) for budget in parse_all(texts)] == texts
    with pytest.raises(InputError, match=r"one lower bound, but macs has two \(macs>=1M and macs>=2M\): keep the larger"):
        parse_all(["macs>=1M", "macs<=8M", "macs>=2M"])
    with pytest.raises(InputError, match=r"latency_ms@a has two"):
        parse_all(["latency_ms@a<=1", "latency_ms@b<=1", "latency_ms@a<=2"])


@pytest.mark.parametrize("texts", [["macs>=9M", "macs<=8M"], ["macs<=8M", "macs>=9M"]])
def test_a_lower_bound_above_the_upper_one_is_refused(texts: list[str]) -> None:
    with pytest.raises(InputError, match=r"macs lies above the upper one \(macs>=9M and macs<=8M\)"):
        parse_all(texts)


def test_a_set_of_budgets_is_written_with_commas() -> None:
    assert parse_set(" macs<=50M,params <= 2M ") == (Budget("macs", 5e7), Budget("params", 2e6))
    for text in ("", ",", "macs<=50M,", "macs<=50M params<=2M", "macs<=50,000"):
        with pytest.raises(InputError):
            parse_set(text)
    with pytest.raises(InputError, match="macs has two"):
        parse_set("macs<=8M, macs<=9M")


def test_a_budget_is_a_frozen_hashable_value() -> None:
    budget = Budget.parse("macs<=8M")
    assert {budget: 1}[Budget("macs", 8e6)] == 1
    with pytest.raises(AttributeError):
        budget.bound = 1.0  # type: ignore[misc]
