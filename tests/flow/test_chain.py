"""The whole real chain on a tiny project: run once, and then everything that a user does with a finished project.

Each command runs in a process of its own, as users run it. The variants below share the folder, and so the store, of
the finished project: what they have in common with it is reused.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from safetensors.torch import load_file

from slmops.bundle.manifest import verify
from slmops.cli.run import CODES
from slmops.core.report import Report
from slmops.engines.stand_in import StandIn
from tests import tiny

pytestmark = pytest.mark.slow

STEPS = 24
INT4 = ("student-int4", "few-int4", "all-int4")


@dataclass(frozen=True)
class Done:
    """How one command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def ran(self) -> set[str]:
        """The steps that `run --json` says it ran."""
        assert self.out, self.err
        return set(self.json["ran"])


def slmops(*words: str, file: Path, codes: tuple[int, ...] = (0,)) -> Done:
    """Run a command on a project file (or folder) in a process of its own."""
    command = [sys.executable, "-c", "import sys; from slmops.cli.main import main; sys.exit(main(sys.argv[1:]))"]
    done = subprocess.run([*command, *words, "-f", str(file)], capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode in codes, done.stderr[-3000:] + done.stdout[-1000:]
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    return Done(done.returncode, done.stdout, done.stderr)


@dataclass(frozen=True)
class Finished:
    """The finished project and how its run ended."""

    folder: Path
    run: Done

    @property
    def outputs(self) -> Path:
        return self.folder / "outputs" / "tiny"

    def model(self, step: str) -> Path:
        """A step's output in the store."""
        digest: str = self.run.json["outputs"][step]
        return self.folder / ".slmops" / "store" / "trees" / digest.removeprefix("sha256:")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tiny.write_project(tmp_path_factory.mktemp("chain") / "project")
    return Finished(folder, slmops("run", "--json", file=folder, codes=(0, 3, 4)))


@pytest.fixture
def copy(finished: Finished, tmp_path: Path) -> Path:
    """A copy of the finished project that a test may change."""
    folder = tmp_path / "project"
    shutil.copytree(finished.folder, folder)
    return folder


def read_report(folder: Path, name: str = "tiny") -> Report:
    return Report.model_validate_json((folder / "outputs" / name / "report.json").read_text())


# ------------------------------------------------------------------------------------------------ the run and its result


def test_the_run_ends_with_the_code_of_its_verdict(finished: Finished) -> None:
    report = read_report(finished.folder)
    assert finished.run.code == CODES[report.verdict]
    assert finished.run.json["verdict"] == report.verdict
    assert len(finished.run.ran) == STEPS == len(finished.run.json["outputs"])
    assert f"{STEPS} steps run, 0 cached" in finished.run.err
    assert "%|" not in finished.run.err, "libraries draw no bars of their own"
    assert finished.run.json["headline"] == report.headline.model_dump(mode="json")
    for path in finished.run.json["files"].values():
        assert Path(path).exists()


def test_the_report_holds_what_it_promises(finished: Finished) -> None:
    report = read_report(finished.folder)
    names = [variant.name for variant in report.variants]
    assert names == ["teacher-torch", "teacher-fp32", "student-fp32", "student-int4", "few-int4", "all-int4"]
    assert [c.name for c in report.comparisons] == ["distilling", "quantising", "both", "as_shipped"]
    assert report.subject.variant == "student-int4"
    for variant in report.variants:
        assert variant.scores["accuracy"].n == report.n_test > 20
        assert (variant.latency is None) == (variant.role == "baseline")
    assert report.variants[0].scores["accuracy"].value > 0.8, "the tiny task is learnt"
    assert report.no_teacher_baseline.few is not None and report.no_teacher_baseline.few.gold_labels == 20
    assert report.no_teacher_baseline.all is not None
    assert report.synthesis is not None and report.synthesis.kept
    assert report.self_check is not None
    assert {training.name for training in report.training} == {"teacher", "student", "few", "all"}
    page = (finished.outputs / "report.html").read_text()
    assert "tiny" in page and 'src="http' not in page and "cdn" not in page


def test_the_report_says_what_each_hop_kept_and_fidelity_shows_it(finished: Finished, tmp_path: Path) -> None:
    hops = {hop.name: hop for hop in read_report(finished.folder).hops}
    assert {name: hop.parent for name, hop in hops.items()} == {
        "teacher-fp32": "teacher", "student": "teacher", "student-fp32": "student", "student-int4": "student"
    }  # fmt: skip
    assert hops["student-fp32"].token_agreement == 1.0 and hops["student"].at_least is None
    assert 0.9 < hops["student-int4"].kept <= 1.0 and hops["student-int4"].mean_kl > 0  # type: ignore[operator]
    shown = slmops("fidelity", file=finished.folder).out
    assert "student → student-int4" in shown and shown.endswith("no hop broke the model\n")

    # the same by hand: from the trained folder to what ships, and back to a folder whose template was broken
    broken = shutil.copytree(finished.model("student"), tmp_path / "broken")
    template = (broken / "chat_template.jinja").read_text()
    (broken / "chat_template.jinja").write_text(template.replace("<|assistant|>", "<|user|>"))
    (tmp_path / "asked.txt").write_text("where is my card\n\nhello\n")
    models = (f"a={finished.model('student')}", f"b={finished.outputs / 'bundle' / 'model'}")
    by_hand = slmops("fidelity", *models, "--count", "8", "--json", file=finished.folder).json
    assert by_hand["hops"] == [hops["student-int4"].model_dump(mode="json") | {
        "parent": "a", "name": "b", "says": by_hand["hops"][0]["says"], "mean_kl": pytest.approx(hops["student-int4"].mean_kl, rel=1e-4),
    }]  # fmt: skip
    words = (*models, f"c={broken}", "--expect", "rounded,learned", "--prompts", str(tmp_path / "asked.txt"))
    found = slmops("fidelity", *words, "--json", file=finished.folder).json
    assert [hop["prompts"] for hop in found["hops"]] == [2, 2] and found["verdict"] == "no hop broke the model"
    words = (*models, f"c={broken}", "--expect", "rounded,exact", "--prompts", str(tmp_path / "asked.txt"))
    told = slmops("fidelity", *words, file=finished.folder, codes=(3,)).out
    assert "broke the chat template" in told and "BROKEN  b → c: the same messages become other tokens" in told


def test_the_student_is_there_for_transformers(finished: Finished) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = finished.outputs / "student"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    again = slmops("run", "student", file=finished.folder)
    assert str(folder) in again.out and "student" in again.out


def test_a_gate_decides_the_exit_code(copy: Path) -> None:
    score = read_report(copy).gates[0]
    assert score.low is not None and score.value is not None and score.low < score.value < 1.01
    between = (score.low + score.value) / 2
    for bound, code in ((1.01, 3), (between, 4)):
        gate = f"evaluate.gates=[{{metric: accuracy, at_least: {bound}}}]"
        done = slmops("run", "--json", "--set", gate, file=copy, codes=(code,))
        assert done.ran == {"report", "bundle"}
        assert CODES[read_report(copy).verdict] == code
        assert slmops("run", "--set", gate, file=copy, codes=(code,)).code == code, "and again without running anything"
    needed = read_report(copy).gates[0].needed
    assert needed is not None and needed.count > 0


# ---------------------------------------------------------------------------------------------- what is there is reused


def test_a_second_run_does_nothing_and_says_so(finished: Finished) -> None:
    files = {path: path.stat().st_mtime_ns for path in finished.outputs.rglob("*") if path.is_file()}
    script = (
        "import sys\nfrom slmops.cli.main import main\ncode = main(sys.argv[1:])\n"
        "print(sorted({'torch', 'numpy', 'transformers', 'onnxruntime', 'onnxruntime_genai', 'onnx', 'rich.progress'}\n"
        "             & set(sys.modules)), file=sys.stderr)\nsys.exit(code)"
    )
    words = ["run", "--json", "-f", str(finished.folder)]
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=False)
    assert done.returncode == finished.run.code, done.stderr
    assert f"nothing to do: all {STEPS} steps are cached" in done.stderr
    assert done.stderr.splitlines()[-1] == "[]", "nothing heavy is loaded"
    second, first = json.loads(done.stdout), finished.run.json
    assert second["ran"] == []
    assert second["outputs"] == first["outputs"]
    assert second["headline"] == first["headline"]
    assert {path: path.stat().st_mtime_ns for path in files} == files


