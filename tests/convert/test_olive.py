"""Olive as a step: what of its file is taken, changed or refused, and a workflow run to its end; with the real Olive in a slow test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from slmops.cli.main import main
from slmops.convert import olive, onnx_genai
from slmops.core.method import Context, SilentProgress
from slmops.engines import open_engine
from slmops.engines.fidelity import choose
from slmops.errors import ConversionError, ModelError, UsageError
from slmops.flow.project import load
from slmops.store import environments
from tests.tiny import write_project
from tests.train import bases
from tests.train.conftest import data as data
from tests.train.conftest import tokenizer as tokenizer

BUILDER = {"type": "ModelBuilder", "precision": "int4", "int4_block_size": 32}
FILES = ("data/gold.jsonl",)


def write(folder: Path, **tree: Any) -> Path:
    file = folder / "workflow.json"
    file.write_text(json.dumps({"passes": {"b": BUILDER}} | tree))
    return file


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"input_model": {"type": "ONNXModel"}}, "input_model is ONNXModel"),
        ({"passes": {}}, "there are no passes"),
        ({"passes": {"q": {"type": "Gptq"}}}, r"no pass writes a folder for ONNX Runtime GenAI \(there are: Gptq\)"),
        ({"search_strategy": {"execution_order": "joint"}}, "search_strategy is set"),
        ({"passes": {"q": {"type": "Gptq", "data_config": "wiki"}, "b": BUILDER}}, r"passes\.q\.data_config: there is no"),
        ({"systems": {"x": {"type": "Docker"}}}, r"systems\.x is a Docker"),
        (
            {"systems": {"x": {"accelerators": [{"device": "gpu", "execution_providers": ["CUDAExecutionProvider"]}]}}},
            r"systems\.x is for CUDAExecutionProvider",
        ),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_with_its_key(tree: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        olive.covers(olive.Params(files=FILES), write(tmp_path, **tree))
    assert caught.value.hint


@pytest.mark.parametrize("text", ["[1]", "{", "passes: {"])
def test_what_is_no_configuration(text: str, tmp_path: Path) -> None:
    (tmp_path / "w.json").write_text(text)
    with pytest.raises(UsageError, match="not a configuration of Olive"):
        olive.read(tmp_path / "w.json")


def test_yaml_and_older_files_with_an_engine_are_read(tmp_path: Path) -> None:
    (tmp_path / "w.yaml").write_text(
        "engine: {search_strategy: false}\npasses: {b: {type: ModelBuilder, config: {precision: fp32}}}"
    )
    tree = olive.read(tmp_path / "w.yaml")
    olive.check(tree, tmp_path / "w.yaml")
    assert tree["search_strategy"] is False and not olive.rounds(tree)
    assert olive.rounds({"passes": {"b": BUILDER}}) and olive.rounds({"passes": {"q": {"type": "Gptq"}}})


def test_the_student_and_its_examples_are_put_in_and_the_passes_stay(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("pass")
    quantizer = {"type": "Gptq", "bits": 4, "group_size": 32}
    own = {"name": "mine", "type": "HuggingfaceContainer", "load_dataset_config": {"data_files": "script.py"}}
    tree = {
        "input_model": {"type": "HfModel", "model_path": "org/other", "load_kwargs": {"attn_implementation": "eager"}},
        "data_configs": [own],
        "passes": {"q": quantizer, "r": quantizer | {"data_config": "mine"}, "b": BUILDER},
        "evaluators": {"e": {}}, "output_dir": "/elsewhere", "cache_dir": "c",
    }  # fmt: skip
    file = write(tmp_path, **tree)
    assert olive.covers(olive.Params(files=FILES), file) == (file, tmp_path / "script.py")
    found = olive.adapt(olive.read(file), tmp_path, Path("/m"), Path("/c.jsonl"), 96, tmp_path / "work")
    assert found["input_model"] == {
        "type": "HfModel",
        "load_kwargs": {"attn_implementation": "eager"},
        "model_path": "/m",
    }
    assert found["passes"] == {"q": quantizer | {"data_config": "slmops"}, "r": tree["passes"]["r"], "b": BUILDER}  # type: ignore[index]
    mine, ours = found["data_configs"]
    assert mine["load_dataset_config"]["data_files"] == str(tmp_path / "script.py")
    assert ours["load_dataset_config"]["data_files"] == "/c.jsonl"
    assert ours["pre_process_data_config"]["max_seq_len"] == 96
    assert "evaluators" not in found and found["output_dir"] == str(tmp_path / "work" / "out")
    assert found["systems"][found["target"]]["accelerators"][0]["device"] == "cpu"


def test_a_plan_has_the_workflow_and_refuses_a_wrong_one_before_it_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project = write_project(tmp_path)
    before = {step.id: step for step in load(project, []).plan()}
    file = write(tmp_path)
    steps = {step.id: step for step in load(project, [f"convert.olive.int4={file}"]).plan()}
    step = steps["student-olive-int4"]
    assert (
        step.method == "convert.olive" and step.inputs["model"] == "student" and step.sources == {"config": str(file)}
    )
    assert steps["predict-student-olive-int4"].inputs["model"] == "student-olive-int4"
    assert steps["measure"].params["variants"]["student-olive-int4"] == "onnx_genai"
    changed = {id for id, one in before.items() if steps[id] != one}
    assert changed == {"fidelity", "measure", "report"}, "keys of other steps stay"
    write(tmp_path, passes={"q": {"type": "Gptq"}})
    assert main(["run", "-f", str(project), "--set", f"convert.olive.int4={file}"]) == 2
    assert "no pass writes a folder" in capsys.readouterr().err
    assert not (tmp_path / ".slmops" / "steps").exists()


@pytest.fixture
def model(tokenizer: Path, tmp_path: Path) -> Path:
    return bases.save("qwen3", tokenizer, tmp_path / "model")


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment whose Olive copies the folder `made` to where it is asked to write, if there is one."""
    folder = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for name, version in olive.ENVIRONMENT.versions.items():
        info = packages / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (packages / "olive").mkdir()
    (packages / "olive" / "__main__.py").write_text(
        "import json, pathlib, shutil, sys\n"
        f"made, seen = pathlib.Path({str(tmp_path / 'made')!r}), pathlib.Path({str(tmp_path / 'seen.json')!r})\n"
        "work = json.loads(pathlib.Path(sys.argv[3]).read_text())\n"
        "rows = pathlib.Path(work['data_configs'][-1]['load_dataset_config']['data_files']).read_text().splitlines()\n"
        "seen.write_text(json.dumps([work, [json.loads(row) for row in rows]]))\n"
        "if not made.is_dir(): sys.exit('ConnectionError: no such dataset')\n"
        "shutil.copytree(made, pathlib.Path(work['output_dir']) / 'model')\n"
    )
    monkeypatch.setenv("SLMOPS_ENVIRONMENT_OLIVE", str(folder))
    return tmp_path / "made"


