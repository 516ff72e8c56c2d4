"""`slmops bench`: its arithmetic, its page, and the real thing on minimal models."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from slmops.cli.bench import named, table
from slmops.cli.main import main
from slmops.core.engine import Sampling
from slmops.engines import open_engine
from slmops.engines.minimal import write_minimal
from slmops.engines.worker import energy, passage
from slmops.errors import UsageError
from slmops.evaluate.bench import summary
from slmops.evaluate.bench_page import render_bench


def one(first: float, total: float, peak: int, joules: float | None) -> dict[str, Any]:
    """A round of two lengths with three answers each; the last answer of each is an outlier."""
    lists = {"first_token_s": [[first, first, 9.0]] * 2, "total_s": [[total, total, 19.0]] * 2, "tokens": [[5] * 3] * 2}
    return lists | {"load_s": 0.5, "peak_bytes": peak, "idle_bytes": 60, "joules": joules}


def test_numbers_are_medians_with_the_range_of_the_rounds() -> None:
    rounds = [one(0.1, 0.5, 100, 6.0), one(0.2, 1.0, 300, 12.0), one(0.4, 2.4, 200, 3.0)]
    found = summary(rounds, [10, 20], 5)
    assert found["peak_bytes"] == 200 and found["over_idle_bytes"] == 140 and found["load_s"] == 0.5
    assert found["joules_per_token"] == pytest.approx(6.0 / 30)
    short, long = found["prompts"]
    assert short["first_token_s"] == {"value": 0.2, "low": 0.1, "high": 0.4}
    assert short["prompt_tokens_per_s"]["value"] == pytest.approx(50) and long["prompt_tokens_per_s"]["value"] == 100
    assert short["new_tokens_per_s"] == {"value": pytest.approx(5), "low": pytest.approx(2), "high": pytest.approx(10)}
    assert summary([one(0.1, 0.1, 50, None)], [10], 1)["prompts"][0]["new_tokens_per_s"] is None
    below = summary([one(0.1, 0.1, 50, None)], [10], 1)
    assert below["joules_per_token"] is None and below["over_idle_bytes"] == 0


def test_rates_of_a_batch_are_of_all_its_answers_and_compared_round_by_round() -> None:
    rounds = [one(0.2, 1.0, 100, 40.0), one(0.2, 2.2, 100, 20.0), one(0.2, 0.6, 100, 20.0)]
    single = [one(0.1, 0.5, 100, None), one(0.1, 1.1, 100, None), one(0.1, 0.4, 100, None)]
    found = summary(rounds, [10, 20], 5, 8, single)
    assert found["joules_per_token"] == pytest.approx(20.0 / (6 * 8 * 5))
    short = found["prompts"][0]
    assert short["first_token_s"]["value"] == 0.2 and short["prompt_tokens_per_s"]["value"] == pytest.approx(
        8 * 10 / 0.2
    )
    assert short["new_tokens_per_s"] == {
        "value": pytest.approx(8 * 4 / 0.8), "low": pytest.approx(8 * 4 / 2.0), "high": pytest.approx(8 * 4 / 0.4),
    }  # fmt: skip
    assert short["speed_up"] == {
        "value": pytest.approx(4),
        "low": pytest.approx(4),
        "high": pytest.approx(8 * 0.3 / 0.4),
    }
    assert short["answers_per_s"] == {
        "value": pytest.approx(8),
        "low": pytest.approx(8 / 2.2),
        "high": pytest.approx(8 / 0.6),
    }
    assert summary(single, [10, 20], 5)["prompts"][0]["speed_up"] is None
    assert summary(rounds, [10, 20], 1, 8, single)["prompts"][0]["speed_up"] is None


def test_energy_is_that_of_the_packages(tmp_path: Path) -> None:
    assert energy(tmp_path) is None
    for name, value in (("intel-rapl:0", 3_000_000), ("intel-rapl:1", 500_000), ("intel-rapl:0:0", 9_000_000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{value}\n")
    assert energy(tmp_path) == 3.5
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()  # or may not be read
    assert energy(tmp_path) is None


def test_folders_are_called_by_what_tells_them_apart(tmp_path: Path) -> None:
    found = named([f"{tmp_path}/a/model", f"{tmp_path}/b/model", "mine=/c"])
    assert list(found) == ["a/model", "b/model", "mine"]
    assert list(named([f"{tmp_path}/a/model"])) == ["model"]
    with pytest.raises(UsageError, match="called x"):
        named(["x=/a", "x=/b"])


@pytest.mark.parametrize("runtime", ["torch", "onnx_genai", pytest.param("llama_cpp", marks=pytest.mark.slow)])
def test_answers_can_go_on_after_the_end(runtime: Any, tmp_path: Path) -> None:
    write_minimal(tmp_path, runtime)
    engine = open_engine(tmp_path)
    for length in (3, 20, 40):
        ids = passage(engine, length)
        assert len(ids) == len(passage(engine, length, 3)) == length
        endless = Sampling(max_new_tokens=17, ignore_end=True)
        answer = engine.generate([ids], endless)[0]
        assert len(answer.tokens) == 17
        engine.end_ids = frozenset(range(0, 300))  # type: ignore[attr-defined]  # any token would end the answer
        assert len(engine.generate([ids], endless)[0].tokens) == 17
        plain = engine.generate([ids], Sampling(max_new_tokens=17))[0]
        assert plain.finished and len(plain.tokens) >= 1
    engine.close()


class Page(HTMLParser):
    """Counts what is drawn and keeps the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.drawings, self.text = 0, ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.drawings += tag == "svg"

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.slow
def test_models_are_measured_against_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for runtime in ("torch", "onnx_genai"):
        (tmp_path / runtime).mkdir()
        write_minimal(tmp_path / runtime, runtime)  # type: ignore[arg-type]
    page = tmp_path / "bench.html"
    code = main(
        ["bench", f"<t>={tmp_path / 'torch'}", str(tmp_path / "onnx_genai"), "--prompt", "8", "16", "--new", "4", "--rounds", "2",
         "--repeats", "2", "--threads", "1", "--html", str(page), "--json"]
    )  # fmt: skip
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert code == 0 and list(found["models"]) == ["<t>", "onnx_genai"]
    assert said.err.index("  <t>") < said.err.index("  onnx_genai") and said.err.rindex("  <t>") > said.err.rindex(
        "  onnx_genai"
    )
    for model in found["models"].values():
        assert [p["tokens"] for p in model["prompts"]] == [8, 16]
        assert all(p["first_token_s"]["low"] <= p["first_token_s"]["value"] for p in model["prompts"])
        assert model["peak_bytes"] > model["over_idle_bytes"] >= 0 and model["model_bytes"] > 1000
    lines = table(found)
    assert len(lines) == 3 and len({len(line) for line in lines}) == 1
    shown = Page(page.read_text())
    assert shown.drawings == 2 * (6 + 3) and "<t>" in shown.text and "2 rounds" in shown.text
    assert Page(render_bench(found)).text == shown.text