def test_plan_and_why_of_a_finished_project(finished: Finished) -> None:
    plan = slmops("plan", "--json", file=finished.folder).json
    assert plan["to_run"] == 0
    assert [step["state"] for step in plan["steps"]] == ["cached"] * STEPS
    assert all(step["why"] == [] and step["output"] for step in plan["steps"])
    assert "nothing to do" in slmops("plan", file=finished.folder).out
    assert slmops("why", "--json", file=finished.folder).json == {}
    assert "student is cached" in slmops("why", "student", file=finished.folder).out


def test_a_late_parameter_reruns_its_dependents_alone(copy: Path) -> None:
    change = ("--set", "convert.block_size=64")
    why = slmops("why", "--json", *change, file=copy).json
    conversions = {*INT4, "student-fp32", "teacher-fp32"}
    for step in conversions:
        assert why.pop(step) == ["block_size changed: 32 → 64"]
    assert all(line.startswith("waits for") for lines in why.values() for line in lines)
    ran = slmops("run", "--json", *change, file=copy, codes=(0, 3, 4)).ran
    after = {f"predict-{step}" for step in INT4} | {"measure", "fidelity", "report", "bundle"}
    assert ran == conversions | after, "fp32 models are converted again to the same bytes: nothing comes after them"
    assert slmops("run", "--json", file=copy).ran == set(), "the old setting is still in the store"
    kept = {row["digest"] for row in slmops("cache", "ls", "--json", file=copy).json}
    slmops("cache", "gc", file=copy)
    left = {row["digest"] for row in slmops("cache", "ls", "--json", file=copy).json}
    assert left < kept
    assert slmops("plan", "--json", file=copy).json["to_run"] == 0
    assert slmops("plan", "--json", *change, file=copy).json["to_run"] > 0


