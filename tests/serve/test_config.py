"""A file of models: every mistake with its line, and what it says against what the command line says."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from slmops.cli import serve, serve_file
from slmops.cli.main import main
from slmops.errors import SpecError, UsageError
from slmops.serve.model import Settings


@pytest.fixture
def caught(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the server would be started with."""
    from slmops.serve import app

    found: dict[str, Any] = {}

    def take(wanted: Any, host: str, port: int, say: Any, memory: Any, trials: Any, *rest: Any) -> None:
        found.update(wanted=wanted, host=host, port=port, memory=memory, trials=trials)

    monkeypatch.setattr(app, "serve", take)
    return found


def models(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "genai_config.json").write_text("{}")


FILE = """\
memory: 500M
idle: 600
rows: 4
models:
  big:
    folder: big
    fallback: small
    canaries: canaries.jsonl
    candidate: {folder: next, shadow: 0.5}
  small: {folder: small, rows: 16, idle: 0, load: start}
"""


def test_a_file_says_how_each_model_is_served(tmp_path: Path, caught: dict[str, Any]) -> None:
    models(tmp_path, "big", "small", "next")
    (tmp_path / "canaries.jsonl").write_text('{"prompt": "a"}\n')
    file = tmp_path / "serve.yaml"
    file.write_text(FILE)
    assert main(["serve", "--config", str(file), "--threads", "2", "--idle", "30", "--port", "0"]) == 0
    assert (caught["host"], caught["port"], caught["memory"]) == ("127.0.0.1", 0, 500_000_000)
    assert caught["wanted"] == [
        Settings(tmp_path / "big", "big", 4, None, 2, 256, "fit", 30.0, "small", tmp_path / "canaries.jsonl"),
        Settings(tmp_path / "small", "small", 16, None, 2, 256, "start", 0.0),
    ]
    (trial,) = caught["trials"]
    assert (trial.name, trial.folder, trial.share, trial.shadow) == ("big", tmp_path / "next", 0.0, 0.5)


def test_everything_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    models(tmp_path, "small")
    file = tmp_path / "serve.yaml"
    file.write_text(
        "rowz: 4\nmodels:\n  big: {folder: big, rows: 0}\n  small: {folder: small, load: now, falback: big}\n"
    )
    with pytest.raises(SpecError) as wrong:
        serve_file.read(file)
    told = {(problem.line, problem.path) for problem in wrong.value.problems}
    assert told == {(1, "rowz"), (3, "models.big.rows"), (4, "models.small.load"), (4, "models.small.falback")}
    assert "did you mean rows?" in str(wrong.value) and "did you mean fallback?" in str(wrong.value)
    file.write_text(
        "memory: lots\nmodels:\n  big:\n    folder: big\n    fallback: big\n  small: {folder: small, canaries: c}\n"
    )
    with pytest.raises(SpecError) as wrong:
        serve_file.read(file)
    told = {(problem.line, problem.path) for problem in wrong.value.problems}
    assert told == {
        (1, "memory"), (4, "models.big.folder"), (5, "models.big.fallback"), (6, "models.small.canaries"),
    }  # fmt: skip
    for text in ("", "models: {}", "- a"):
        file.write_text(text)
        with pytest.raises(SpecError):
            serve_file.read(file)
    with pytest.raises(UsageError):
        serve_file.read(tmp_path / "none.yaml")


def test_a_folder_of_models_is_all_of_them_on_demand(tmp_path: Path, caught: dict[str, Any]) -> None:
    models(tmp_path / "all", "b", "a")
    models(tmp_path, "one")
    (tmp_path / "all" / "notes").mkdir()
    given = [f"{tmp_path}/one", f"{tmp_path}/all", "--fallback", "one=a", "--memory", "2G"]
    assert main(["serve", *given]) == 0
    found = [(one.name, one.load, one.fallback) for one in caught["wanted"]]
    assert found == [("one", "fit", "a"), ("a", "demand", None), ("b", "demand", None)]
    assert caught["memory"] == 2 * 10**9 and caught["trials"] == []
    assert main(["serve", f"x={tmp_path}/all", "--load", "start"]) == 0
    assert [(one.name, one.load) for one in caught["wanted"]] == [("x/a", "start"), ("x/b", "start")]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "no models"),
        (["one", "--config", "serve.yaml"], "given twice"),
        (["one", "--fallback", "two=one"], "no model is called two"),
        (["one", "--fallback", "one"], "no model is called"),
        (["one", "--port", "70000"], "no port"),
        (["all", "a=one"], "two models are called a"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    given: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    models(tmp_path, "one", "all/a")
    monkeypatch.chdir(tmp_path)
    assert main(["serve", *given]) == 2
    assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["serve", "one", "--idle", "-1"])
    assert serve.waiting("0") == 0.0


@pytest.mark.slow
def test_a_server_starts_from_a_file_with_a_candidate(tmp_path: Path) -> None:
    from slmops.engines.minimal import write_minimal

    (tmp_path / "one").mkdir()
    write_minimal(tmp_path / "one", "onnx_genai")
    file = tmp_path / "serve.yaml"
    file.write_text(
        "port: 0\nthreads: 1\nmodels:\n  desk:\n    folder: one\n    candidate: {folder: one, share: 1}\n"
        "  late: {folder: one, load: demand}\n"
    )
    command = [sys.executable, "-m", "slmops.cli.main", "serve", "--config", str(file), "--rows", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            lines = []
            for line in process.stderr:
                lines.append(line)
                if line.startswith("serving"):
                    break
            assert "late: 2 answers at a time, onnx, loaded when it is asked\n" in lines, "".join(lines)
            with httpx.Client(
                base_url=lines[-1].split()[1].removesuffix(",").removesuffix("/v1"), timeout=60
            ) as client:
                for model, version in (("desk", "2"), ("late", "1")):
                    asked = {"model": model, "prompt": "x", "max_tokens": 2}
                    assert client.post("/v1/completions", json=asked).headers["x-slmops-version"] == version
                told = client.get("/admin/models").json()["models"]
            assert told["desk"]["candidate"]["share"] == 1.0 and told["late"]["state"] == "loaded"
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            process.kill()
