"""The rules of `slmops fit`: what a part of the examples says of all, who is nearest, what a device makes of a time."""

from __future__ import annotations

import argparse
import itertools
import random
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slmops.catalog import devices
from slmops.cli import fit as cli
from slmops.core.fit import Budget, Budgeted, combinations, excess, front, kept, nearest, outlook, parts
from slmops.errors import SpecError, UsageError
from slmops.evaluate.fit_page import render_fit
from slmops.evaluate.fit_text import chosen_because, nothing_fits
from slmops.flow import fit_plan
from slmops.flow.project import load
from tests.flow.test_project import GOOD, write


def row(name: str, **changes: Any) -> Budgeted:
    return Budgeted.model_validate({"name": name, "values": {}, "form": "onnx"} | changes, strict=False)


@given(st.integers(1, 20_000))
def test_parts_double_and_end_with_all(count: int) -> None:
    found = parts(count)
    assert found[-1] == count and all(b > a for a, b in itertools.pairwise(found))
    assert found[0] == count or 64 <= found[0] <= max(64, count // 8 + 1)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60))
def test_of_all_examples_the_outlook_is_the_mean(values: list[float]) -> None:
    found = outlook(values, len(values), 0, 1)
    assert found.low == found.value == found.high == pytest.approx(sum(values) / len(values))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.02, 0.5), st.sampled_from([64, 200, 800]))
def test_a_part_says_where_the_whole_lies(seed: int, rate: float, seen: int) -> None:
    """Of 200 draws of a part, at most a few leave out the mean of all."""
    rng = random.Random(seed)
    values = [float(rng.random() < rate) for _ in range(1600)]
    mean = sum(values) / len(values)
    wrong = 0
    for _ in range(200):
        found = outlook(rng.sample(values, seen), len(values), 0, 1)
        wrong += not found.low <= mean <= found.high
    assert wrong <= 5


def test_equal_values_are_not_certainty() -> None:
    found = outlook([1.0] * 64, 3000, 0, 1)
    assert found.low < 0.95 < found.high


def test_a_candidate_is_judged_against_its_share_of_the_reference() -> None:
    reference = [1.0] * 80 + [0.0] * 20
    same = kept(reference, reference, 0.9, 100)
    assert same.value == pytest.approx(0.08) and same.low == same.high
    assert kept([0.0] * 100, reference, 0.9, 100).high < 0 < kept([1.0] * 100, reference, 0.98, 100).low


def test_the_front_leaves_out_who_is_beaten_in_everything() -> None:
    rows = [
        row("small", state="fits", file_bytes=1, p95_s=2.0, score=0.8), row("good", state="fits", file_bytes=3, p95_s=2.0, score=0.9),
        row("beaten", state="fits", file_bytes=3, p95_s=2.5, score=0.85), row("part", state="quality", file_bytes=0, p95_s=1.0, score=0.9,
                                                                             low=0.1, high=0.95),
    ]  # fmt: skip
    assert front(rows) == ["small", "good"]


def test_the_nearest_is_least_beyond_its_budgets() -> None:
    budget = Budget(file_bytes=100, p95_s=1.0, quality=0.9)
    rows = [row("large", state="file", file_bytes=150), row("slow", state="time", file_bytes=90, p95_s=1.2),
            row("weak", state="quality", file_bytes=10, p95_s=0.1, kept=0.45), row("unseen", file_bytes=101)]  # fmt: skip
    assert [round(excess(one, budget), 3) for one in rows] == [0.5, 0.2, 0.5, 0.01]
    close = nearest(rows, budget)
    assert close is not None and close.name == "slow"
    assert nothing_fits(close, budget) == "nothing fits; nearest is slow: time 1200 ms where 1000 ms may be"
    assert "45.0 % of the reference's score where 90.0 % is asked" in nothing_fits(rows[2], budget)
    assert nearest(rows[3:], budget) is None and nothing_fits(None, budget) == "nothing fits"


def test_the_reason_names_what_was_smaller_and_not_good_enough() -> None:
    chosen = row("b", state="chosen", file_bytes=2_000_000, p95_s=0.004, ram_bytes=5e7, kept=0.99)
    says = chosen_because(chosen, "smallest", [row("a", state="quality", file_bytes=1_000_000), chosen], Budget())
    assert says == (
        "b has the smallest file of those that fit: 2.0 MB, 95 % of answers within 4.0 ms, 50.0 MB of memory, "
        "99.0 % of the reference's score (98 % asked). Smaller but not good enough: a"
    )


def test_combinations_are_all_of_them() -> None:
    assert combinations({"a": (1, 2), "b": ("x",)}) == [{"a": 1, "b": "x"}, {"a": 2, "b": "x"}]
    assert combinations({}) == [{}]


# ---------------------------------------------------------------------------------------------------------- devices


def test_every_device_is_known_by_its_numbers() -> None:
    found = devices.known()
    assert {"pi4-4gb", "pi5-8gb", "orin-nano", "x86-2gb", "laptop", "phone"} <= set(found)
    for device in found.values():
        assert 1e9 < device.ram_bytes < 1e12 and 1 < device.gflops < 1000 and device.cores > 0
        assert 1 < device.gbytes < (10_000 if device.gpu else 1000)
    assert [device.name for device in found.values() if device.gpu] == ["h100-80gb"]
    assert devices.find("this") is None
    with pytest.raises(UsageError, match="there is no device pi5"):
        devices.find("pi5")