def test_touched_data_reruns_nothing(copy: Path) -> None:
    os.utime(copy / "rows.jsonl", (1_000_000_000, 1_000_000_000))
    assert slmops("run", "--json", file=copy).ran == set()


def test_rows_in_another_order_change_nothing_but_the_reading(copy: Path) -> None:
    file = copy / "rows.jsonl"
    file.write_text("".join(reversed(file.read_text().splitlines(keepends=True))))
    assert slmops("run", "--json", file=copy).ran == {"data"}


def test_a_changed_example_reruns_what_depends_on_it(copy: Path) -> None:
    file = copy / "rows.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    lines[0] = lines[0].replace('"content": "', '"content": "changed ', 1)
    file.write_text("".join(lines))
    why = slmops("why", "--json", file=copy).json
    assert why.pop("data")[0].startswith("input source has other content")
    assert set(why) == set(_steps(copy)) - {"data"}
    assert all(line.startswith("waits for") for lines in why.values() for line in lines)
    assert slmops("run", "teacher-tokenizer", "--json", file=copy).ran == {"data", "teacher-tokenizer"}
    why = slmops("why", "--json", file=copy).json
    assert "data" not in why and "teacher-tokenizer" not in why
    for step in ("teacher", "few", "all"):
        assert any(line.startswith("input data has other content") for line in why[step])


def _steps(folder: Path) -> list[str]:
    return [step["step"] for step in slmops("plan", "--json", file=folder).json["steps"]]


# ------------------------------------------------------------------------------------------ what else a user does with it

ALONE = """
import json, sys
from pathlib import Path
import onnxruntime_genai as og
folder = Path(sys.argv[1])
manifest = json.loads((folder / "manifest.json").read_text())
model = og.Model(str(folder / "model"))
tokenizer = og.Tokenizer(model)
template = (folder / "model" / "chat_template.jinja").read_text()

def ids(messages):
    text = tokenizer.apply_chat_template(json.dumps(messages), template_str=template, add_generation_prompt=True)
    return [int(i) for i in tokenizer.encode(text)]

rendered = ids(manifest["chat_template"]["messages"]) == manifest["chat_template"]["token_ids"]
answers = []
for message in sys.argv[2:]:
    params = og.GeneratorParams(model)
    prompt = ids([{"role": "user", "content": message}])
    params.set_search_options(max_length=len(prompt) + manifest["limits"]["max_new_tokens"], do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(prompt)
    new = []
    while not generator.is_done():
        generator.generate_next_token()
        new.append(int(generator.get_next_tokens()[0]))
    answers.append(tokenizer.decode(new))
print(json.dumps([rendered, answers, "slmops" in sys.modules]))
"""