def convert(model: Path, data: Path, config: Path, out: Path) -> tuple[dict[str, Any], Context]:
    ctx = Context(0, out.parent / "scratch", out, progress=SilentProgress())
    ctx.scratch.mkdir()
    out.mkdir()
    inputs = {"model": model, "data": data, "config": config}
    return olive.run(olive.Params(files=FILES, examples=5, fidelity_prompts=4), inputs, out, ctx), ctx


def test_a_result_is_taken_checked_and_runs(stand_in: Path, model: Path, data: Path, tmp_path: Path) -> None:
    stand_in.mkdir()
    ours = onnx_genai.Params(precision="fp32", fidelity_prompts=4)
    onnx_genai.run(ours, {"model": model, "data": data}, stand_in, Context(0, tmp_path / "s", tmp_path))
    (stand_in / "model_config.json").write_text(json.dumps({"path": str(tmp_path)}))
    (stand_in / "chat_template.jinja").write_text("another one")
    facts, ctx = convert(model, data, write(tmp_path, passes={"b": BUILDER | {"precision": "fp32"}}), tmp_path / "out")
    work, rows = json.loads((tmp_path / "seen.json").read_text())
    assert work["input_model"]["model_path"] == str(model)
    assert len(rows) == 5 and all(row["messages"][-1]["role"] == "assistant" for row in rows)
    tests = {json.loads(line)["messages"][0]["content"] for line in (data / "test.jsonl").read_text().splitlines()}
    assert not tests & {row["messages"][0]["content"] for row in rows}
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.onnx", "genai_config.json", "fidelity.json"} <= names and "model_config.json" not in names
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == (model / "chat_template.jinja").read_text()
    assert facts["token_agreement"] == 1.0 and facts["calibration_examples"] == 0
    engine = open_engine(tmp_path / "out")
    assert engine.encode(choose(data, 1)[0].prompt_messages())
    assert not (ctx.scratch / "olive").exists()