def test_a_slower_device_takes_the_worse_ratio_and_says_so() -> None:
    device = devices.Device("d", "Some Box", 1e9, 4, 10.0, 20.0)
    found = devices.slowdown(device, devices.Speed(60.0, 6.0))
    assert (
        found.factor == pytest.approx(60 / 6)
        and "predicted, not measured: 10.0 times" in found.basis
        and "Some Box" in found.basis
    )
    assert devices.slowdown(device, devices.Speed(3.0, 24.0)).factor == pytest.approx(2.0)


@pytest.mark.slow
def test_this_machine_can_be_measured() -> None:
    here = devices.measure_here()
    assert 0.5 < here.gflops < 2000 and 0.5 < here.gbytes < 1000


# ------------------------------------------------------------------------------------------- the space, and its mistakes


def test_what_compress_takes_out_does_not_count_before_it_is_known(tmp_path: Path) -> None:
    """A student that is pruned or trimmed may be smaller than its architecture says: it is not given up for that."""
    for key, values in (("compress.prune", "[null, {ffn: 0.5}]"), ("compress.vocabulary", "[whole, seen]")):
        spec = load(write(tmp_path, GOOD), [f"fit={{vary: {{{key}: {values}}}}}"]).spec
        whole, smaller = fit_plan.space(spec, ()).candidates
        assert whole.least_bytes > 0 and smaller.least_bytes == 0


def test_each_model_is_one_candidate_and_what_does_not_go_together_is_named(tmp_path: Path) -> None:
    spec = load(write(tmp_path, GOOD)).spec
    space = fit_plan.space(spec, ("gguf-q4_0", "gguf-q8_0"))
    names = [one.name for one in space.candidates]
    assert len(names) == len(set(names))
    assert {"onnx-int4", "onnx-int8", "onnx-fp32", "onnx-int4 quantization=gptq", "gguf-q4_0", "gguf-q8_0"} <= set(
        names
    )
    assert sum(name.startswith("gguf-q8_0") for name in names) == 1, "it does not depend on what ONNX is rounded to"
    assert {"onnx-fp32 quantization=gptq"} <= {one.name for one in space.impossible}
    first = space.candidates[0]
    assert first.model == "student-int4" and first.runtime == "onnx_genai" and first.least_bytes > 0
    step = fit_plan.answers(first, 64, 128)
    assert step.params["split"] == "validation" and (step.params["skip"], step.params["max_examples"]) == (64, 128)
    assert fit_plan.timing(first, spec, 1).params["split"] == "validation"


@pytest.mark.parametrize(
    ("fit", "says"),
    [
        ("{vary: {train.epochz: [1]}}", "epochz"),
        ("{vary: {convert.precision: [int3]}}", "fit.vary.convert.precision: int3"),
        ("{vary: {convert.precision: []}}", "has no values"),
        ("{vary: {convert.also: [[gguf-q4_0]]}}", "name forms in fit.also"),
        ("{vary: {data.path: [a.csv]}}", "trials would be judged on different data"),
    ],
)
def test_a_wrong_section_is_refused_with_its_place(fit: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        load(write(tmp_path, f"{GOOD}fit: {fit}\n"))
    assert says in str(caught.value) and "slmops.yaml:" in str(caught.value)


@pytest.mark.parametrize(
    ("reads", "text", "value"),
    [(cli.amount, "500M", 5e8), (cli.amount, "1.5 GB", 1.5e9), (cli.duration, "400ms", 0.4), (cli.duration, "2s", 2.0),
     (cli.share, "98%", 0.98), (cli.share, "0.5", 0.5)],
)  # fmt: skip
def test_units(reads: Any, text: str, value: float) -> None:
    assert reads(text) == pytest.approx(value)


@pytest.mark.parametrize(("reads", "text"), [(cli.amount, "2 apples"), (cli.amount, "-1G"), (cli.duration, "400"), (cli.share, "98"),
                                             (cli.share, "x"), (cli.amount, "0")])  # fmt: skip
def test_what_is_no_quantity_is_refused(reads: Any, text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        reads(text)


# ------------------------------------------------------------------------------------------------------------ the page


def test_the_page_tells_near_scores_apart_and_joins_what_no_other_beats() -> None:
    rows = [
        row("a", state="quality", file_bytes=1_000_000, p95_s=0.01, score=0.850, low=0.99, high=0.99, kept=0.99, answered=9),
        row("b", state="chosen", file_bytes=2_000_000, p95_s=0.02, score=0.854, low=1.0, high=1.0, kept=1.0, answered=9),
        row("<c>", state="fits", file_bytes=3_000_000, p95_s=0.01, score=0.852, low=1.0, high=1.0, kept=1.0, answered=9),
    ]  # fmt: skip
    found = {
        "name": "demo", "device": "this", "chosen": "b", "says": "b fits", "basis": "times were measured", "front": ["a", "b", "<c>"],
        "measured": {"candidates": 3}, "measured_says": "27 of 27 answers asked", "set": ["convert.precision=int4"],
        "reference": {"name": "student-fp32", "score": 0.86, "examples": 9},
        "candidates": [one.model_dump(mode="json") for one in rows],
    }  # fmt: skip
    page = render_fit(found)
    assert page.count("<svg") == 2 and "&lt;c&gt;" in page and "<c>" not in page
    levels = page[page.index('class="levels"') :].partition("</div>")[0]
    shown = re.findall(r">([\d.]+ %)<", levels)
    assert len(shown) == len(set(shown)) >= 2
    lines = [chart.count('class="trend"') for chart in page.split("<svg")[1:]]
    assert lines == [1, 2], "file: a and b; time: a, <c> and b"