def test_the_bundle_runs_without_slmops_and_answers_the_same(finished: Finished) -> None:
    bundle = finished.outputs / "bundle"
    manifest = verify(bundle)
    assert (manifest.name, manifest.precision, manifest.verdict) == (
        "tiny",
        "int4",
        read_report(finished.folder).verdict,
    )
    assert manifest.limits.max_new_tokens == 12
    messages = [tail for row in tiny.rows(40, seed=5)[:8] for tail in [str(row["messages"][0]["content"])]]  # type: ignore[index]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(bundle), *messages], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rendered, answers, loaded = json.loads(done.stdout.splitlines()[-1])
    assert rendered and not loaded
    chat = slmops("chat", "--json", *messages, file=finished.folder)
    told = [json.loads(line) for line in chat.out.splitlines()]
    assert [row["message"] for row in told] == messages
    assert [row["answer"] for row in told] == answers
    assert set(answers) & set(tiny.SUBJECTS)
    lines = subprocess.run(
        [sys.executable, "-m", "slmops.cli.main", "chat", "--bundle", str(bundle)],
        input="\n".join(messages) + "\n\n", capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert lines.stdout.splitlines() == answers


def test_report_and_compare(finished: Finished) -> None:
    assert slmops("report", "--json", file=finished.folder).out == (finished.outputs / "report.json").read_text()
    text = slmops("report", file=finished.folder).out
    assert "student-int4" in text and str(finished.outputs / "report.html") in text
    result = slmops("compare", "few-int4", "student-int4", "--json", file=finished.folder).json
    assert json.dumps(result).count("few-int4")
    same = slmops("compare", "student-int4", str(finished.model("predict-student-int4")), file=finished.folder).out
    assert "no difference found" in same
    other = slmops("compare", f"{finished.folder / 'slmops.yaml'}:all-int4", "few-int4", file=finished.folder).out
    assert "few-int4" in other


def test_cache_verbs(finished: Finished) -> None:
    rows = slmops("cache", "ls", "--json", file=finished.folder).json
    made = {step for row in rows for step in row["steps"]}
    assert set(finished.run.json["outputs"]) <= made
    checked = slmops("cache", "verify", "--json", file=finished.folder).json
    assert checked == {"artifacts": len(rows), "damaged": {}}


def test_gc_of_a_finished_project_removes_nothing(copy: Path) -> None:
    before = slmops("cache", "ls", "--json", file=copy).json
    assert "nothing to remove" in slmops("cache", "gc", "--dry-run", file=copy).out
    slmops("cache", "gc", file=copy)
    assert slmops("cache", "ls", "--json", file=copy).json == before
    assert slmops("run", "--json", file=copy).ran == set()


# ------------------------------------------------------------------------------------------------------------- variants

QUICK = {"gates": [], "baselines": [], "resamples": 100, "max_new_tokens": 12, "max_examples": 12,
         "measure": {"prompts": 2, "rounds": 1}}  # fmt: skip
BRIEF = {"epochs": 2, "batch_size": 32, "learning_rate": 5e-3}


def variant(folder: Path, name: str, **stages: Any) -> Path:
    """Write a project file beside the finished one: its stages, quick to judge, with some of them replaced."""
    spec = YAML(typ="safe").load(tiny.SPEC) | {"name": name, "evaluate": QUICK}
    spec["convert"] = {"precision": "int4", "fidelity_prompts": 8}
    spec |= stages
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps({key: value for key, value in spec.items() if value is not None}))
    return file


def go(file: Path, *words: str) -> tuple[set[str], Report]:
    """Run a variant; then it is finished: nothing is left to do, its report and bundle are sound."""
    ran = slmops("run", "--json", *words, file=file, codes=(0, 3, 4)).ran
    assert slmops("run", "--json", *words, file=file, codes=(0, 3, 4)).ran == set()
    report = read_report(file.parent, file.stem)
    assert verify(file.parent / "outputs" / file.stem / "bundle").name == file.stem
    return ran, report


def variants(report: Report) -> list[str]:
    return [variant.name for variant in report.variants]


