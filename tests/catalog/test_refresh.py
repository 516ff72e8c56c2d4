"""The facts of the catalogue are asked for from a hub, shown where they differ, and written when that is wanted."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from slmops.catalog import models, refresh
from tests.hub_stand_in import Hub, client

OURS = dataclasses.replace(models.load()["smollm2-135m-instruct"], name="desk", hub="acme/desk")
THEIRS = {**OURS.config, "num_hidden_layers": 31, "architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16"}
PAGE = {
    "cardData": {"license": "mit", "language": ["en", "de"]},
    "gated": "auto",
    "safetensors": {"parameters": {"BF16": 138_055_104}, "total": 138_055_104},
}


def ask(file: Path, hub: Hub, *words: str) -> tuple[int, str, str]:
    """The command in a process of its own, since the hub's client reads its address once."""
    with hub.serve() as url:
        done = subprocess.run(
            [sys.executable, "-m", "slmops.cli.main", "catalog", "--file", str(file), "--refresh", *words],
            capture_output=True, text=True, timeout=120, check=False, env=client(url, file.parent / "home"),
        )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_what_the_hub_says_is_shown_then_written_then_the_same(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub", reason="needs the extra `hub`")
    file = tmp_path / "models.json"
    before = models.dump([OURS, dataclasses.replace(OURS, name="gone", hub="acme/gone")])
    file.write_text(before)
    hub = Hub({"config.json": json.dumps(THEIRS).encode(), "model.safetensors": b""}, "models", about=PAGE)

    code, out, err = ask(file, hub)
    assert code == 0, err
    for line in (
        "config.num_hidden_layers: 30 → 31",
        "licence: apache-2.0 → mit",
        "gated: False → True",
        "gone\n  not asked: ",
    ):
        assert line in out
    assert "languages: ['en'] → ['en', 'de']" in out and "architectures" not in out
    assert "nothing is written" in err and file.read_text() == before

    code, out, err = ask(file, hub, "desk", "--write", "--json")
    assert code == 0, err
    (row,) = json.loads(out)
    assert {change["key"] for change in row["changes"]} == {"config.num_hidden_layers", "licence", "languages", "gated"}
    assert row["note"] is None, "the hub's count is that of the new configuration"
    written = models.load(file)
    assert written["desk"].config["num_hidden_layers"] == 31 and written["desk"].ollama == OURS.ollama
    assert written["gone"].config == OURS.config

    code, out, err = ask(file, hub, "desk")
    assert (code, out) == (0, "the hub says the same of all of them\n"), err


@pytest.mark.slow
def test_a_hub_that_is_away_changes_nothing(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub", reason="needs the extra `hub`")
    file = tmp_path / "models.json"
    file.write_text(models.dump([OURS]))
    done = subprocess.run(
        [sys.executable, "-m", "slmops.cli.main", "catalog", "--file", str(file), "--refresh", "--write"],
        capture_output=True, text=True, timeout=120, check=False, env=client("http://127.0.0.1:9", tmp_path / "home"),
    )  # fmt: skip
    assert done.returncode == 1
    assert "cannot be reached" in done.stderr and "works offline" in done.stderr
    assert file.read_text() == models.dump([OURS])


def page(**facts: Any) -> dict[str, Any]:
    return {"licence": None, "languages": None, "gated": None, "weights": None} | facts


def test_what_the_hub_does_not_say_stays() -> None:
    answer = refresh.compare(OURS, page(), {})
    assert answer.model == OURS and answer.changes == () and answer.note == ""


def test_another_kind_of_model_is_left_to_a_person() -> None:
    answer = refresh.compare(OURS, page(licence="mit"), {**THEIRS, "model_type": "qwen3"})
    assert answer.model == OURS and "qwen3 on the hub, llama here" in answer.note


def test_a_count_that_no_configuration_explains_is_said() -> None:
    total = OURS.weights.total
    assert refresh.compare(OURS, page(weights=total), {}).note == ""
    assert refresh.compare(OURS, page(weights=total + OURS.weights.embedding), {}).note == "", (
        "a tied matrix kept twice"
    )
    assert f"{total + 5:,}" in refresh.compare(OURS, page(weights=total + 5), {}).note


def test_many_languages_are_not_replaced_by_a_list_of_tags() -> None:
    many = dataclasses.replace(OURS, languages=("multi",))
    assert refresh.compare(many, page(languages=["en"]), {}).changes == ()
    assert refresh.compare(OURS, page(languages=["en"]), {}).changes == ()
