"""Reading slmops.yaml: every problem at once, with line and hint."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from slmops.core.step import Step
from slmops.errors import SpecError, UsageError
from slmops.flow.checks import check
from slmops.flow.planner import plan
from slmops.flow.project import load

GOOD = """\
name: demo
task: {type: classification}
data:
  path: rows.csv
  columns: {prompt: text, answer: label}
teacher:
  model: {layers: 2, hidden: 64, heads: 2}
student:
  model: {layers: 1, hidden: 32, heads: 2}
train:
  learning_rate: 1e-3
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "slmops.yaml"
    path.write_text(text)
    return path


def problems(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(SpecError) as caught:
        load(write(tmp_path, text), overrides)
    return caught.value.message


def test_a_small_file_reads_and_plans(tmp_path: Path) -> None:
    project = load(write(tmp_path, GOOD))
    assert project.spec.train.learning_rate == 1e-3
    ids = [step.id for step in plan(project.spec)]
    assert ids[0] == "data" and ids[-1] == "bundle"
    assert {"teacher", "student", "few", "all", "student-int4", "measure", "report"} <= set(ids)
    seen: set[str] = set()
    for step in plan(project.spec):
        assert set(step.inputs.values()) <= seen
        seen.add(step.id)


@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        ("learning_rate", "learning_rat", 11, "did you mean learning_rate?"),
        ("layers: 2", "layers: two", 7, "must be a valid integer"),
        ("layers: 2", "layers: 0", 7, "must be greater than or equal to 1"),
        ("heads: 2}\nstudent", "heads: 3}\nstudent", 7, "must be a multiple of heads"),
        ("classification", "classify", 2, "did you mean classification?"),
        ("name: demo", "name: 'Has Space'", 1, "name"),
        ("learning_rate: 1e-3", "learning_rate: no", 11, "must be a valid number"),
        ("  path: rows.csv\n", "", 3, "data.path: is missing"),
        ("learning_rate: 1e-3", "learning_rate: 0", 11, "must be greater than 0"),
    ],
)
def test_each_mistake_has_its_line_and_hint(tmp_path: Path, old: str, new: str, line: int, says: str) -> None:
    message = problems(tmp_path, GOOD.replace(old, new, 1))
    assert f"slmops.yaml:{line}: " in message
    assert says in message


def test_all_mistakes_come_at_once(tmp_path: Path) -> None:
    text = GOOD.replace("type: classification", "type: x").replace("layers: 2", "layerz: 2") + "colour: red\n"
    message = problems(tmp_path, text)
    assert message.startswith("3 problems")


def test_two_teachers_are_refused(tmp_path: Path) -> None:
    message = problems(tmp_path, GOOD.replace("teacher:\n", "teacher:\n  base: some/folder\n"))
    assert "exactly one of model, base, endpoint" in message


def test_yaml_mistakes_name_the_line(tmp_path: Path) -> None:
    assert "slmops.yaml:3" in problems(tmp_path, "name: a\ntask: {type: [\n")
    assert "found duplicate key" in problems(tmp_path, "name: a\nname: b\n")
    assert "empty or not a mapping" in problems(tmp_path, "")


def test_yaml_1_2_words_stay_words(tmp_path: Path) -> None:
    project = load(
        write(tmp_path, GOOD.replace("columns: {prompt: text, answer: label}", "columns: {prompt: no, answer: yes}"))
    )
    assert project.spec.data.columns.prompt == "no"


def test_overrides_act_as_if_written(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    project = load(
        path, ["train.epochs=3", "evaluate.gates=[{metric: accuracy, at_least: 0.5}]", "task.out_of_scope=oos"]
    )
    assert project.spec.train.epochs == 3
    assert project.spec.evaluate.gates[0].at_least == 0.5
    assert project.spec.task.out_of_scope == "oos"
    with pytest.raises(UsageError, match="not key=value"):
        load(path, ["train.epochs"])
    assert "did you mean epochs?" in problems(tmp_path, GOOD, "train.epoch=3")


def test_a_path_given_on_the_command_line_is_relative_to_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, GOOD)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert (
        load(path, ["data.path=x.csv"]).resolve(load(path, ["data.path=x.csv"]).spec.data.path)
        == tmp_path / "elsewhere" / "x.csv"
    )
    assert load(path).resolve(load(path).spec.data.path) == tmp_path / "rows.csv"


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load(tmp_path / "nothing.yaml")
    assert "slmops init" in caught.value.hint