def test_a_teacher_that_exists_gives_its_logits(finished: Finished) -> None:
    teacher = {"base": str(finished.model("teacher")), "instruct": False, "max_new_tokens": 12}
    data = {"path": "rows.jsonl", "gold": {"per_label": 5}}
    ran, report = go(variant(finished.folder, "existing-teacher", teacher=teacher, data=data))
    assert {"teacher", "logits", "student"} <= ran and "teacher-tokenizer" not in ran
    assert variants(report) == ["teacher-torch", "teacher-fp32", "student-fp32", "student-int4"]
    assert report.variants[0].scores["accuracy"].value > 0.7, "the teacher is the one that was trained"


def test_an_instructed_teacher_without_room_for_the_task_is_refused(finished: Finished) -> None:
    """The words that tell it the task, its labels and examples do not fit the 64 tokens of this one."""
    teacher = {"base": str(finished.model("teacher")), "max_new_tokens": 4}
    data = {"path": "rows.jsonl", "gold": {"per_label": 5}, "max_examples": 40}
    file = variant(finished.folder, "instructed", data=data, teacher=teacher, train={"method": "sequence"} | BRIEF)
    done = slmops("run", "answers", file=file, codes=(2,))
    assert "answered none" in done.err and "do they fit into its context?" in done.err


def test_a_student_that_exists_learns_on(finished: Finished) -> None:
    student = {"base": str(finished.model("few"))}
    ran, report = go(
        variant(finished.folder, "existing-student", student=student, train={"method": "sequence"} | BRIEF)
    )
    assert not ran & {"data", "teacher", "teacher-tokenizer", "answers", "synthetic", "teacher-fp32"}
    assert {"student-base", "student"} <= ran
    assert "student-int4" in variants(report)


@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_other_precisions_ship(precision: str, finished: Finished) -> None:
    file = variant(finished.folder, precision, convert={"precision": precision, "fidelity_prompts": 8})
    ran, report = go(file)
    assert not ran & {"teacher", "student", "teacher-fp32", "student-fp32"}, "these are as before"
    assert report.subject.variant == f"student-{precision}"
    reduction = report.headline.size_reduction_vs_fp32.value
    assert reduction is not None
    assert (0.5 < reduction < 0.8) if precision == "int8" else reduction == 0
    assert verify(finished.folder / "outputs" / precision / "bundle").precision == precision


@pytest.mark.parametrize("shards", [1, 2])
def test_sampled_prompts_without_any_gold(shards: int, finished: Finished) -> None:
    data = {"path": "rows.jsonl", "teacher_share": 1.0, "gold": {"total": 0}}
    spec = YAML(typ="safe").load(tiny.SPEC)["teacher"]
    teacher = spec | {"train": spec["train"] | {"prompt_weight": 0.3}}
    generate = {"method": "sample", "count": 60, "max_new_tokens": 24}
    synthesize = {"label_pool": False, "generate": generate, "shards": shards}
    train = {"method": "logits"} | BRIEF
    file = variant(finished.folder, f"sampled-{shards}", data=data, teacher=teacher, synthesize=synthesize, train=train)
    ran, report = go(file)
    parts = {"answers"} if shards == 1 else {"prompts-1", "prompts-2", "answers-1", "answers-2"}
    assert {"prompts", "synthetic", "logits", "student"} | parts <= ran
    assert report.synthesis is not None and report.synthesis.seen and report.synthesis.kept
    assert report.data.counts["gold"] == 0
    assert report.no_teacher_baseline.few is None and report.no_teacher_baseline.all is None


def test_prompts_from_templates(finished: Finished) -> None:
    slots = {"opening": ["please help with", "i need", "what about"], "thing": ["a refund", "my parcel", "the sign-in"]}
    generate = {"method": "template", "count": 12, "templates": ["{opening} {thing}", "{thing} again"], "slots": slots}
    file = variant(finished.folder, "template", synthesize={"generate": generate}, train={"method": "sequence"} | BRIEF)
    ran, report = go(file)
    assert {"prompts", "answers", "synthetic", "student"} <= ran and "teacher" not in ran
    assert report.synthesis is not None


def no_teacher(finished: Finished) -> Path:
    return variant(
        finished.folder, "alone", teacher=None, data={"path": "rows.jsonl"}, train={"method": "sequence"} | BRIEF
    )


def test_a_student_without_a_teacher(finished: Finished) -> None:
    ran, report = go(no_teacher(finished))
    assert "student-tokenizer" in ran and not ran & {"teacher", "answers", "few", "all"}
    assert variants(report) == ["student-fp32", "student-int4"]
    assert report.headline.accuracy_retained.value is None and report.headline.accuracy_retained.basis