def test_what_olive_made_earlier_is_taken_as_it_is(model: Path, data: Path, tmp_path: Path) -> None:
    earlier = tmp_path / "earlier" / "model"
    earlier.mkdir(parents=True)
    ours = onnx_genai.Params(precision="int4", fidelity_prompts=4)
    onnx_genai.run(ours, {"model": model, "data": data}, earlier, Context(0, tmp_path / "s", tmp_path))
    covered = olive.covers(olive.Params(files=FILES), earlier.parent)
    assert earlier / "model.onnx.data" in covered and earlier / "genai_config.json" in covered
    facts, _ctx = convert(model, data, earlier.parent, tmp_path / "out")
    assert (tmp_path / "out" / "model.onnx.data").read_bytes() == (earlier / "model.onnx.data").read_bytes()
    assert facts["token_agreement"] == json.loads((earlier / "fidelity.json").read_text())["token_agreement"]
    with pytest.raises(ModelError) as caught:
        open_engine(earlier.parent)
    assert caught.value.hint == f"did you mean {earlier}?"
    (earlier / "genai_config.json").unlink()
    with pytest.raises(ConversionError, match=r"ended with only model/model\.onnx"):
        olive.covers(olive.Params(files=FILES), earlier.parent)


def test_how_olive_failed_is_said(stand_in: Path, model: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"(?s)Olive failed: .*no such dataset") as caught:
        convert(model, data, write(tmp_path), tmp_path / "out")
    assert "name the data config `slmops`" in caught.value.hint
    for files, said in ((["model.onnx"], r"ended with only model/model\.onnx"), (["config.json"], "no ONNX model"),
                        (["a/genai_config.json", "b/genai_config.json"], "several models: model/a, model/b")):  # fmt: skip
        root = tmp_path / said[:5]
        for name in files:
            (root / "model" / name).parent.mkdir(parents=True, exist_ok=True)
            (root / "model" / name).write_text("{}")
        with pytest.raises(ConversionError, match=said):
            olive.found_model(root)


def test_versions_of_olive_are_in_the_key(tmp_path: Path) -> None:
    from slmops.flow import methods

    found = methods.environment(olive.DECLARATION, 1)
    assert found["environment olive"] == olive.ENVIRONMENT.key(environments.this_python())[:16]
    assert olive.ENVIRONMENT.versions["olive-ai"] == "0.13.0"


@pytest.mark.slow
def test_the_real_olive(model: Path, data: Path, tmp_path: Path) -> None:
    """GPTQ on the project's examples, the rest rounded, built: the guide's workflow, offline but for the making of the environment."""
    quantizer = {"bits": 4, "group_size": 32, "sym": True}
    rest = {"type": "Rtn", **quantizer, "lm_head": True, "embeds": True}
    passes = {"layers": {"type": "Gptq", **quantizer}, "rest": rest, "build": BUILDER}
    facts, ctx = convert(model, data, write(tmp_path, passes=passes), tmp_path / "out")
    assert facts["passes"] == ["Gptq", "Rtn", "ModelBuilder"] and facts["calibration_examples"] == 5
    found = {}
    for precision in ("fp32", "int4"):
        (tmp_path / precision).mkdir()
        ours = onnx_genai.Params(precision=precision, fidelity_prompts=4)
        inputs = {"model": model, "data": data}
        found[precision] = onnx_genai.run(ours, inputs, tmp_path / precision, Context(0, tmp_path / "s", tmp_path))
    assert facts["model_bytes"] < found["fp32"]["model_bytes"] / 2
    assert 0 < facts["mean_kl"] < 2 * found["int4"]["mean_kl"], "rounded about as ours is"
    assert "Running pass layers:gptq" in (ctx.scratch / "olive.log").read_text()