@pytest.mark.slow
def test_answers_at_once_are_measured_beside_one_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_minimal(tmp_path / name, "onnx_genai")
    page = tmp_path / "bench.html"
    models = [str(tmp_path / "a"), f"<b>={tmp_path / 'b'}"]
    code = main(["bench", *models, "--batch", "4", "1", "4", "--prompt", "8", "--new", "4", "--rounds", "2", "--repeats", "2",
                 "--threads", "1", "--html", str(page), "--json"])  # fmt: skip
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert code == 0 and list(found["models"]) == ["a, batch 1", "a, batch 4", "<b>, batch 1", "<b>, batch 4"]
    assert said.err.count("  <b>, batch 4") == 2, "each number in a process of its own, once a round"
    assert found["settings"]["batches"] == [1, 4]
    for name, model in found["models"].items():
        assert name == f"{model['of']}, batch {model['batch']}"
        prompt = model["prompts"][0]
        assert (prompt["speed_up"] is None) == (model["batch"] == 1)
        assert prompt["new_tokens_per_s"]["value"] > prompt["answers_per_s"]["value"] > 0
        assert model["peak_bytes"] > 0
    lines = table(found)
    assert len(lines) == 5 and lines[2].count("×") == 1 and "speed-up" in lines[0]
    text = page.read_text()
    shown = Page(text)
    # over the batches, and its two keys; the first token and two of memory for each of four; the files of two
    assert shown.drawings == 1 + 2 + 3 * 4 + 2 and text.count('class="thread') == 4 and "<b>, batch 4" in shown.text
    single = main(
        ["bench", models[0], "--batch", "2", "--prompt", "8", "--new", "1", "--rounds", "1", "--repeats", "1", "--json"]
    )
    alone = json.loads(capsys.readouterr().out)
    assert single == 0 and alone["models"]["a, batch 2"]["prompts"][0]["speed_up"] is None
    assert Page(render_bench(alone)).drawings == 4, "one number is no line"
    assert "–" in table(alone)[1]


@pytest.mark.slow
def test_what_cannot_be_measured_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_minimal(tmp_path, "onnx_genai")
    assert main(["bench", str(tmp_path / "nothing")]) == 1
    assert "no model folder" in capsys.readouterr().err
    assert main(["bench", str(tmp_path), "--prompt", "60", "--new", "10"]) == 1
    said = capsys.readouterr().err
    assert "holds 64 tokens, 70 are asked for" in said and "hint: " in said and "Traceback" not in said
    with pytest.raises(SystemExit):
        main(["bench", str(tmp_path), "--rounds", "0"])


def test_a_page_without_a_folder_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(tmp_path), "--html", str(tmp_path / "none" / "bench.html")]) == 2
    assert "there is no folder" in capsys.readouterr().err