def test_a_student_ships_with_the_tokens_of_its_task_and_rounded_on_its_texts(finished: Finished) -> None:
    stages = {"teacher": None, "student": {"base": str(finished.model("few"))}, "train": {"method": "sequence"} | BRIEF}
    kept = [row for row in tiny.rows() if row["messages"][1]["content"] in ("refund", "greeting")]  # type: ignore[index]
    (finished.folder / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    compress = {"vocabulary": "seen", "quantization": "gptq", "calibration_examples": 50}
    file = variant(finished.folder, "trimmed", data={"path": "two.jsonl"}, compress=compress, **stages)
    ran, report = go(file)
    assert {"student-trimmed", "student-rounded"} <= ran
    assert variants(report) == ["student-fp32", "whole-int4", "nearest-int4", "student-int4"]
    steps = {c.name: c for c in report.comparisons}
    assert (steps["trimming"].reference, steps["trimming"].candidate) == ("whole-int4", "nearest-int4")
    assert (steps["calibrating"].reference, steps["calibrating"].candidate) == ("nearest-int4", "student-int4")
    assert steps["calibrating"].size_reduction.value == 0
    step = steps["trimming"]
    assert step.size_reduction.value is not None and step.size_reduction.value > 0
    folders = finished.model("few"), finished.folder / "outputs" / "trimmed" / "student"
    before, after = (json.loads((folder / "config.json").read_text())["vocab_size"] for folder in folders)
    assert 261 < after < before


def test_a_pruned_student_learns_again_and_is_compared_with_what_it_was(finished: Finished) -> None:
    """With the teacher's cached distributions, which are there already; its zeros stay zero to the end."""
    prune = {"layers": 1, "ffn": 0.5, "sparsity": 0.5, "recover": {"epochs": 2}}
    student = {"model": {"layers": 2, "hidden": 32, "heads": 2, "ffn": 64, "context": 64}}
    ran, report = go(variant(finished.folder, "pruned", student=student, compress={"prune": prune}))
    assert {"student-shortened", "student-narrowed", "student-sparse", "student-recovered", "unpruned-int4"} <= ran
    assert "logits" not in ran
    steps = {c.name: c for c in report.comparisons}
    assert (steps["pruning"].reference, steps["pruning"].candidate) == ("unpruned-int4", "student-int4")
    assert steps["pruning"].size_reduction.value is not None and steps["pruning"].size_reduction.value > 0
    assert "student-recovered" in {training.name for training in report.training}
    folder = finished.folder / "outputs" / "pruned" / "student"
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_hidden_layers"], config["intermediate_size"]) == (1, 32)
    weights = load_file(folder / "model.safetensors")
    shares = [float((w == 0).float().mean()) for name, w in weights.items() if name.endswith("_proj.weight")]
    assert len(shares) == 7 and min(shares) > 0.49 and max(shares) < 0.51
    assert go(finished.folder / "pruned.yaml")[0] == set()


def test_a_student_ships_in_a_file_of_the_size_that_was_asked_for(finished: Finished) -> None:
    model = finished.model("few")
    half = sum(file.stat().st_size for file in model.glob("*.safetensors")) / 2
    asked = round(0.42 * half / 1e6, 3)
    compress = {"quantization": "awq+gptq", "calibration_examples": 30}
    stages = {"teacher": None, "student": {"base": str(model)}, "train": {"method": "sequence"} | BRIEF}
    convert = {"precision": "int4", "fidelity_prompts": 8, "file_mb": asked}
    ran, report = go(variant(finished.folder, "sized", compress=compress, convert=convert, **stages))
    assert {"student-widths", "student-scaled", "student-rounded"} <= ran
    forms = {v.name: v for v in report.variants}
    assert set(forms) == {"student-fp32", "nearest-int4", "student-int4"}
    for name in ("nearest-int4", "student-int4"):
        size = forms[name].file_bytes
        assert size is not None and 0.3 * half < size <= asked * 1e6


OTHER_FORMS = ["mlx-int4", "openvino-int4", "litert-int4", "executorch-int4", "safetensors-bf16"]


def test_other_forms_are_judged_beside_the_one_that_ships(finished: Finished) -> None:
    for name, extra in (
        ("llama_cpp", "llamacpp"),
        ("mlx_lm", "mlx"),
        ("openvino", "openvino"),
        ("ai_edge_litert", "litert"),
        ("executorch", "executorch"),
    ):
        pytest.importorskip(name, reason=f"needs the extra [{extra}]")
    convert = {"precision": "int4", "fidelity_prompts": 8, "also": ["gguf-fp16", "gguf-q4_0", *OTHER_FORMS]}
    ran, report = go(variant(finished.folder, "forms", convert=convert))
    assert {"student-gguf-fp16", "predict-student-gguf-q4_0", "measure"} <= ran and "student" not in ran
    assert {"student-gguf-fp16", "student-gguf-q4_0", "student-int4"} <= set(variants(report))
    forms = {v.name: v for v in report.variants}
    half = forms["student-gguf-fp16"]
    assert half.runtime == "llama.cpp" and half.about.endswith("llama.cpp, fp16")
    assert half.fidelity is not None and half.fidelity["token_agreement"] > 0.95
    assert half.memory is not None and half.latency is not None
    assert half.file_bytes is not None and half.file_bytes > forms["student-gguf-q4_0"].file_bytes  # type: ignore[operator]
    assert half.scores["accuracy"].value == pytest.approx(forms["student-fp32"].scores["accuracy"].value, abs=0.1)
    assert (finished.folder / "outputs" / "forms" / "gguf-q4_0" / "model.gguf").is_file()
    runtimes = {
        "mlx-int4": ("mlx", "MLX, int4"),
        "openvino-int4": ("openvino", "OpenVINO, int4"),
        "litert-int4": ("litert", "LiteRT, int4"),
        "executorch-int4": ("executorch", "ExecuTorch, int4"),
        "safetensors-bf16": ("torch", "PyTorch, bf16"),
    }
    for form, (runtime, about) in runtimes.items():
        found = forms[f"student-{form}"]
        assert found.runtime == runtime and found.about.endswith(about)
        assert found.fidelity is not None and found.fidelity["template_equal"] == 1.0
        assert (found.memory is None) == (found.latency is None) == (form == "safetensors-bf16")  # no server runs here
        if form not in ("openvino-int4", "litert-int4"):  # whose graphs are longer than the weights of so small a model
            assert found.file_bytes is not None and found.file_bytes < forms["student-fp32"].file_bytes  # type: ignore[operator]
        assert found.scores["accuracy"].value == pytest.approx(forms["student-int4"].scores["accuracy"].value, abs=0.15)
        assert (finished.folder / "outputs" / "forms" / form / "config.json").is_file()


# ------------------------------------------------------------------------------------------------------------ endpoints


def right(messages: list[dict[str, str]]) -> str:
    """What a teacher that knows the task replies: a label, or a list of new messages when asked for one."""
    text = messages[-1]["content"]
    if "JSON list" in messages[0]["content"]:
        start = sum(map(ord, text)) % 800
        return json.dumps([str(row["messages"][0]["content"]) for row in tiny.rows(6, seed=start)])  # type: ignore[index]
    for label, words in tiny.SUBJECTS.items():
        if any(word in text for word in words):
            return label
    return "greeting"


@pytest.fixture(scope="module")
def desk() -> Iterator[tuple[StandIn, str]]:
    server = StandIn(right, key="secret")
    with pytest.MonkeyPatch.context() as patch, server.serve() as url:
        patch.setenv("STAND_IN_KEY", "secret")
        yield server, url


@pytest.mark.parametrize("method", ["seed", "paraphrase"])
def test_a_remote_teacher(method: str, finished: Finished, desk: tuple[StandIn, str]) -> None:
    server, url = desk
    endpoint = {"url": url, "model": f"stand-in-{method}", "api_key_env": "STAND_IN_KEY", "max_output_tokens": 64,
                "price": {"input_per_million": 1.0, "output_per_million": 2.0}}  # fmt: skip
    file = variant(
        finished.folder, f"remote-{method}", teacher={"endpoint": endpoint},
        data={"path": "rows.jsonl", "gold": {"per_label": 5}, "max_examples": 60},
        synthesize={"generate": {"method": method, "count": 8}},
        student={"model": {"layers": 1, "hidden": 32, "heads": 2, "ffn": 64, "context": 64}, "tokenizer": {"vocabulary": 400}},
        train={"method": "sequence"} | BRIEF,
    )  # fmt: skip
    before = len(server.requests)
    ran, report = go(file, "--budget", "1")
    assert {"prompts", "answers", "synthetic", "predict-teacher-endpoint"} <= ran
    assert len(server.requests) > before, "the first run asks; `go` runs twice"
    teacher = report.variants[0]
    assert (teacher.name, teacher.runtime, teacher.latency) == ("teacher-endpoint", "endpoint", None)
    assert teacher.scores["accuracy"].value == 1.0
    assert report.headline.memory_reduction.value is None and "remote" in report.headline.memory_reduction.basis
    asked = len(server.requests)
    for record in (finished.folder / ".slmops" / "steps").glob("*.json"):
        if json.loads(record.read_text())["step"] in ("prompts", "answers", "predict-teacher-endpoint"):
            record.unlink()
    again = slmops("run", "--json", file=file, codes=(0, 3, 4))
    assert {"prompts", "answers", "predict-teacher-endpoint"} <= again.ran
    assert len(server.requests) == asked, "answers that were paid for are not asked again, whatever else is lost"
    text = (finished.folder / "outputs" / file.stem / "report.html").read_text()
    assert "secret" not in text + file.read_text() + again.out + again.err


# ----------------------------------------------------------------------------------------------------------- other tasks

COLOURS = ("red", "green", "blue", "grey")
THINGS = (
    "door",
    "lamp",
    "chair",
    "cup",
    "roof",
    "coat",
    "boat",
    "wall",
    "hat",
    "bag",
    "car",
    "kite",
    "pen",
    "rug",
    "bed",
)


def pairs() -> Iterator[tuple[str, str]]:
    for index, thing in enumerate(f"{size} {name}" for size in ("big", "small", "old", "new") for name in THINGS):
        yield thing, COLOURS[index * 7 % 4]


def chat_rows() -> list[dict[str, Any]]:
    return [
        {"conversations": [
            {"from": "human", "value": f"i have a {thing}"}, {"from": "gpt", "value": "what about it?"},
            {"from": "human", "value": f"make it {colour}"}, {"from": "gpt", "value": f"the {thing} is {colour} now"},
        ]}
        for thing, colour in pairs()
    ]  # fmt: skip


def question_rows() -> list[dict[str, Any]]:
    return [
        {"passage": f"the {thing} is {colour}.", "question": f"what colour is the {thing}?", "reply": colour}
        for thing, colour in pairs()
    ]


def summary_rows() -> list[dict[str, Any]]:
    return [
        {
            "prompt": f"today we saw a {thing}. it was {colour}. then we went home.",
            "completion": f"saw a {colour} {thing}",
        }
        for thing, colour in pairs()
    ]


@pytest.mark.parametrize(
    ("task", "rows", "data", "metric"),
    [
        ("chat", chat_rows, {}, "rouge_l"),
        ("question_answering", question_rows,
         {"columns": {"context": "passage", "prompt": "question", "answer": "reply"}}, "token_f1"),
        ("summarisation", summary_rows, {}, "rouge_l"),
    ],
)  # fmt: skip
def test_other_tasks(
    task: str, rows: Callable[[], list[dict[str, Any]]], data: dict[str, Any], metric: str, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    shape = {"layers": 1, "hidden": 32, "heads": 2, "ffn": 64, "context": 96}
    learn = {"epochs": 20, "batch_size": 8, "learning_rate": 1e-2}  # enough to end its answers
    teacher = {"model": shape, "tokenizer": {"vocabulary": 400}, "train": learn, "max_new_tokens": 16}
    file = variant(
        tmp_path, task.replace("_", "-"), task={"type": task}, teacher=teacher, student={"model": shape},
        data={"path": "rows.jsonl", "teacher_share": 0.5, "gold": {"total": 10}, **data,
              "overlap": {"near_duplicate": 1.0}},
        train={"method": "sequence"} | BRIEF,
    )  # fmt: skip
    _, report = go(file)
    assert report.task.type == task
    assert metric in report.variants[-1].scores
    assert report.confusions == () and report.data.labels is None
    answer = slmops("chat", "--json", "what colour is the big door?", file=file)
    assert set(json.loads(answer.out)) == {"message", "answer", "tokens", "finished", "seconds"}
