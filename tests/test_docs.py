"""Documentation that tests keep true: generated pages are current, blocks run, links lead somewhere."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import SPEC

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.M | re.S)


def blocks(path: Path) -> list[tuple[str, str]]:
    return FENCE.findall(path.read_text())


def shell(script: str, folder: Path) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=folder, text=True, capture_output=True, timeout=1800,
        env={**os.environ, "PATH": path}, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 3, 4), f"{script}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.parametrize("page", ["cli.md", "spec.md", "import.md"])
def test_reference_is_current(page: str) -> None:
    module = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    assert (ROOT / "docs" / "reference" / page).read_text() == module["PAGES"][page](), "run `make docs`"


def test_links_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            if not target.startswith(("http:", "https:", "mailto:")):
                assert (page.parent / target).exists(), f"{page}: {target}"


@pytest.mark.slow
def test_the_guide_runs(tmp_path: Path) -> None:
    spec_written = False
    for kind, text in blocks(ROOT / "docs" / "guides" / "your-own-task.md"):
        if kind == "python":
            subprocess.run([sys.executable, "-c", text], cwd=tmp_path, check=True, timeout=60)
        elif kind == "yaml" and not spec_written:
            (tmp_path / "slmops.yaml").write_text(text)
            spec_written = True
        elif kind == "yaml":
            own = (tmp_path / "slmops.yaml").read_text()
            head, _, tail = own.partition("teacher:\n")
            other = head + text + tail[tail.index("evaluate:") :]
            (tmp_path / "other.yaml").write_text(other)
            shell("slmops plan -f other.yaml", tmp_path)
        elif kind == "sh":
            shell(text, tmp_path)
    assert (tmp_path / "outputs" / "own-task" / "report.html").exists()


def test_the_guide_to_the_catalogue_runs(tmp_path: Path) -> None:
    texts = [text for kind, text in blocks(ROOT / "docs" / "guides" / "catalog.md") if kind == "sh"]
    listed, fitting, needed, trained = (shell(text, tmp_path) for text in texts)
    assert "596,049,920" in listed and fitting.startswith("model") and "llama_cpp" in needed
    assert "on_policy" in trained and "llama_cpp" not in trained


def test_the_guide_to_methods_plans(tmp_path: Path) -> None:
    """Each block, laid over a small project, is accepted and planned with the method that it names."""
    from ruamel.yaml import YAML

    from slmops.flow.planner import plan
    from slmops.flow.project import load

    found = [text for kind, text in blocks(ROOT / "docs" / "guides" / "how-a-model-learns.md") if kind == "yaml"]
    yaml = YAML()
    for number, text in enumerate(found):
        spec, own = yaml.load(SPEC), yaml.load(text)
        file = tmp_path / f"{number}.yaml"
        with file.open("w") as out:
            yaml.dump({**spec, **own}, out)
        steps = {step.id: step for step in plan(load(file, []).spec)}
        method = own["train"]["method"]
        assert steps["student"].method == ("train.sft" if method == "sequence" else f"train.{method}")
        assert steps["student"].params["training"]["tuning"] == own["train"].get("tuning", "full")
        assert ("teacher-2" in steps) == ("others" in own.get("teacher", {}))
    assert len(found) == 4


def test_the_guide_to_smaller_models_plans(tmp_path: Path) -> None:
    from ruamel.yaml import YAML

    from slmops.flow.planner import plan
    from slmops.flow.project import load

    yaml, plans = YAML(), []
    for kind, text in blocks(ROOT / "docs" / "guides" / "smaller-models.md"):
        if kind == "yaml":
            with (tmp_path / "slmops.yaml").open("w") as out:
                yaml.dump({**yaml.load(SPEC), **yaml.load(text)}, out)
            plans.append({step.id: step for step in plan(load(tmp_path / "slmops.yaml", []).spec)})
    steps, pruned, ternary = plans
    assert pruned["student-recovered"].inputs["base"] == "student-narrowed"
    assert pruned["student-int4"].inputs["model"] == pruned["student-fp32"].inputs["model"] == "student-recovered"
    assert ternary["student-int4"].params["rounding"] == "ternary" and "student-gguf-tq1_0" in ternary
    assert steps["student-int4"].inputs["model"] == "student-rounded"
    assert steps["student-rounded"].inputs["model"] == steps["nearest-int4"].inputs["model"] == "student-trimmed"
    assert steps["student-fp32"].inputs["model"] == "student-trimmed"
    assert steps["whole-int4"].inputs["model"] == "student"
    assert steps["student-gguf-q4_0"].inputs["model"] == "student-rounded"
    assert (
        steps["student-gguf-q8_0"].inputs["model"]
        == steps["student-safetensors-bf16"].inputs["model"]
        == "student-trimmed"
    )
    for form in ("mlx-int4", "openvino-int4"):
        step = steps[f"student-{form}"]
        assert step.inputs["model"] == "student-rounded" and step.params["rounding"] == "search"
        assert step.params["embedding_precision"] == "int8" and step.params["block_size"] == 32
        assert steps[f"predict-student-{form}"].params["runtime"] == form.partition("-")[0]
    step = steps["student-litert-int4"]
    assert step.inputs["model"] == "student-rounded" and step.params["embedding_precision"] == "int8"
    assert "model.student-mlx-int4" in steps["measure"].inputs
    assert "model.student-safetensors-bf16" not in steps["measure"].inputs
    assert steps["student-int4"].params["embedding_precision"] == "int8"
    assert steps["student-int4"].params["rounding"] == steps["nearest-int4"].params["rounding"] == "search"


def test_the_guide_to_olive_plans(tmp_path: Path) -> None:
    from ruamel.yaml import YAML

    from slmops.convert import olive
    from slmops.flow.project import load
    from slmops.flow.state import State

    found = blocks(ROOT / "docs" / "guides" / "olive.md")
    kinds = [kind for kind, _text in found]
    assert kinds == ["json", "yaml", "yaml", "sh"]
    (tmp_path / "olive").mkdir()
    (tmp_path / "olive" / "gptq.json").write_text(found[0][1])
    earlier = tmp_path / "olive-output" / "model"
    earlier.mkdir(parents=True)
    (earlier / "genai_config.json").write_text("{}")
    yaml = YAML()
    for name, text in (("gptq", found[1][1]), ("earlier", found[2][1])):
        with (tmp_path / "slmops.yaml").open("w") as out:
            yaml.dump({**yaml.load(SPEC), **yaml.load(text)}, out)
        project = load(tmp_path / "slmops.yaml", [])
        step = {step.id: step for step in project.plan()}[f"student-olive-{name}"]
        assert State(project).source_digests(step)  # its check finds nothing wrong
    assert olive.rounds(olive.read(tmp_path / "olive" / "gptq.json"))
    assert "no environments" in shell("export SLMOPS_ENVIRONMENTS=$PWD/none; " + found[3][1], tmp_path)


@pytest.mark.slow
def test_the_guide_to_preferences_runs(tmp_path: Path) -> None:
    for kind, text in blocks(ROOT / "docs" / "guides" / "preference.md"):
        if kind == "python":
            subprocess.run([sys.executable, "-c", text], cwd=tmp_path, check=True, timeout=60)
        elif kind == "yaml":
            (tmp_path / "slmops.yaml").write_text(text)
        elif kind == "sh":
            shell(text, tmp_path)
    trained = [json.loads(file.read_text()) for file in (tmp_path / ".slmops").rglob("training.json")]
    looks = {t["method"]: [p for p in t["points"] if p["validation_loss"] is not None] for t in trained}
    assert set(looks) == {"train.sft", "train.dpo", "train.orpo"}
    for method in ("train.dpo", "train.orpo"):
        assert looks[method][-1]["reward_accuracy"] >= 0.9
        assert looks[method][-1]["reward_margin"] > looks[method][0]["reward_margin"]
    report = json.loads((tmp_path / "outputs" / "preferences" / "report.json").read_text())
    assert report["n_test"] > 20


@pytest.mark.slow
def test_the_search_guide_runs(tmp_path: Path) -> None:
    """On the project of the first guide; a yaml block adds to the file or, where it is indented, replaces a line of it."""
    first = blocks(ROOT / "docs" / "guides" / "your-own-task.md")
    subprocess.run([sys.executable, "-c", first[0][1]], cwd=tmp_path, check=True, timeout=60)
    file = tmp_path / "slmops.yaml"
    file.write_text(first[1][1])
    for kind, text in blocks(ROOT / "docs" / "guides" / "search.md"):
        if kind == "yaml" and not text.startswith(" "):
            file.write_text(file.read_text() + text)
        elif kind == "yaml":
            key = text.partition(":")[0]
            file.write_text(re.sub(rf"^{key}:.*\n", lambda _match, new=text: new, file.read_text(), flags=re.M))  # type: ignore[misc]
            assert text in file.read_text()
            shell("slmops plan", tmp_path)
        elif kind == "sh":
            assert "slmops run --set " in shell(text, tmp_path)
    assert (tmp_path / "outputs" / "own-task" / "search.html").exists()


@pytest.mark.slow
def test_the_fit_guide_runs(tmp_path: Path) -> None:
    """On the project of the first guide, with the section that the guide adds to its file."""
    first = blocks(ROOT / "docs" / "guides" / "your-own-task.md")
    subprocess.run([sys.executable, "-c", first[0][1]], cwd=tmp_path, check=True, timeout=60)
    found = blocks(ROOT / "docs" / "guides" / "fit.md")
    (added,) = [text for kind, text in found if kind == "yaml"]
    (tmp_path / "slmops.yaml").write_text(first[1][1] + added)
    commands = [text for kind, text in found if kind == "sh"]
    for text in commands:
        assert "slmops run --set " in shell(text, tmp_path)
    assert len(commands) == 2 and (tmp_path / "outputs" / "own-task" / "fit.html").exists()


@pytest.mark.slow
def test_the_guide_to_pull_runs(tmp_path: Path) -> None:
    """From a stand-in of the hub, which has each of its models under another name."""
    pytest.importorskip("huggingface_hub", reason="needs the extra `hub`")
    from tests.catalog.models import LARGE
    from tests.hub_stand_in import Hub

    gguf = b"GGUF" + (3).to_bytes(4, "little") + bytes(64)
    models = {"Qwen/Qwen3-0.6B-GGUF": {"a-Q4_K_M.gguf": gguf, "a-Q8_0.gguf": gguf + b"8"}, "Qwen/Qwen3-0.6B": LARGE}
    ran = 0
    for kind, text in blocks(ROOT / "docs" / "guides" / "pull.md"):
        name = next(name for name in models if name in text)
        with Hub(models[name], "models").serve() as url:
            local = text.replace(name, "acme/desk").replace(" --to", " --no-check --to")
            shell(f"export HF_ENDPOINT={url} SLMOPS_MODELS=$PWD/cache\n{local}", tmp_path)
        ran += kind == "sh"
    assert ran == 2 and (tmp_path / "base" / "config.json").is_file()
    assert [path.name for path in (tmp_path / "gguf").glob("*.gguf")] == ["a-Q8_0.gguf"]


@pytest.mark.slow
def test_the_readme_runs(tmp_path: Path) -> None:
    """Every `sh` block of the README, in order, in one folder. `make test` itself is the one that runs this."""
    demo = tmp_path / "demo"
    ran = []
    for kind, text in blocks(ROOT / "README.md"):
        if kind != "sh" or text.strip() in ("make test",):
            continue
        if text.strip() == "make demo":
            shell(f"make -C {ROOT} demo DEMO={demo}", tmp_path)
        else:
            shell(text.replace("examples/", f"{ROOT}/examples/"), demo)
        ran.append(text.strip())
    assert "make demo" in ran
