"""Several tasks over one base: what is planned, what is refused, and one small project run to its end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from slmops.core.example import Example, Message
from slmops.errors import SpecError
from slmops.flow import methods
from slmops.flow.project import load
from tests import tiny
from tests.train import bases

SPEC = """\
name: desk
task: {type: classification}
data: {path: rows.jsonl, splits: {validation: 0.15, test: 0.2}}
student: {base: base}
train: {tuning: lora, epochs: 10, batch_size: 32, learning_rate: 1e-2, lora: {rank: 16}}
adapters:
  topic:
    data: {path: rows.jsonl, splits: {validation: 0.15, test: 0.2}}
  first_word:
    data: {path: words.jsonl, splits: {validation: 0.15, test: 0.2}}
    task: {type: generation}
    train: {tuning: rslora, epochs: 10, batch_size: 32, learning_rate: 3e-3, lora: {rank: 8, targets: [q_proj, v_proj, o_proj, down_proj]}}
convert: {precision: fp32, fidelity_prompts: 4}
evaluate: {max_new_tokens: 8, max_examples: 40, resamples: 200, measure: {prompts: 4, rounds: 1}}
"""


def write(folder: Path, text: str = SPEC) -> Path:
    (folder / "slmops.yaml").write_text(text)
    return folder


def test_the_plan(tmp_path: Path) -> None:
    steps = {step.id: step for step in load(write(tmp_path)).plan()}
    seen: set[str] = set()
    for step in steps.values():
        assert set(step.inputs.values()) <= seen
        seen.add(step.id)
    assert steps["data-first_word"].sources == {"source": "words.jsonl"}
    assert steps["data-first_word"].params["task"]["type"] == "generation"
    assert steps["data-topic"].params["task"]["type"] == "classification"
    assert steps["adapter-first_word"].inputs == {"data": "data-first_word", "base": "student-base"}
    assert steps["adapter-first_word"].params["training"]["tuning"] == "rslora"
    assert steps["adapter-topic"].params["training"]["lora"]["rank"] == 16
    assert steps["adapter-topic"].params["validation"] == "data/validation.jsonl"
    assert steps["student-adapters"].inputs == {
        "base": "student-base",
        "adapter.topic": "adapter-topic",
        "adapter.first_word": "adapter-first_word",
        "data.topic": "data-topic",
        "data.first_word": "data-first_word",
    }
    assert steps["predict-adapter-topic"].params["adapter"] == "topic"
    assert not {"also", "importance", "format"} & set(steps["student-adapters"].params)
    for step in steps.values():
        methods.get(step.method).Params.model_validate(step.params, strict=False)
    also = {step.id: step for step in load(write(tmp_path), ["convert.also=[gguf-fp16]"]).plan()}
    assert also["student-adapters-gguf-fp16"].inputs == steps["student-adapters"].inputs
    assert also["student-adapters-gguf-fp16"].params["base"] == "fp16"
    assert also["predict-adapter-topic-gguf-fp16"].method == "evaluate.predict"
    assert also["adapters-gguf-fp16"].inputs["predictions.topic"] == "predict-adapter-topic-gguf-fp16"
    for step in also.values():
        methods.get(step.method).Params.model_validate(step.params, strict=False)
    alone = load(write(tmp_path, SPEC[: SPEC.index("adapters:")] + SPEC[SPEC.index("convert:") :])).plan()
    assert not [step.id for step in alone if "adapter" in step.id]


@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        ("student: {base: base}", "student: {model: {layers: 1}}", 6, "give student.base"),
        ("train: {tuning: lora,", "train: {tuning: full,", 5, "adapter topic has to be low-rank"),
        ("train: {tuning: rslora,", "train: {tuning: dora,", 12, "give adapters.first_word.train.tuning: lora, rslora or"),
        ("train: {tuning: rslora,", "train: {tuning: rslora, method: dpo,", 12, "adapters.first_word.train.method: is dpo"),
        ("train: {tuning: rslora,", "train: {tuning: lora, quantization_aware: int4,", 12, "is not rounded"),
        ("lora: {rank: 8, targets", "lora: {rank: 8, embeddings: true, targets", 12, "shares the embedding of the base"),
        ("    data: {path: words.jsonl", "    data: {path: .", 10, "names no data"),
        ("    data: {path: words.jsonl", "    data: {augment: {}, path: words.jsonl", 10, "only extraction has"),
        ("    data: {path: words.jsonl", "    data: {pat: words.jsonl", 10, "did you mean path?"),
        ("  topic:", "  Topic 1:", 7, "adapters.Topic 1"),
        ("  first_word:\n", "  first_word:\n    tsk: {}\n", 10, "did you mean task?"),
    ],
)  # fmt: skip
def test_what_does_not_fit(tmp_path: Path, old: str, new: str, line: int, says: str) -> None:
    assert old in SPEC
    with pytest.raises(SpecError) as caught:
        load(write(tmp_path, SPEC.replace(old, new, 1))).plan()
    assert f"slmops.yaml:{line}: " in caught.value.message
    assert says in caught.value.message


def test_a_path_on_the_command_line_is_where_the_user_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    spec = load(write(tmp_path), ("adapters.topic.data.path=mine.jsonl",)).spec
    assert spec.adapters["topic"].data.path == str(tmp_path / "here" / "mine.jsonl")


@pytest.mark.slow
def test_the_guide_runs(tmp_path: Path) -> None:
    """The blocks of docs/guides/adapters.md: a project of two adapters is run, switched, merged and written as GGUF."""
    from slmops.core.method import Context
    from slmops.train import tokenizer
    from tests.test_docs import ROOT, blocks, shell
    from tests.train.conftest import write_rows

    found = blocks(ROOT / "docs" / "guides" / "adapters.md")
    tiny.write_project(tmp_path, next(text for kind, text in found if kind == "yaml"))
    rows, known = tiny.rows(), []
    for row in rows:
        user, answer = row["messages"]  # type: ignore[misc]
        known += [
            Example((Message("user", user["content"]),), text, "gold") for text in (answer["content"], "i please")
        ]
        answer["content"] = user["content"].split()[0]
    (tmp_path / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = tmp_path / "tokenizer"
    write_rows(made / "teacher.jsonl", known)
    tokenizer.run(tokenizer.Params(vocabulary=400), {"data": made}, made, Context(0, made, made))
    bases.save("qwen3", made, tmp_path / "base")
    for kind, text in found:
        if kind == "sh":
            shell(text, tmp_path)
        elif kind == "python":
            subprocess.run([sys.executable, "-c", text], cwd=tmp_path, check=True, timeout=120)
    outputs = tmp_path / "outputs" / "desk"
    agreed = json.loads((outputs / "adapters-gguf-fp16" / "fidelity.json").read_text())
    assert list(agreed) == ["(none)", "first_word", "topic"]
    assert all(found["token_agreement"] > 0.98 for found in agreed.values())
    other = json.loads((outputs / "adapters-gguf-fp16.json").read_text())
    scores = json.loads((outputs / "adapters.json").read_text())
    assert other["topic"]["accuracy"]["value"] == pytest.approx(scores["topic"]["accuracy"]["value"], abs=0.06)
    assert list(scores["topic"]) == ["accuracy", "macro_f1"]
    assert scores["topic"]["accuracy"]["low"] > 0.25, scores  # better than guessing one of four labels
    assert scores["first_word"]["exact_match"]["low"] > 0.25, scores
    shell("slmops run adapters --json > again.json", tmp_path)
    assert json.loads((tmp_path / "again.json").read_text())["ran"] == []