PAIRS = ["data={path: rows.jsonl, format: preference}", "teacher=null"]
BASED = ["student={base: some/folder}"]
TERNARY = ["train.quantization_aware=ternary", "student={model: {hidden: 256, heads: 4, ffn: 768}}"]


@pytest.mark.parametrize(
    ("overrides", "path"),
    [
        (["train.method=logits", "teacher={endpoint: {url: 'http://x', model: m}}"], "train.method"),
        (["teacher={endpoint: {url: 'http://x', model: m}}"], "student.tokenizer"),
        (["teacher=null", "evaluate.gates=[{metric: accuracy_retained, at_least: 0.9}]"], "evaluate.gates"),
        (["synthesize.generate={method: template}"], "synthesize.generate.templates"),
        (["synthesize.generate={method: sample}"], "teacher.train.prompt_weight"),
        (["data.teacher_share=0"], "data.teacher_share"),
        (["student={}"], "student"),
        (["evaluate.gates=[{metric: out_of_scope_recall, at_least: 0.9}]"], "task.out_of_scope"),
        (["train.quantization_aware=int4", "train.block_size=64"], "train.block_size"),
        (["train.quantization_aware=int4", "convert.precision=fp32"], "train.quantization_aware"),
        (["compress.quantization=gptq", "convert.precision=int8"], "compress.quantization"),
        (["compress.quantization=gptq", "train.quantization_aware=int4"], "compress.quantization"),
        (["convert.embedding_precision=int8", "convert.precision=fp32"], "convert.embedding_precision"),
        (["convert.embedding_precision=int8", "train.quantization_aware=int4"], "convert.embedding_precision"),
        (["convert.file_mb=0.001"], "convert.file_mb"),
        (["convert.file_mb=1.5", "convert.precision=int8"], "convert.file_mb"),
        (["convert.file_mb=1.5", "convert.embedding_precision=int8"], "convert.embedding_precision"),
        (["convert.file_mb=1.5", "train.quantization_aware=int4"], "train.quantization_aware"),
        (["compress.vocabulary_at_least=900"], "compress.vocabulary_at_least"),
        (["compress.prune={layers: 1}"], "compress.prune"),
        (["compress.prune={ffn: 0.9}"], "compress.prune"),
        (["compress.prune={heads: 0.2}"], "compress.prune"),
        (["compress.prune={sparsity: '2:4'}", "compress.quantization=gptq"], "compress.quantization"),
        (["compress.prune={ffn: 0.5, sparsity_method: wanda}"], "compress.prune.sparsity_method"),
        (["compress.prune={ffn: 0.5}", "train.quantization_aware=int4"], "train.quantization_aware"),
        ([*PAIRS, "compress.prune={ffn: 0.5, recover: {}}", "train.method=orpo"], "compress.prune.recover"),
        ([*BASED, "compress.prune={sparsity: 0.5, recover: {}}", "train.tuning=lora"], "train.tuning"),
        (["convert.also=[gguf-tq2_0]"], "convert.also"),
        (["student.model.ffn=512", "teacher.tokenizer.vocabulary=512"], "student.model"),
        (["convert.layer_precision=int2"], "convert.layer_precision"),
        ([*TERNARY, "student.model.hidden=192"], "student.model"),
        ([*TERNARY, "student.model.ffn=700"], "student.model"),
        ([*TERNARY, "convert.rounding=plain"], "convert.rounding"),
        ([*TERNARY, "convert={precision: int8, layer_precision: int2}"], "convert.layer_precision"),
        ([*TERNARY, "convert.precision=fp32"], "train.quantization_aware"),
        ([*TERNARY, "compress.quantization=gptq"], "compress.quantization"),
        ([*TERNARY, "train.method=dpo"], "train.preference.supervised.quantization_aware"),
        (["train.method=dpo", "data={path: rows.jsonl, format: alpaca}"], "data.format"),
        (["train.method=orpo"], "data.columns.rejected"),
        (["train.method=orpo"], "teacher"),
        (["train.method=dpo", "student={base: some/folder}"], "teacher"),
        (["train.method=dpo", "train.prompt_weight=0.1"], "train.prompt_weight"),
        (["train.method=orpo", "train.label_smoothing=0.1"], "train.label_smoothing"),
        (["train.method=dpo", "data.gold.total=0"], "data.gold"),
        (["train.method=dpo", "teacher=null", "data.gold.total=0"], "data.gold"),
        (["train.method=dpo", "train.preference.supervised.tuning=lora"], "train.preference.supervised.tuning"),
        (["train.method=orpo", "task.type=extraction", "data.augment={}"], "data.augment"),
    ],
)
def test_stages_that_do_not_fit_are_named(tmp_path: Path, overrides: list[str], path: str) -> None:
    found = check(load(write(tmp_path, GOOD), overrides).spec)
    assert path in [problem.path for problem in found]
    assert all(problem.hint for problem in found)


