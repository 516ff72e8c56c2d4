"""What a search may try: every mistake is named with its line, and `--set` lines mean what the search ran."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from slmops.errors import SpecError
from slmops.flow.project import Project, load
from slmops.flow.search import no_pruning
from slmops.flow.search_space import MOST, dimensions, override, shown, with_values

HEAD = """\
name: tried
task: {type: classification}
data: {path: rows.jsonl}
student:
  model: {layers: 1, hidden: 32, heads: 2, context: 64}
  tokenizer: {vocabulary: 400}
train: {epochs: 3}
search:
"""


def project(folder: Path, search: str, head: str = HEAD, overrides: tuple[str, ...] = ()) -> Project:
    (folder / "slmops.yaml").write_text(head + search)
    return load(folder, overrides)


def parameter(key: str, given: str) -> str:
    return f"  trials: 3\n  parameters:\n    {key}: {given}\n"


@pytest.mark.parametrize(
    ("key", "given", "says"),
    [
        ("train.lerning_rate", "{low: 0.1, high: 1}", "no such key (did you mean train.learning_rate?)"),
        ("learning_rate", "{low: 0.1, high: 1}", "did you mean train.learning_rate?"),
        ("train.learning_rate", "{low: -1, high: 1}", "-1.0: must be greater than 0"),
        ("train.learning_rate", "{low: 1, high: 0.1}", "low (1) must be less than high (0.1)"),
        ("train.learning_rate", "{low: 0, high: 0.1, log: true}", "low must be above 0"),
        ("train.learning_rate", "{low: 0.1}", "give choices, or low and high"),
        ("train.learning_rate", "{low: 0.1, high: 1, logg: true}", "unknown key (did you mean log?)"),
        ("train.learning_rate", "{choices: [0.1], low: 0.1}", "not both"),
        ("train.learning_rate", "{choices: []}", "choices is empty"),
        ("train.learning_rate", "{choices: [0.1, 0.1]}", "the same choice twice"),
        ("train.batch_size", "{low: 1.5, high: 8}", "takes whole numbers, not low 1.5"),
        ("train.batch_size", "{low: 0, high: 8}", "0: must be greater than or equal to 1"),
        ("train.method", "{low: 1, high: 2}", "takes no number (give choices)"),
        ("train.method", "{choices: [sequence, logitz]}", "did you mean logits?"),
        ("train.method", "{choices: [sequence, logits]}", "logits: logits needs a teacher"),
        ("student.model.heads", "{choices: [2, 3]}", "3: student.model: hidden (32) must be a multiple of heads (3)"),
        ("student.model", "{choices: [{layers: 1, hiden: 64}]}", "did you mean hidden?"),
        ("evaluate.max_new_tokens", "{choices: [1, 64]}", "judged in different ways"),
        ("data.path", "{choices: [a.csv, b.csv]}", "judged on different data"),
        ("data", "{choices: [{path: rows.jsonl}, {path: other.jsonl}]}", "judged on different data"),
        ("adapters.refunds.train.epochs", "{low: 1, high: 2}", "judged by the student alone"),
        ("task.instruction", "{choices: [a, b]}", "asked different things"),
        ("search.trials", "{choices: [1, 2]}", "does not search itself"),
    ],
)
def test_each_mistake_is_named_at_its_line(tmp_path: Path, key: str, given: str, says: str) -> None:
    with pytest.raises(SpecError) as caught:
        project(tmp_path, parameter(key, given))
    assert len(caught.value.problems) == 1
    problem = str(caught.value.problems[0])
    assert problem.startswith("slmops.yaml:11: search.parameters.") and says in problem, problem


@pytest.mark.parametrize(
    ("search", "says"),
    [
        ("  parameters: {}\n", "slmops.yaml:8: search: parameters is empty"),
        ("  objectives: [{metric: accuracy}]\n", "search.parameters: is missing"),
        (
            parameter("train.epochs", "{low: 1, high: 2}") + "  objectives: [{metric: acuracy}]\n",
            "did you mean accuracy?",
        ),
        (
            parameter("train.epochs", "{low: 1, high: 2}") + "  objectives: [{metric: field_f1}]\n",
            "does not fit a task",
        ),
        (
            parameter("train.epochs", "{low: 1, high: 2}") + "  objectives: [{metric: valid}, {metric: valid}]\n",
            "twice",
        ),
        (parameter("train", "{choices: [{epochs: 1}]}") + "    train.epochs: {low: 1, high: 2}\n", "searched too"),
        (
            parameter("student.model.hidden", "{choices: [32, 96]}") + "    student.model.heads: {choices: [2, 3]}\n",
            "search.parameters: student.model.heads: 3, student.model.hidden: 32: student.model: hidden (32) must be",
        ),
        (
            parameter("train.epochs", "{low: 1, high: 2}"),
            "data.splits.validation: is empty, and trials are judged on validation data",
        ),
    ],
)
def test_mistakes_of_several_keys(tmp_path: Path, search: str, says: str) -> None:
    head = HEAD.replace("rows.jsonl}", "rows.jsonl, splits: {validation: 0.0}}") if "validation data" in says else HEAD
    with pytest.raises(SpecError) as caught:
        project(tmp_path, search, head)
    assert says in str(caught.value.problems[0]), caught.value


def test_size_alone_needs_no_validation_data(tmp_path: Path) -> None:
    head = HEAD.replace("rows.jsonl}", "rows.jsonl, splits: {validation: 0.0}}")
    search = parameter("student.model.layers", "{low: 1, high: 2}") + "  objectives: [{metric: parameters}]\n"
    assert project(tmp_path, search, head).spec.search is not None


def test_a_bad_set_of_the_command_line_is_named_as_that(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"--set: search\.parameters\.train\.epochs: low \(3\)"):
        override = "search.parameters={train.epochs: {low: 3, high: 2}}"
        project(tmp_path, parameter("train.epochs", "{low: 1, high: 2}"), overrides=(override,))


def test_kinds_follow_the_key_and_not_the_numbers(tmp_path: Path) -> None:
    search = (
        parameter("train.epochs", "{low: 1, high: 4}")
        + "    train.batch_size: {low: 8, high: 64, step: 8}\n    student.tokenizer.vocabulary: {low: 300, high: 500}\n"
        + "    train.patience: {choices: [0, 4]}\n"
    )
    kinds = {d.key: (d.kind, d.ends) for d in dimensions(project(tmp_path, search).spec)}
    assert kinds == {
        "train.epochs": ("number", [1.0, 4.0]),
        "train.batch_size": ("whole", [8, 64]),
        "student.tokenizer.vocabulary": ("whole", [300, 500]),
        "train.patience": ("choice", [0, 4]),
    }


def test_many_parameters_are_looked_at_one_by_one(tmp_path: Path) -> None:
    """More combinations than are looked at: a value that never works is still found."""
    fields = ("epochs", "learning_rate", "warmup", "weight_decay", "dropout", "label_smoothing", "clip", "holdout")
    lines = "".join(f"    train.{name}: {{low: 0.1, high: 0.5}}\n" for name in fields)
    assert 2 ** len(fields) > MOST
    search = f"  parameters:\n{lines}"
    assert len(dimensions(project(tmp_path, search).spec)) == len(fields)
    with pytest.raises(SpecError) as caught:
        project(
            tmp_path, search.replace("train.dropout: {low: 0.1, high: 0.5}", "train.dropout: {low: 0.1, high: 1.5}")
        )
    assert "search.parameters.train.dropout: 1.5: must be less than or equal to 1" in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {"train.epochs": 2.5, "student.model.layers": 3},
        {"train.method": "sequence", "student.model": {"layers": 2, "hidden": 64, "heads": 2}},
        {"student.model": {"layers": 2}, "student.model.hidden": 64},
        {"data.gold.per_label": 7, "synthesize.filters.valid": False},
        {"convert.rounding": None, "train.learning_rate": 1e-05, "task.instruction": "yes: no # é"},
    ],
)
def test_values_are_what_set_makes_of_them(tmp_path: Path, values: dict[str, Any]) -> None:
    plain = project(tmp_path, "", HEAD.replace("search:\n", ""))
    ordered = sorted(values.items(), key=lambda item: item[0].count("."))
    assert load(tmp_path, [override(key, value) for key, value in ordered]).spec == with_values(plain.spec, values)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


@given(VALUES)
def test_shown_values_read_back(value: Any) -> None:
    read = YAML(typ="safe").load(shown(value))
    assert read == value and (isinstance(value, list | dict) or type(read) is type(value))


@pytest.mark.parametrize(
    ("search", "says"),
    [
        (parameter("train.epochs", "{low: 1, high: 2}"), ""),
        (
            parameter("train.holdout", "{low: 0.1, high: 0.2}"),
            "train.holdout changes what training losses are counted on",
        ),
        (parameter("student.tokenizer", "{choices: [{vocabulary: 300}]}"), "student.tokenizer changes"),
        (parameter("train.epochs", "{low: 1, high: 2}") + '  pruning: "off"\n', "search.pruning is off"),
        (
            parameter("train.epochs", "{low: 1, high: 2}") + "  objectives: [{metric: accuracy}, {metric: file_mb}]\n",
            "several objectives",
        ),
    ],
)
def test_when_trainings_are_not_given_up(tmp_path: Path, search: str, says: str) -> None:
    reason = no_pruning(project(tmp_path, search))
    assert (says in reason) if says else not reason
