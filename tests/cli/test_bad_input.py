"""What users get wrong, each as they would meet it: a clear error, a line where there is one, a hint, nothing lost.

Every project here has its data step finished before the mistake. After each refusal the mistake is mended and the same
command must go on from there: what was finished is not made again, what was paid for is not asked again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from slmops.bundle.manifest import BundleFile, ChatTemplate, Limits, Manifest, Runtime, payload_digest
from slmops.core.digest import digest_bytes
from slmops.engines.memory_engine import MemoryEngine
from slmops.engines.stand_in import Fault, StandIn
from slmops.flow import methods
from slmops.store import Store
from slmops.store.files import exclusive
from tests.cli.conftest import Outcome, Slmops
from tests.tiny import SPEC, rows


def still_there(slmops: Slmops, folder: Path) -> None:
    """The data step that was finished before the mistake is reused."""
    again = slmops("run", "data", folder=folder)
    assert again.code == 0, again.err
    assert again.started == []
    assert "nothing to do" in again.err


# ---------------------------------------------------------------------------------------------------- project files


@dataclasses.dataclass(frozen=True)
class Bad:
    """A mistake in slmops.yaml: `old` replaced by `new` (or the whole file), and what is said about it."""

    name: str
    new: str | bytes
    says: tuple[str, ...]
    line: int | None = None
    old: str = ""

    def text(self) -> bytes:
        if isinstance(self.new, bytes):
            return self.new
        assert self.old in SPEC
        return (SPEC.replace(self.old, self.new, 1) if self.old else self.new).encode()


ENDPOINT = "{url: 'http://127.0.0.1:9/v1', model: m}"

BAD_SPECS = [
    Bad("unknown key", "learning_rat: 3e-3", ("unknown key", "did you mean learning_rate?"), 7, "learning_rate: 3e-3"),
    Bad("unknown key in a row", "mesure: {prompts: 8", ("did you mean measure?",), 17, "measure: {prompts: 8"),
    Bad("wrong type", "layers: two", ("must be a valid integer", '"two"'), 5, "layers: 2"),
    Bad("out of range", "teacher_share: 1.5", ("data.teacher_share", "less than or equal to 1"), 3, "teacher_share: 0.5"),
    Bad("bad choice", "{type: clasification}", ("did you mean classification?",), 2, "{type: classification}"),
    Bad("duplicate key", "name: tiny\nname: tiny", ("duplicate key", "name"), 2, "name: tiny"),
    Bad("syntax", "task: {type: classification", ("expected",), 3, "task: {type: classification}"),
    Bad("tab", "\tepochs: 8\n", ("slmops.yaml",), 7, "  train: {epochs: 8, batch_size: 32, learning_rate: 3e-3}\n"),
    Bad("not UTF-8", SPEC.replace("tiny", "tiny # caf\xe9").encode("latin-1"), ("not UTF-8",), 1),
    Bad("control character", SPEC.replace("gates", "ga\x00tes").encode(), ("control character",), 14),
    Bad("empty", b"", ("empty or not a mapping",), 1),
    Bad("only comments", b"# nothing yet\n", ("empty or not a mapping",), 1),
    Bad("a list", b"- name: tiny\n", ("empty or not a mapping",), 1),
    Bad("missing key", "teacher_share: 0.5", ("data.path", "is missing"), 3, "path: rows.jsonl, teacher_share: 0.5"),
    Bad("empty path", "path: ''", ("data.path",), 3, "path: rows.jsonl"),
    Bad("two teachers", "teacher:\n  base: some/folder\n", ("exactly one of model, base, endpoint",), 4, "teacher:\n"),
    Bad("no student", "", ("student", "is missing"), None,
        "student:\n  model: {layers: 1, hidden: 32, heads: 2, ffn: 64, context: 64}\n"),
    Bad("stages that do not fit", "convert: {precision: fp32}\n", ("train.quantization_aware", "int4"), 11,
        "train: {method: logits, epochs: 8, batch_size: 32, learning_rate: 5e-3}\n"
        "convert: {precision: int4, fidelity_prompts: 8}\n"),
    Bad("gate without a bound", "{metric: accuracy}", ("exactly one of at_least, at_most",), 14,
        "{metric: accuracy, at_least: 0.05}"),
    Bad("gate on what is not there", "out_of_scope_recall", ("task.out_of_scope", "is missing"), 2, "accuracy"),
    Bad("heads", "hidden: 33", ("must be a multiple of heads",), 10, "hidden: 32"),
    Bad("head size", "hidden: 48", ("student.model.heads", "heads of size 24", "give heads 1 or 3"), 10, "hidden: 32"),
    Bad("infinite", "{epochs: .inf", ("train.epochs", "finite"), 7, "{epochs: 8"),
    Bad("not a plain value", "name: !!python/object tiny", ("name",), 1, "name: tiny"),
    Bad("half a surrogate pair", 'licence: "\\ud800"\nseed: 1\ndata:', ("licence", "surrogate"), 3, "data:"),
    Bad("date", "version: 2026-01-01\nname: tiny", ("version", "in quotes"), 1, "name: tiny"),
    Bad("values to swap where there are none", "gold: {per_label: 5}, augment: {method: swap}}", ("data.augment", "take it out"),
        3, "gold: {per_label: 5}}"),
    Bad("additions to nothing", "train: {tuning: lora, method: logits", ("train.tuning", "give student.base"), 11,
        "train: {method: logits"),
    Bad("teacher tuned from scratch", "{tuning: dora, epochs: 8", ("teacher.train.tuning", "adds to a model that exists"), 7,
        "{epochs: 8"),
    Bad("learning rate 0", "learning_rate: 0", ("train.learning_rate", "greater than 0"), 7, "learning_rate: 3e-3"),
    Bad("own tokenizer with the teacher's distributions", "method: on_policy",
        ("student.tokenizer", "on_policy needs the teacher's tokenizer", "cross_tokenizer"), None, "method: logits"),
    Bad("more teachers without a use", "max_new_tokens: 12\n  others: [{base: some/folder}]\nstudent:",
        ("teacher.others", "is for logit distillation"), None, "max_new_tokens: 12\nstudent:"),
    Bad("more teachers of two kinds", "max_new_tokens: 12\n  others: [{weight: 2}]\nstudent:",
        ("exactly one of model, base",), 9, "max_new_tokens: 12\nstudent:"),
    Bad("nothing to learn from", "gold: {total: 0}}\nsynthesize: {label_pool: false}", ("data.gold",), 3,
        "gold: {per_label: 5}}"),
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD_SPECS, ids=lambda bad: bad.name.replace(" ", "_"))
def test_project_file(bad: Bad, project: Path, slmops: Slmops) -> None:
    file = project / "slmops.yaml"
    content = bad.text()
    if bad.name == "stages that do not fit":
        content = content.replace(b"convert: ", b"train: {quantization_aware: int4}\nconvert: ")
    if bad.name.startswith("own tokenizer"):
        content = content.replace(b"context: 64}\ntrain", b"context: 64}\n  tokenizer: {vocabulary: 400}\ntrain")
    if bad.name == "more teachers without a use":
        content = content.replace(b"method: logits", b"method: sequence")
    file.write_bytes(content)
    outcome = slmops("run", folder=project)
    outcome.refused(2, *bad.says)
    assert "in the project file" in outcome.message
    if bad.line is not None:
        assert f"slmops.yaml:{bad.line}: " in outcome.message
    assert outcome.started == []
    file.write_text(SPEC)
    still_there(slmops, project)


def test_spec_errors_load_nothing_heavy(project: Path) -> None:
    """In a process of its own: a wrong file is refused before any heavy library is imported."""
    script = (
        "import sys\nfrom slmops.cli.main import main\ncode = main(sys.argv[1:])\n"
        "print(sorted({'torch', 'numpy', 'transformers', 'onnxruntime', 'httpx'} & set(sys.modules)), code)"
    )
    (project / "slmops.yaml").write_text(SPEC.replace("layers: 2", "layers: two"))
    for verb in ("plan", "run", "why"):
        done = subprocess.run(
            [sys.executable, "-c", script, verb, "-f", str(project)], capture_output=True, text=True, check=True
        )
        assert done.stdout == "[] 2\n"
        assert "slmops.yaml:5: teacher.model.layers" in done.stderr
        assert "Traceback" not in done.stderr


# ---------------------------------------------------------------------------------------------------- command lines


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("run", "--set", "train.epochs"), 2, "not key=value"),
        (("run", "--set", "train.epoch=3"), 2, "--set: train.epoch: unknown key (did you mean epochs?)"),
        (("run", "--set", "train.epochs=many"), 2, "--set: train.epochs: must be a valid number"),
        (("run", "--set", "evaluate.gates.4.metric=valid"), 2, "is inside a value that has no keys"),
        (
            ("run", "--set", "train.method=sequence", "--set", "teacher=null", "--set", "student={}"),
            2,
            "--set: student",
        ),
        (("run", "--set", "data.path=nowhere.jsonl"), 2, "there is no"),
        (("run", "studnet"), 2, "did you mean student?"),
        (("why", "studnet"), 2, "did you mean student?"),
        (("run", "--budget", "-1"), 2, "--budget"),
        (("run", "--budget", "nan"), 2, "--budget"),
        (("run", "--budget", "much"), 2, "--budget"),
        (("run", "--jobs", "-1"), 2, "--jobs"),
        (("report",), 2, "no report of tiny yet"),
        (("chat", "hello"), 2, "there is no bundle"),
        (("compare", "student-int4", "few-int4"), 2, "not made yet"),
        (("fidelity",), 2, "no comparison of tiny yet"),
        (("fidelity", "one"), 2, "one model has no hop"),
        (("fidelity", "one", "two"), 1, "no model folder at one"),
        (("fidelity", "a=one", "a=two"), 2, "two models are called a"),
        (("fidelity", "one", "two", "--rounded", "85"), 2, "a share from 0 to 1"),
        (("compare", "student-int3", "few-int4"), 2, "variants: teacher-torch"),
        (("launch",), 2, "invalid choice: 'launch'"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, tuple) else "",
)
def test_command_line(words: tuple[str, ...], code: int, says: str, project: Path, slmops: Slmops) -> None:
    outcome = slmops(*words, folder=project)
    outcome.refused(code, says)
    assert outcome.started == []
    still_there(slmops, project)


def test_no_project_file(tmp_path: Path, slmops: Slmops) -> None:
    for path in (tmp_path, tmp_path / "other.yaml"):
        slmops("run", folder=path).refused(2, "there is no", "slmops init")


# ------------------------------------------------------------------------------------------------------- data files


def jsonl(content: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in content).encode()


def row(text: str, answer: str | None) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"messages": messages + ([{"role": "assistant", "content": answer}] if answer is not None else [])}


def lines(changed: dict[int, bytes]) -> bytes:
    """The tiny project's rows with some lines (from 1) replaced."""
    whole = jsonl(rows()).splitlines()
    for number, line in changed.items():
        whole[number - 1] = line
    return b"\n".join(whole) + b"\n"