def test_rounding_and_widths_are_planned(tmp_path: Path) -> None:
    """Each step reads what the one before it made; without a new setting the steps are what they were."""

    def steps(*overrides: str) -> dict[str, Step]:
        project = load(write(tmp_path, GOOD), list(overrides))
        return {step.id: step for step in plan(project.spec)}

    texts = ["data/gold.jsonl", "synthetic/train.jsonl", "data/pool.jsonl"]
    learned = steps("compress.quantization=awq+autoround", "convert.file_mb=1.5", "convert.block_size=64")
    common = {"files": texts, "examples": 256, "block_size": 64}
    assert learned["student-widths"].params == common | {"file_mb": 1.5}
    assert learned["student-scaled"].params == common | {"round": False}
    assert learned["student-rounded"].method == "compress.autoround"
    assert learned["student-rounded"].params == common
    for id, model in (("widths", "student"), ("scaled", "student"), ("rounded", "student-scaled")):
        assert learned[f"student-{id}"].inputs["model"] == model
    for id in ("student-scaled", "student-rounded", "student-int4", "nearest-int4"):
        assert learned[id].inputs["widths"] == "student-widths"
    for id in ("student-int4", "nearest-int4"):
        assert learned[id].params["file_mb"] == 1.5
    assert learned["student-int4"].inputs["model"] == "student-rounded"
    assert learned["nearest-int4"].inputs["model"] == learned["student-fp32"].inputs["model"] == "student"
    assert "widths" not in learned["student-fp32"].inputs
    links = {link["name"]: link for link in learned["fidelity"].params["links"]}
    assert [links[f"student-{id}"]["expects"] for id in ("scaled", "rounded", "int4")] == [
        "exact",
        "rounded",
        "rounded",
    ]
    assert links["student-rounded"]["parent"] == "student-scaled"
    before = steps("compress.quantization=gptq", "convert.precision=int4")
    assert before["student-rounded"].params == common | {"block_size": 32}
    assert "file_mb" not in before["student-int4"].params and "student-widths" not in before


def test_a_ternary_student_is_planned(tmp_path: Path) -> None:
    """What it is converted by, in both runtimes; a base is looked at as it comes. Other students' steps stay as they are."""

    def steps(*overrides: str) -> dict[str, Step]:
        return {step.id: step for step in plan(load(write(tmp_path, GOOD), overrides).spec)}

    found = steps(
        *TERNARY, "convert={also: [gguf-tq1_0, gguf-tq2_0], layer_precision: int2, embedding_precision: int8}"
    )
    assert found["student"].params["training"]["quantization_aware"] == "ternary"
    shipped = found["student-int4"].params
    assert (shipped["rounding"], shipped["layer_precision"], shipped["embedding_precision"]) == (
        "ternary",
        "int2",
        "int8",
    )
    assert found["student-gguf-tq1_0"].params["precision"] == "tq1_0"
    assert found["teacher-fp32"].params["rounding"] == "search"
    base = ["student={base: some/folder}", "train.quantization_aware=ternary"]
    assert steps(*base)["student-base"].params["ternary"] is True
    plain = steps("student={base: some/folder}")
    assert "ternary" not in plain["student-base"].params and "layer_precision" not in plain["student-int4"].params
    narrow = check(load(write(tmp_path, GOOD), [*TERNARY, "student.model.ffn=null"]).spec)
    assert [(problem.path, problem.hint) for problem in narrow] == [("student.model", "these fit: ffn 512 or 768")]


PAIRS = ["data={path: rows.jsonl, format: preference}", "teacher=null"]


