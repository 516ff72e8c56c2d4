"""`slmops catalog` as users meet it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slmops.catalog import devices
from tests.cli.conftest import Slmops
from tests.cli.test_commands import HEAVY, WEB, loaded_by


def rows(text: str) -> list[str]:
    return [line.split()[0] for line in text.splitlines()[1:] if line.strip()]


def test_all_of_them_the_smallest_first_without_heavy_imports() -> None:
    modules, text = loaded_by("catalog", "--json")
    found = json.loads(text)
    assert len(found) >= 40 and found[0]["parameters"] <= found[-1]["parameters"]
    assert {"hub", "class", "context", "languages", "licence", "azure", "ollama", "config"} <= set(found[0])
    assert not modules & (HEAVY | WEB | {"huggingface_hub", "pydantic", "ruamel.yaml"})


def test_the_class_is_a_filter(slmops: Slmops) -> None:
    micro = rows(slmops("catalog", "--class", "micro").out)
    assert "qwen3-0.6b" in micro and "qwen3-1.7b" not in micro
    both = rows(slmops("catalog", "qwen", "--licence", "apache-2.0,mit").out)
    assert "qwen2.5-7b-instruct" in both and "qwen2.5-3b-instruct" not in both, "that one is for research"


def test_one_model_in_full(slmops: Slmops) -> None:
    text = slmops("catalog", "qwen3-0.6b").out
    for part in ("596,049,920", "Qwen/Qwen3-0.6B", "qwen3:0.6b", "40,960 tokens"):
        assert part in text
    assert [model["name"] for model in json.loads(slmops("catalog", "phi-4", "--json").out)] == ["phi-4"]


def test_what_fits_shrinks_with_the_device_and_the_context(slmops: Slmops) -> None:
    large = rows(slmops("catalog", "--fits", "pi4-8gb").out)
    small = rows(slmops("catalog", "--fits", "x86-2gb").out)
    longer = slmops("catalog", "--fits", "x86-2gb", "--context", "32768")
    assert set(small) < set(large) and "llama-3.1-8b-instruct" in large
    assert set(rows(longer.out)) < set(small)
    assert "left out for a shorter context" in longer.err and "counted, not measured" in longer.err
    found = json.loads(slmops("catalog", "--fits", "x86-2gb", "--json").out)
    assert all(model["needs"]["total_bytes"] <= found["usable_bytes"] for model in found["models"])


def test_a_gpu_holds_weights_in_16_bits(slmops: Slmops) -> None:
    outcome = slmops("catalog", "phi-4", "--fits", "h100-80gb")
    assert "in 16 bits" in outcome.out and "8 GB stay free" in outcome.err
    found = json.loads(slmops("catalog", "phi-4", "--fits", "h100-80gb", "--json").out)
    assert found["models"][0]["needs"]["weights_bytes"] == 2 * found["models"][0]["parameters"]
    long = json.loads(slmops("catalog", "llama", "--fits", "h100-80gb", "--context", "131072", "--json").out)
    assert long["usable_bytes"] == pytest.approx(72e9) and long["models"]


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("words", [(), ("--fits", "laptop"), ("--class", "medium")], ids=" ".join)
def test_no_line_is_wider_than_the_terminal(
    columns: int, words: tuple[str, ...], slmops: Slmops, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    outcome = slmops("catalog", *words)
    assert max(len(line) for line in outcome.out.splitlines()) <= columns
    assert ("apache-2.0" in outcome.out) == (columns == 120 or "--fits" not in words)


def test_what_cannot_be_asked_is_refused(slmops: Slmops) -> None:
    slmops("catalog", "qwen9").refused(1, "no model qwen9")
    slmops("catalog", "--licence", "gpl").refused(2, "no model has the licence gpl")
    slmops("catalog", "--fits", "pi9").refused(2, "there is no device pi9")
    slmops("fit", "--device", "h100-80gb").refused(2, "is a GPU")
    slmops("catalog", "--context", "5").refused(2, "--context goes with --fits")
    slmops("catalog", "--write").refused(2, "--write goes with --refresh")
    slmops("catalog", "phi-4", "--class", "micro").refused(2, "no model is all of that")
    slmops("catalog", "smollm2", "--class", "medium").refused(2, "no model is all of that")
    slmops("catalog", "--file", "nowhere.json").refused(2, "nowhere.json")


def test_a_model_is_found_by_its_name_elsewhere(slmops: Slmops) -> None:
    assert "Qwen/Qwen3-0.6B" in slmops("catalog", "qwen3:0.6b").out


def test_a_profile_that_is_none_is_named(slmops: Slmops, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLMOPS_DEVICES", str(tmp_path))
    for text in ("title: x\nram_gb: lots\ncores: 1\ncore_gflops: 1\nmemory_gbytes: 1\n", "5", "[1]"):
        (tmp_path / "odd.yaml").write_text(text)
        slmops("catalog", "--fits", "pi5-8gb").refused(2, "odd.yaml is no device profile")
    slmops("doctor", "--save", "").refused(2, "")


def test_a_machine_that_was_measured_is_a_device(
    slmops: Slmops, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SLMOPS_DEVICES", str(tmp_path / "devices"))
    monkeypatch.setattr(devices, "measure_here", lambda: devices.Speed(40.0, 8.0))
    slmops("doctor", "--save", "laptop").refused(2, "is a device of slmops' own")
    slmops("doctor", "--save", "../x").refused(2, "cannot name a device")
    assert not (tmp_path / "devices").exists()
    kept = slmops("doctor", "--save", "gateway-7")
    assert "a core reaches 40 GFLOP/s, the memory 8 GB/s" in kept.out
    device = devices.find("gateway-7")
    assert device is not None and device.measured and device.cores >= 1 and device.ram_bytes > 1e8
    found = devices.slowdown(device, devices.Speed(80.0, 8.0))
    assert found.factor == pytest.approx(2.0) and "measured there" in found.basis, (
        "what was reached there is not cut again"
    )
    assert "gateway-7 (" in slmops("catalog", "--fits", "gateway-7").err
    (tmp_path / "devices" / "bad.yaml").write_text("cores: 3\n")
    slmops("catalog", "--fits", "gateway-7").refused(2, "bad.yaml is no device profile")