def csv(*extra: str) -> bytes:
    body = [f"{r['messages'][0]['content']},{r['messages'][1]['content']}" for r in rows(120)]  # type: ignore[index]
    return "\n".join(["text,label", *body, *extra, ""]).encode()


PAIR = {"prompt": "shall we?", "chosen": "yes", "rejected": "no"}


def pairs(changed: dict[int, dict[str, Any]]) -> bytes:
    """Preference rows with some lines (from 1) replaced."""
    return jsonl([changed.get(n, PAIR | {"prompt": f"shall we go to number {n}?"}) for n in range(1, 121)])


SPLIT_BY_NAME = "splits={train: [rows.jsonl], test: [test.jsonl]}"


@dataclasses.dataclass(frozen=True)
class BadData:
    """Data files as bytes (None: no such file), more words for the command, and what is said. `line` of `file`."""

    name: str
    files: dict[str, bytes | None]
    says: tuple[str, ...]
    line: int | None = None
    sets: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    file: str = "rows.jsonl"
    starts: bool = True


TRAIN = jsonl(rows(240))
LABELLED = row("where is my parcel", "delivery")

BAD_DATA = [
    BadData("missing file", {"rows.jsonl": None}, ("there is no", "rows.jsonl"), starts=False),
    BadData("missing folder", {}, ("there is no",), sets=("data.path=no/such/rows.jsonl",), starts=False),
    BadData("empty file", {"rows.jsonl": b""}, ("the file is empty",)),
    BadData("only blank lines", {"rows.jsonl": b"\n\n \n"}, ("the file is empty",)),
    BadData("header-only CSV", {"rows.csv": b"text,label\n"}, ("no rows",), file="rows.csv"),
    BadData("wrong column", {"rows.csv": csv()}, ("no column 'txt'", "did you mean 'text'?"), file="rows.csv",
            sets=("data.columns={prompt: txt, answer: label}",)),
    BadData("ragged CSV row", {"rows.csv": csv("where is it, please,delivery")}, ("3 cells where 2 are expected",),
            122, file="rows.csv"),
    BadData("open quote", {"rows.csv": csv('"where is it,delivery')}, ("bad CSV",), 122, file="rows.csv"),
    BadData("bad JSON on line 17", {"rows.jsonl": lines({17: b'{"messages": [}'})}, ("bad JSON at column",), 17),
    BadData("three bad rows at once", {"rows.jsonl": lines({3: b"x", 17: b"[", 40: b"7"})},
            ("3 bad rows", "rows.jsonl:3: ", "rows.jsonl:40: "), 17),
    BadData("half a JSON file", {"rows.json": json.dumps(rows(), indent=1).encode()[:-40]}, ("bad JSON",),
            file="rows.json"),
    BadData("not UTF-8", {"rows.jsonl": lines({9: b'{"messages": [{"role": "user", "content": "caf\xe9"}]}'})},
            ("0xe9", "is not UTF-8"), 9),
    BadData("NUL byte", {"rows.jsonl": lines({12: b"{\x00}"})}, ("NUL byte",), 12),
    BadData("UTF-16", {"rows.jsonl": jsonl(rows()).decode().encode("utf-16")}, ("UTF-16", "iconv")),
    BadData("unknown role", {"rows.jsonl": lines({5: b'{"messages": [{"role": "usr", "content": "x"}]}'})},
            ("unknown role 'usr'", "did you mean 'user'?"), 5),
    BadData("empty prompt", {"rows.jsonl": lines({5: b'{"messages": [{"role": "user", "content": " "}]}'})},
            ("the prompt is empty",), 5),
    BadData("test row without an answer", {"rows.jsonl": TRAIN, "test.jsonl": jsonl([LABELLED, row("what", None)])},
            ("the row has no answer",), 2, (f"data.{SPLIT_BY_NAME}",), file="test.jsonl"),
    BadData("no row has an answer", {"rows.jsonl": jsonl([row(f"message {n}", None) for n in range(99)])},
            ("0 rows have an answer",)),
    BadData("one class only", {"rows.jsonl": jsonl([row(f"message {n}", "refund") for n in range(99)])},
            ("one label only", "refund")),
    BadData("label unseen in training", {"rows.jsonl": TRAIN, "test.jsonl": jsonl([LABELLED, row("cost?", "price")])},
            ("test has labels that no training example has", "price"), sets=(f"data.{SPLIT_BY_NAME}",)),
    BadData("label not in the list", {"rows.jsonl": lines({8: json.dumps(row("odd one", "refnd")).encode()})},
            ("'refnd' is not in task.labels", "did you mean 'refund'?"), 8,
            ("task.labels=[refund, delivery, password, greeting]",)),
    BadData("answer that is no JSON object", {"rows.jsonl": lines({4: json.dumps(row("odd one", "[1]")).encode()}).replace(
                b'"content": "refund"', b'"content": "{}"').replace(b'"content": "delivery"', b'"content": "{}"').replace(
                b'"content": "password"', b'"content": "{}"').replace(b'"content": "greeting"', b'"content": "{}"')},
            ("not a JSON object", "it is a list"), 4, ("task={type: extraction}", "data.gold={total: 20}",
            "evaluate.gates=[]")),
    BadData("test leaked into train, strict", {"rows.jsonl": TRAIN + jsonl([LABELLED]), "test.jsonl": jsonl([LABELLED])},
            ("exact copies of test", "where is my parcel", "without --strict"), None, (f"data.{SPLIT_BY_NAME}",),
            ("--strict",)),
    BadData("everything leaked", {"rows.jsonl": TRAIN, "test.jsonl": TRAIN}, ("example is a copy of a test one", "given twice"), None,
            (f"data.{SPLIT_BY_NAME}",)),
    BadData("split that is not there", {}, ("'tset.jsonl'",), sets=("data.splits={train: [rows.jsonl], test: [tset.jsonl]}",)),
    BadData("shares that leave nothing", {}, ("leave nothing for training",), sets=("data.splits={validation: 0.5, test: 0.5}",)),
    BadData("gold by label without labels", {}, ("needs a classification task",), sets=("task={type: chat}", "evaluate.gates=[]")),
    BadData("pair without its rejected answer", {"rows.jsonl": pairs({6: {"prompt": "p", "chosen": "a"}})},
            ("no 'rejected' in this row",), 6),
    BadData("pair of two equal answers", {"rows.jsonl": pairs({9: PAIR | {"rejected": "yes"}})},
            ("the chosen and the rejected answer are the same",), 9, ("task={type: chat}", "evaluate.gates=[]", "data.gold={total: 20}")),
    BadData("no pairs for dpo", {}, ("20 bad rows", "the row has no rejected answer"), 1, ("train.method=dpo",)),
    BadData("unknown suffix", {"rows.xls": b"\xd0\xcf\x11\xe0"}, ("cannot tell the format",), file="rows.xls"),
    BadData("folder without data", {"more/readme.md": b"hello"}, ("no data file in this folder",), file="more", starts=False),
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD_DATA, ids=lambda bad: bad.name.replace(" ", "_"))
def test_data_file(bad: BadData, project: Path, slmops: Slmops) -> None:
    good = (project / "rows.jsonl").read_bytes()
    for name, content in bad.files.items():
        path = project / name
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
    sets = [*bad.sets, *([f"data.path={project / bad.file}"] if bad.file not in ("rows.jsonl", "test.jsonl") else [])]
    outcome = slmops("run", *bad.words, *(word for value in sets for word in ("--set", value)), folder=project)
    outcome.refused(2, *bad.says)
    if bad.starts:
        assert (
            Path(bad.file).name in outcome.message or "data." in outcome.message or "evaluation data" in outcome.message
        )
    if bad.line is not None:
        assert f"{bad.file}:{bad.line}: " in outcome.message
    assert outcome.started == (["data"] if bad.starts else [])
    (project / "rows.jsonl").write_bytes(good)
    still_there(slmops, project)