def test_preference_methods_are_planned(tmp_path: Path) -> None:
    """DPO from random weights first learns the chosen answers; a base is its own reference; ORPO starts at once."""

    def steps(*overrides: str) -> dict[str, Step]:
        project = load(write(tmp_path, GOOD), [*PAIRS, *overrides])
        return {step.id: step for step in plan(project.spec)}

    scratch = steps("train.method=dpo", "train.preference.supervised.epochs=7")
    assert scratch["student-sft"].method == "train.sft"
    assert scratch["student-sft"].params["training"]["epochs"] == 7
    assert scratch["student-sft"].params["training"]["learning_rate"] == 2e-3  # GOOD sets 1e-3 for the method itself
    assert scratch["student"].method == "train.dpo"
    assert scratch["student"].inputs == {"data": "data", "base": "student-sft"}
    assert scratch["student"].params["architecture"] is None
    based = steps("train.method=dpo", "student={base: some/folder}", "train.tuning=lora")
    assert "student-sft" not in based
    assert based["student"].inputs == {"data": "data", "base": "student-base"}
    odds = steps("train.method=orpo")
    assert "student-sft" not in odds
    assert odds["student"].method == "train.orpo"
    assert odds["student"].params["architecture"]["layers"] == 1
    assert odds["student"].inputs == {"data": "data", "tokenizer": "student-tokenizer"}
    for found in (scratch, based, odds):
        assert not {"few", "all", "answers", "teacher"} & set(found)
        assert found["student"].params["files"] == ["data/gold.jsonl"]


COUNTED = ["data={path: rows.jsonl, gold: {total: 20}, teacher_share: 0.5}"]


@pytest.mark.parametrize(
    ("overrides", "trained", "split"),
    [
        (["teacher=null"], "student", True),
        (["teacher=null", "data.gold={total: 20}"], "student", True),
        (["teacher=null", *BASED, "train.tuning=lora"], "student", True),
        ([*PAIRS, "train.method=dpo"], "student student-sft", True),
        ([*PAIRS, *BASED, "train.method=dpo"], "student", True),
        ([*PAIRS, "train.method=orpo"], "student", True),
        *[([f"train.method={name}"], "student few all", True)
          for name in ("sequence", "logits", "hidden_states", "on_policy")],
        (["train.method=cross_tokenizer", "student.tokenizer={vocabulary: 400}"], "student few all", True),
        *[([*COUNTED, f"train.method={name}"], "student few all", False) for name in ("sequence", "logits")],
    ],
    ids=str,
)  # fmt: skip
def test_trainings_look_at_the_validation_split(
    tmp_path: Path, overrides: list[str], trained: str, split: bool
) -> None:
    """All but those of a student beside a teacher whose gold labels are counted: more labels are not for it."""
    steps = [s for s in plan(load(write(tmp_path, GOOD), overrides).spec) if "validation" in s.params]
    looked = {step.id: step.params["validation"] for step in steps}
    assert set(looked) - {"teacher"} == set(trained.split())
    for id, file in looked.items():
        assert file == ("data/validation.jsonl" if split or id == "teacher" else None), id


