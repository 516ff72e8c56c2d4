"""The example projects are valid, and the SNIPS converter keeps what the rows say."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
from ruamel.yaml import YAML

from slmops.core.example import Example
from slmops.core.spec import Architecture, Spec
from slmops.flow.planner import plan

EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = sorted(EXAMPLES.glob("*/*.yaml"))
DISTILLED = [path for path in FILES if path.parent.name in ("banking77", "clinc150", "snips")]


def read(path: Path) -> Spec:
    return Spec.model_validate_json(json.dumps(YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))))


def test_all_presets_are_there():
    names = [f"{path.parent.name}/{path.name}" for path in FILES]
    assert names == [
        "banking77/slmops.yaml", "clinc150/all-gold.yaml", "clinc150/data-free.yaml", "clinc150/slmops.yaml",
        "snips/slmops.yaml", "tunings/banking77.yaml", "tunings/clinc150.yaml", "wordnet/slmops.yaml",
    ]  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_a_project_can_be_planned(path: Path):
    spec = read(path)
    assert plan(spec)
    assert spec.licence, "the bundle has to say the licence of what it learned from"


@pytest.mark.parametrize("path", DISTILLED, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_a_preset_is_valid_and_its_parts_fit_each_other(path: Path):
    spec = read(path)
    assert spec.teacher and spec.teacher.model and spec.student.model
    assert spec.train.block_size == spec.convert.block_size
    for model in (spec.teacher.model, spec.student.model):
        assert model.hidden % spec.convert.block_size == 0
        assert (model.ffn or 0) % spec.convert.block_size == 0
    if spec.synthesize.generate and spec.synthesize.generate.method == "sample":
        assert spec.teacher.train.prompt_weight > 0, "a teacher that did not learn messages cannot write them"
    assert spec.student.tokenizer == "teacher", "its distributions are over its own vocabulary"


@pytest.mark.parametrize(
    "path", [p for p in DISTILLED if p.parent.name != "snips"], ids=lambda p: f"{p.parent.name}-{p.stem}"
)
def test_the_student_has_less_than_a_twentieth_of_the_weights(path: Path):
    spec = read(path)
    assert spec.teacher and spec.teacher.model and spec.student.model
    vocabulary = spec.teacher.tokenizer.vocabulary
    assert weights(spec.student.model, vocabulary) < 0.05 * weights(spec.teacher.model, vocabulary)


def weights(model: Architecture, vocabulary: int) -> int:
    """Those of a Llama without grouped keys, tied embeddings."""
    layer = 4 * model.hidden**2 + 3 * model.hidden * (model.ffn or 0)
    return vocabulary * model.hidden + model.layers * layer


def test_clinc_presets_differ_in_what_the_student_gets_and_share_teacher_size_and_data():
    specs = {path.stem: read(path) for path in FILES if path.parent.name == "clinc150"}
    head, gold, free = specs["slmops"], specs["all-gold"], specs["data-free"]
    assert head.data.gold.per_label == 10 and head.data.teacher_share == 0.5 and head.synthesize.label_pool
    assert gold.data.gold.per_label is gold.data.gold.total is None and not gold.synthesize.label_pool
    assert free.data.gold.total == 0 and free.synthesize.generate and not free.synthesize.label_pool
    assert len({s.data.splits.model_dump_json() for s in specs.values()}) == 1
    assert len({s.teacher.model.model_dump_json() for s in specs.values() if s.teacher and s.teacher.model}) == 1
    assert all(s.task.out_of_scope == "oos" for s in specs.values())


@pytest.mark.parametrize("name", ["clinc150", "banking77", "snips"])
def test_the_readme_names_licence_and_source_and_no_data_is_there(name: str):
    text = (EXAMPLES / name / "README.md").read_text(encoding="utf-8")
    assert "Licence:" in text and "https://github.com/" in text and "data.path" in text
    assert not [p.name for p in (EXAMPLES / name).glob("*") if p.suffix in (".csv", ".json", ".jsonl", ".parquet")]


def converter(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"convert_{name}", EXAMPLES / name / "convert.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def snips() -> ModuleType:
    return converter("snips")


def test_snips_slots_become_arguments_and_repeated_ones_a_list_in_order(snips: ModuleType):
    row = {
        "text": "a, b and c at Café",
        "intent": "Find",
        "slots": [["x", "a"], ["x", "b"], ["place", "Café"], ["x", "c"]],
    }
    example = Example.from_json(snips.convert(row))
    assert example.text == row["text"]
    assert example.answer == '{"name":"Find","arguments":{"x":["a","b","c"],"place":"Café"}}'


def test_snips_converts_both_files(snips: ModuleType, tmp_path: Path):
    row = json.dumps({"text": "weather?", "intent": "GetWeather", "slots": []})
    for name in ("train", "validate"):
        (tmp_path / f"{name}.jsonl").write_text(row + "\n\n" + row + "\n")
    snips.main(tmp_path, tmp_path / "out")
    for name in ("train", "test"):
        rows = (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()
        assert len(rows) == 2
        assert json.loads(rows[0])["messages"][1]["content"] == '{"name":"GetWeather","arguments":{}}'


def test_a_wordnet_set_becomes_definition_word_and_example(tmp_path: Path):
    """A set of two words, one with a mark of its syntax, in the layout of wndb(5WN); the licence's lines are left out."""
    licence = "  1 This software and database is provided\n"
    lines = '00001740 00 a 02 able(p) 0 fit_for 0 001 ! 00002098 a 0101 | having the means; "able to swim all day"; "able men"\n'
    for name in ("noun", "verb", "adj", "adv"):
        (tmp_path / f"data.{name}").write_text(licence + (lines if name == "adj" else ""))
    converter("wordnet").main(tmp_path, tmp_path / "out")
    rows = [json.loads(line)["messages"] for line in (tmp_path / "out" / "wordnet.jsonl").read_text().splitlines()]
    assert [[turn["content"] for turn in row] for row in rows] == [
        ["which words mean: having the means", "able, fit for"],
        ["what does able mean", "having the means"],
        ["able to swim all day", "able, fit for"],
    ]