def test_leaked_rows_are_taken_out_without_strict(project: Path, slmops: Slmops) -> None:
    (project / "rows.jsonl").write_bytes(TRAIN + jsonl([LABELLED]))
    (project / "test.jsonl").write_bytes(jsonl([LABELLED, row("hello there", "greeting")]))
    outcome = slmops("run", "data", "--set", f"data.{SPLIT_BY_NAME}", folder=project)
    assert outcome.code == 0, outcome.err
    assert "removed: 1 train examples are exact copies of test" in outcome.err


# ------------------------------------------------------------------------------------- the machine and its neighbours


def test_no_disk_before_the_run(project: Path, slmops: Slmops, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(project)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        outcome = slmops("run", folder=project)
    outcome.refused(1, "MB on disk", "slmops cache gc")
    assert outcome.started == []
    still_there(slmops, project)


def test_disk_full_while_storing(project: Path, slmops: Slmops, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Store, folder: Path, artifact: Any) -> None:
        raise OSError(28, "No space left on device", str(folder))

    with monkeypatch.context() as patch:
        patch.setattr(Store, "_take", full)
        outcome = slmops("run", "teacher-tokenizer", folder=project)
    outcome.refused(1, "no space left on the disk", "finished steps are kept")
    assert outcome.started == ["teacher-tokenizer"]
    again = slmops("run", "teacher-tokenizer", folder=project)
    assert (again.code, again.started) == (0, ["teacher-tokenizer"])


def test_disk_full_inside_a_step(project: Path, slmops: Slmops, monkeypatch: pytest.MonkeyPatch) -> None:
    from slmops.data import preparation

    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(preparation, "_write", full)
        outcome = slmops("run", "data", "--set", "data.max_examples=200", folder=project)
    outcome.refused(1, "no space left on the disk")
    assert outcome.started == ["data"]
    still_there(slmops, project)


def test_folder_that_cannot_be_written(project: Path, slmops: Slmops, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a read-only project folder; simulated, because the superuser may write everywhere."""
    shutil.rmtree(project / ".slmops")
    real = Path.mkdir

    def refuse(self: Path, *words: Any, **more: Any) -> None:
        if self.is_relative_to(project):
            raise PermissionError(13, "Permission denied", str(self))
        real(self, *words, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        outcome = slmops("run", "data", folder=project)
    outcome.refused(1, "cannot write", ".slmops", "Permission denied", "permissions")
    assert outcome.started == []
    assert slmops("run", "data", folder=project).code == 0


def test_state_folder_that_is_a_file(project: Path, slmops: Slmops) -> None:
    shutil.rmtree(project / ".slmops")
    (project / ".slmops").write_text("")
    outcome = slmops("run", "data", folder=project)
    outcome.refused(1, ".slmops")
    assert outcome.started == []


def test_missing_package(project: Path, slmops: Slmops, monkeypatch: pytest.MonkeyPatch) -> None:
    real = methods.version_of
    with monkeypatch.context() as patch:
        patch.setattr(methods, "version_of", lambda name: None if name == "torch" else real(name))
        outcome = slmops("run", folder=project)
    outcome.refused(1, "torch (for train.sft) is not installed", "pip install 'slmops[train]'")
    assert outcome.started == []
    still_there(slmops, project)


def test_two_runs_at_once(project: Path, slmops: Slmops) -> None:
    with exclusive(project / ".slmops" / "lock", "held by the test"):
        outcome = slmops("run", "teacher-tokenizer", folder=project)
    outcome.refused(1, "another slmops run is at work", "wait")
    assert outcome.started == []
    still_there(slmops, project)


def test_stored_file_that_was_tampered_with(project: Path, slmops: Slmops) -> None:
    file = next((project / ".slmops" / "store" / "trees").glob("*/test.jsonl"))
    file.chmod(0o644)
    file.write_text(file.read_text().replace("refund", "greeting"))
    assert "its output is damaged" in slmops("why", "data", folder=project).out
    outcome = slmops("run", "teacher-tokenizer", folder=project)
    assert outcome.code == 0, outcome.err
    assert outcome.started == ["data", "teacher-tokenizer"], "it is made again"
    assert slmops("cache", "verify", folder=project).code == 0, "and what is used is sound"
    file.chmod(0o644)
    file.write_text("x")
    slmops("cache", "verify", folder=project).refused(1, "test.jsonl", "--repair")
    assert slmops("cache", "verify", "--repair", folder=project).code == 0
    assert slmops("run", "data", folder=project).started == ["data"]


def test_project_copied_without_its_times(project: Path, slmops: Slmops) -> None:
    for path in (project / ".slmops" / "store" / "trees").rglob("*.json*"):
        os.utime(path, (1, 1))
    still_there(slmops, project)


def test_a_file_beside_the_data_is_not_overlooked(project: Path, slmops: Slmops) -> None:
    (project / "test.jsonl").write_bytes(jsonl([LABELLED, row("hello there", "greeting")]))
    words = ("run", "data", "--set", f"data.{SPLIT_BY_NAME}")
    assert slmops(*words, folder=project).started == ["data"]
    assert slmops(*words, folder=project).started == []
    (project / "test.jsonl").write_bytes(jsonl([LABELLED]))
    assert slmops(*words, folder=project).started == ["data"]


# ---------------------------------------------------------------------------------------------------- model folders

CONFIG = json.dumps({"architectures": ["LlamaForCausalLM"]}).encode()


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (None, ("there is no",)),
        ({}, ("there is no config.json",)),
        ({"config.json": b"{"}, ("config.json is not JSON",)),
        ({"config.json": b"[]"}, ("config.json",)),
        ({"config.json": b'{"architectures": ["BertModel"]}'}, ("BertModel", "does not write text")),
        ({"config.json": CONFIG}, ("no safetensors weights",)),
        ({"config.json": CONFIG, "pytorch_model.bin": b"x"}, ("no safetensors weights", "a pickle can run code")),
        ({"config.json": CONFIG, "model.safetensors": b"x"}, ("no tokenizer.json",)),
    ],
    ids=["missing", "empty", "half_a_config", "config_list", "no_decoder", "no_weights", "pickle", "no_tokenizer"],
)
def test_model_folder(files: dict[str, bytes] | None, says: tuple[str, ...], project: Path, slmops: Slmops) -> None:
    folder = project / "models" / "mine"
    if files is not None:
        folder.mkdir(parents=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)
    outcome = slmops("run", "teacher", "--set", f"teacher={{base: {folder}}}", "--set", "train.method=sequence",
                     folder=project)  # fmt: skip
    outcome.refused(2 if files is None else 1, "mine", *says)
    assert outcome.started == ([] if files is None else ["teacher"])
    still_there(slmops, project)


# -------------------------------------------------------------------------------------------------------- endpoints

LABELS = ("refund", "delivery", "password", "greeting")
ENDPOINT_SPEC = """\
name: tiny
task: {type: classification, labels: [refund, delivery, password, greeting]}
data: {path: rows.jsonl, gold: {per_label: 5}, max_examples: 44}
teacher:
  endpoint: {url: "URL", model: m, concurrency: 2, timeout_s: 30, retries: 0}
student:
  model: {layers: 1, hidden: 32, heads: 2, ffn: 64, context: 64}
  tokenizer: {vocabulary: 300}
"""


@pytest.fixture(scope="session")
def asks_endpoint(tmp_path_factory: pytest.TempPathFactory, read_once: Path) -> Path:
    folder = tmp_path_factory.mktemp("endpoint") / "project"
    folder.mkdir()
    shutil.copyfile(read_once / "rows.jsonl", folder / "rows.jsonl")
    (folder / "slmops.yaml").write_text(ENDPOINT_SPEC)
    return folder


@pytest.fixture
def remote(asks_endpoint: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "remote"
    shutil.copytree(asks_endpoint, folder)
    return folder


@contextlib.contextmanager
def desk(folder: Path, faults: Any = (), **more: Any) -> Iterator[StandIn]:
    """A stand-in server at the project's endpoint. `faults` may be a function of the request."""
    stand_in = StandIn(lambda messages: LABELS[len(messages[-1]["content"]) % 4], faults, **more)
    with stand_in.serve() as url:
        (folder / "slmops.yaml").write_text(ENDPOINT_SPEC.replace("URL", url))
        yield stand_in


PROMPTS = 24
"""44 training examples, 5 of each of 4 labels gold: what the teacher is asked."""


def after(count: int, fault: Fault) -> Callable[[Any], Fault | None]:
    """The first `count` requests are answered, all later ones fail."""
    return lambda request: fault if request.number >= count else None


@pytest.mark.parametrize(
    ("fault", "answered", "says"),
    [
        (Fault("status", status=401), 0, ("401", "key")),
        (Fault("status", status=404), 0, ("404",)),
        (Fault("status", status=429), 9, ("429",)),
        (Fault("status", status=429, headers={"retry-after": "7200"}), 9, ("asks to wait 120 minutes",)),
        (Fault("status", status=500), 9, ("500",)),
        (Fault("garbage"), 9, ("127.0.0.1",)),
        (Fault("html"), 9, ("127.0.0.1",)),
        (Fault("empty"), 9, ("127.0.0.1",)),
        (Fault("cut"), 9, ("cut off",)),
        (Fault("stream"), 9, ("stream",)),
        (Fault("never"), 9, ("no answer in time", "timeout_s")),
    ],
    ids=[
        "401",
        "404",
        "429",
        "429_for_hours",
        "500",
        "garbage",
        "html",
        "empty",
        "half_a_body",
        "half_a_stream",
        "never",
    ],
)
def test_endpoint_fails(fault: Fault, answered: int, says: tuple[str, ...], remote: Path, slmops: Slmops) -> None:
    with desk(remote, after(answered, fault)) as first:
        more = {"status": ("--set", "teacher.endpoint.retries=1"), "never": ("--set", "teacher.endpoint.timeout_s=0.4")}
        outcome = slmops("run", "synthetic", *more.get(fault.kind, ()), folder=remote)
        outcome.refused(1, "http://127.0.0.1", *says, "Every answer that came is kept")
        assert outcome.started == ["data", "answers"]
        assert first.answered == answered
        assert len(first.requests) < 30, "an endpoint that does not work is not asked for everything"
        first._faults = lambda request: None
        asked = len(first.requests)
        again = slmops("run", "synthetic", folder=remote)
        assert again.code == 0, again.err
        assert again.started == ["answers", "synthetic"]
        assert len(first.requests) - asked == PROMPTS - answered, "what was paid for is not asked again"


def test_budget_is_used_up(remote: Path, slmops: Slmops) -> None:
    with desk(remote) as server:
        file = remote / "slmops.yaml"
        price = "price: {input_per_million: 1000, output_per_million: 1000}"
        file.write_text(file.read_text().replace("model: m,", f"model: m, max_output_tokens: 8, {price},"))
        outcome = slmops("run", "synthetic", "--budget", "1.5", folder=remote)
        outcome.refused(1, "the budget of 1.5 is used up", "--budget", "Every answer that came is kept")
        assert outcome.started == ["data", "answers"]
        paid = server.answered
        assert 0 < paid < PROMPTS
        again = slmops("run", "synthetic", "--budget", "1000", folder=remote)
        assert again.code == 0, again.err
        assert server.answered == PROMPTS
        assert len(server.requests) == PROMPTS


def test_nobody_listens(remote: Path, slmops: Slmops) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    file = remote / "slmops.yaml"
    file.write_text(ENDPOINT_SPEC.replace("URL", f"http://127.0.0.1:{port}/v1"))
    outcome = slmops("run", "synthetic", folder=remote)
    outcome.refused(1, f"127.0.0.1:{port}", "no connection", "is the server running")
    assert outcome.started == ["data", "answers"]


@pytest.mark.parametrize(
    ("change", "words", "says"),
    [
        (("model: m", "model: m, api_key_env: NO_SUCH_KEY"), (), ("NO_SUCH_KEY", "is not set", "export NO_SUCH_KEY")),
        (("URL", "api.example.com"), (), ("not an http(s) URL",)),
        (("URL", "https://me:secret@api.example.com/v1"), (), ("a user name or a password",)),
        (("model: m", "model: m, api: azure"), (), ("Azure needs a key",)),
        (("model: m", "model: m, api_key_env: A_KEY"), ("--budget", "5"), ("a budget cannot be held without prices",)),
    ],
    ids=["no_key", "no_url", "password_in_url", "azure_without_key", "budget_without_prices"],
)
def test_endpoint_settings(
    change: tuple[str, str], words: tuple[str, ...], says: tuple[str, ...], remote: Path, slmops: Slmops,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Known before anything starts."""
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    monkeypatch.setenv("A_KEY", "abc")
    (remote / "slmops.yaml").write_text(ENDPOINT_SPEC.replace(*change).replace("URL", "https://api.example.com/v1"))
    outcome = slmops("run", *words, folder=remote)
    outcome.refused(2, *says)
    assert "secret" not in outcome.err + outcome.out
    assert outcome.started == []


# ---------------------------------------------------------------------------------------------- results and bundles


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle whose model runs in memory, with a context of 64 bytes."""
    from slmops import engines

    engine = MemoryEngine(lambda text, sampling: "refund", context_length=64)
    monkeypatch.setattr(engines, "open_engine", lambda folder, threads=1: engine)
    folder = tmp_path / "bundle"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "model.onnx").write_bytes(b"weights")
    file = BundleFile(path="model/model.onnx", size=7, digest=digest_bytes(b"weights"))
    messages = ({"role": "user", "content": "hi"},)
    manifest = Manifest(
        name="tiny", version="1", task={"type": "classification"}, runtime=Runtime(name="memory", version="1"),
        precision="int4", payload=payload_digest((file,)), files=(file,),
        chat_template=ChatTemplate(messages=messages, token_ids=tuple(engine.encode(messages))),
        limits=Limits(context_tokens=64, max_new_tokens=8), verdict="passed", provenance={}, licences={},
    )  # fmt: skip
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    return folder


def damage(folder: Path, how: str) -> None:
    manifest, model = folder / "manifest.json", folder / "model" / "model.onnx"
    if how == "changed":
        model.write_bytes(b"weightz")
    elif how == "missing":
        model.unlink()
    elif how == "added":
        (folder / "model" / "more.bin").write_bytes(b"x")
    elif how == "outside":
        manifest.write_text(manifest.read_text().replace('"model/model.onnx"', '"model/../../model.onnx"'))
    elif how == "half a manifest":
        manifest.write_text(manifest.read_text()[:100])
    elif how == "manifest list":
        manifest.write_text("[]")
    elif how == "later schema":
        manifest.write_text(manifest.read_text().replace('"schema_version":1', '"schema_version":9'))
    elif how == "other tokens":
        manifest.write_text(manifest.read_text().replace('"token_ids":[', '"token_ids":[1,'))


@pytest.mark.parametrize(
    ("how", "code", "says"),
    [
        ("changed", 1, "model/model.onnx is not what the manifest says"),
        ("missing", 1, "model/model.onnx is missing"),
        ("added", 1, "model/more.bin is not in the manifest"),
        ("outside", 1, "do not use this bundle"),
        ("half a manifest", 2, "is not a bundle"),
        ("manifest list", 2, "is not a bundle"),
        ("later schema", 1, "update slmops"),
        ("other tokens", 1, "tokenises otherwise"),
    ],
)
def test_damaged_bundle(how: str, code: int, says: str, bundle: Path, slmops: Slmops) -> None:
    damage(bundle, how)
    outcome = slmops("chat", "--bundle", str(bundle), "hello")
    outcome.refused(code, says)
    assert outcome.out == ""


def test_message_longer_than_the_context(bundle: Path, slmops: Slmops) -> None:
    assert slmops("chat", "--bundle", str(bundle), "hello").out == "> hello\nrefund\n"
    outcome = slmops("chat", "--bundle", str(bundle), "hello", "x" * 80)
    outcome.refused(1, "the context of the model holds 64", "shorten the prompt")
    assert outcome.out == "> hello\nrefund\n"


def predictions(path: Path, ids: list[int]) -> Path:
    path.write_bytes(
        jsonl(
            [
                {"id": f"{n:016x}", "prompt": f"p{n}", "gold": "a", "answer": "a", "finished": True, "tokens": 2}
                for n in ids
            ]
        )
    )
    return path


def test_compare_different_examples(project: Path, slmops: Slmops) -> None:
    a = predictions(project / "a.jsonl", list(range(20)))
    b = predictions(project / "b.jsonl", list(range(40, 60)))
    slmops("compare", str(a), str(b), folder=project).refused(2, "a.jsonl", "b.jsonl")
    bad = project / "bad.jsonl"
    bad.write_bytes(a.read_bytes() + b"{half\n")
    slmops("compare", str(a), str(bad), folder=project).refused(2, "bad.jsonl:21")


# --------------------------------------------------------------------------------------- with models, as users run it


def real(*words: str, folder: Path) -> Outcome:
    """A process of its own, its steps in further processes."""
    done = subprocess.run(
        [sys.executable, "-m", "slmops.cli.main", *words, "-f", str(folder)],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    started = [line.split("] ")[1].split(":")[0] for line in done.stderr.splitlines() if line.startswith("[")]
    return Outcome(done.returncode, done.stdout, done.stderr, started)


@pytest.mark.slow
def test_prompt_longer_than_the_context_when_training(project: Path) -> None:
    outcome = real("run", "teacher", "--set", "teacher.model.context=8", folder=project)
    outcome.refused(2, "longer than the model's context", "8 fit", "raise the model's context")
    assert "data/teacher.jsonl:1: " in outcome.message
    assert outcome.started == ["teacher-tokenizer", "teacher"]
    again = real("run", "teacher", "--set", "teacher.train.max_steps=2", folder=project)
    assert again.code == 0, again.err
    assert again.started == ["teacher"]


@pytest.mark.slow
def test_bad_row_in_a_real_process(project: Path, slmops: Slmops) -> None:
    good = (project / "rows.jsonl").read_bytes()
    (project / "rows.jsonl").write_bytes(lines({17: b'{"messages": ['}))
    outcome = real("run", folder=project)
    outcome.refused(2, "rows.jsonl:17: bad JSON")
    assert outcome.started == ["data"]
    (project / "rows.jsonl").write_bytes(good)
    still_there(slmops, project)


@pytest.mark.slow
def test_endpoint_down_in_a_real_process(remote: Path) -> None:
    with desk(remote, after(9, Fault("status", status=503))) as server:
        outcome = real("run", "synthetic", folder=remote)
        outcome.refused(1, "503", "Every answer that came is kept")
        server._faults = lambda request: None
        assert real("run", "synthetic", folder=remote).started == ["answers", "synthetic"]
        assert server.answered == PROMPTS