def test_pruning_and_recovery_are_planned_between_training_and_all_else(tmp_path: Path) -> None:
    def steps(*overrides: str) -> dict[str, Step]:
        return {step.id: step for step in plan(load(write(tmp_path, GOOD), list(overrides)).spec)}

    prune = "compress.prune={layers: 2, ffn: 0.25, heads: 0.5, sparsity: 2:4, recover: {epochs: 2}}"
    shape = ["train.max_steps=9", "student.model.layers=4", "student.model.heads=2", "student.model.ffn=128"]
    for method, given in (("sequence", {}), ("logits", {"logits": "logits"})):
        found = steps(*shape, prune, "compress.vocabulary=seen", f"train.method={method}")
        chain = ["student", "student-shortened", "student-narrowed", "student-sparse"]
        for before, after in itertools.pairwise(chain):
            assert found[after].inputs["model"] == before
            assert found[after].params["files"] == found["student-trimmed"].params["files"]
        student, again = found["student"], found["student-recovered"]
        assert (again.method, again.params["keep_zeros"], again.params["architecture"]) == (student.method, True, None)
        assert again.params["training"] == {**student.params["training"], "epochs": 2.0, "max_steps": None}
        own = {"data": "data", "synthetic": "synthetic"} | given
        assert again.inputs == {**own, "base": "student-sparse"} and own.items() <= student.inputs.items()
        assert found["student-trimmed"].inputs["model"] == found["whole-int4"].inputs["model"] == "student-recovered"
        assert found["unpruned-int4"].inputs["model"] == "student"
        assert found["report"].inputs["training.student-recovered"] == "student-recovered"
    wanda = steps(*shape, "compress.prune={sparsity: 0.5, sparsity_method: wanda}")
    assert wanda["student-sparse"].method == "compress.wanda"
    assert wanda["student-int4"].inputs["model"] == "student-sparse" and "student-recovered" not in wanda
    based = steps(*BASED, "compress.prune={ffn: 0.5, recover: {}}", "train.tuning=lora")
    assert based["student-base"].params["prune"] == {"layers": 0, "ffn": 0.5, "heads": 0.0, "sparsity": None}
    assert based["student-recovered"].inputs["base"] == "student-narrowed"
    assert "keep_zeros" not in based["student-recovered"].params
    for id, step in steps(*BASED, "train.tuning=lora").items():
        if id != "student-base" and id in based and id not in ("measure", "fidelity", "report"):
            assert (step.params, step.method) == (based[id].params, based[id].method), id


def test_shards_are_steps_that_wait_for_each_other_nowhere(tmp_path: Path) -> None:
    steps = {step.id: step for step in plan(load(write(tmp_path, GOOD), ["synthesize.shards=3"]).spec)}
    parts = [steps[f"answers-{n}"] for n in (1, 2, 3)]
    assert "answers" not in steps
    assert [(part.params["part"], part.params["parts"]) for part in parts] == [(0, 3), (1, 3), (2, 3)]
    assert all(set(part.inputs.values()) == {"data", "teacher"} for part in parts)
    assert {k: v for k, v in steps["synthetic"].inputs.items() if k != "data"} == {
        f"answers.{n}": f"answers-{n}" for n in (1, 2, 3)
    }
    wanted = ["synthesize.shards=2", "synthesize.generate={method: paraphrase, count: 9}"]
    more = {step.id: step for step in plan(load(write(tmp_path, GOOD), wanted).spec)}
    assert [more[f"prompts-{n}"].params["part"] for n in (1, 2)] == [0, 1]
    assert more["prompts"].inputs == {"data": "data", "prompts.1": "prompts-1", "prompts.2": "prompts-2"}
    assert more["answers-2"].inputs["prompts"] == "prompts"
    template = ["synthesize.shards=2", "synthesize.generate={method: template, count: 9, templates: [a]}"]
    assert "prompts-1" not in {step.id for step in plan(load(write(tmp_path, GOOD), template).spec)}
    remote = ["synthesize.shards=3", "teacher={endpoint: {url: 'http://127.0.0.1:9/v1', model: m}}"]
    (problem,) = check(
        load(write(tmp_path, GOOD), [*remote, "train.method=sequence", "student.tokenizer={vocabulary: 400}"]).spec
    )
    assert problem.path == "synthesize.shards" and "local teacher" in problem.message


def test_a_teacher_s_answers_go_into_the_supervised_step_alone(tmp_path: Path) -> None:
    overrides = ["data={path: rows.jsonl, format: preference, teacher_share: 0.5}", "train.method=dpo"]
    steps = {step.id: step for step in plan(load(write(tmp_path, GOOD), overrides).spec)}
    assert steps["student-sft"].params["files"] == ["data/gold.jsonl", "synthetic/train.jsonl"]
    assert steps["student"].params["files"] == ["data/gold.jsonl"]
    for name in ("few", "all"):
        assert steps[name].params["architecture"] == steps["student-sft"].params["architecture"]
        assert steps[name].params["training"] == steps["student-sft"].params["training"]


def test_a_beta_that_teaches_nothing_is_refused(tmp_path: Path) -> None:
    for value in ("0", "-0.1"):
        message = problems(tmp_path, GOOD, "train.method=dpo", f"train.preference.beta={value}")
        assert "train.preference.beta" in message and "greater than 0" in message
    assert "less than 0.5" in problems(tmp_path, GOOD, "train.preference.label_smoothing=0.5")
