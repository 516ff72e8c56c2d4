"""The chain that a plan compares, how its hops are judged, and what `slmops fidelity` says of folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slmops.core.fidelity import Link, anchor, judge, ordered, verdict
from slmops.core.report import Meeting
from slmops.flow.project import load
from tests.flow.test_project import GOOD, write


def planned(tmp_path: Path, *overrides: str, text: str = GOOD) -> dict[str, dict[str, Any]]:
    plan = load(write(tmp_path, text), overrides).plan()
    step = next(step for step in plan if step.id == "fidelity")
    assert {f"model.{link['name']}" for link in step.params["links"]} <= set(step.inputs)
    return {link["name"]: link for link in step.params["links"]}


def test_a_plan_compares_every_form_with_the_one_that_it_was_made_from(tmp_path: Path) -> None:
    links = planned(
        tmp_path, "compress.vocabulary=seen", "compress.quantization=gptq", "convert.also=[gguf-fp16,gguf-q4_0]"
    )
    assert {name: (link["parent"], link["expects"], link["runtime"]) for name, link in links.items()} == {
        "teacher": (None, "learned", "torch"),
        "teacher-fp32": ("teacher", "exact", "onnx_genai"),
        "student": ("teacher", "learned", "torch"),
        "student-trimmed": ("student", "exact", "torch"),
        "student-fp32": ("student-trimmed", "exact", "onnx_genai"),
        "student-rounded": ("student-trimmed", "rounded", "torch"),
        "student-int4": ("student-rounded", "rounded", "onnx_genai"),
        "student-gguf-fp16": ("student-trimmed", "exact", "llama_cpp"),
        "student-gguf-q4_0": ("student-rounded", "rounded", "llama_cpp"),
    }
    assert [name for name, link in links.items() if link["near"]] == ["student-rounded"]


def test_what_pruning_leaves_and_what_learns_again_are_hops_of_their_own(tmp_path: Path) -> None:
    links = planned(tmp_path, "student.model.layers=2", "compress.prune={layers: 1, sparsity: 0.5, recover: {}}")
    chain = ["teacher", "student", "student-shortened", "student-sparse", "student-recovered"]
    assert [links[name]["parent"] for name in chain] == [None, *chain[:-1]]
    assert {links[name]["expects"] for name in chain} == {"learned"}
    assert (links["student-fp32"]["parent"], links["student-fp32"]["expects"]) == ("student-recovered", "exact")
    assert "unpruned-int4" not in links


def test_a_merged_adapter_is_a_hop_of_its_own(tmp_path: Path) -> None:
    text = GOOD[: GOOD.index("teacher:")] + "student: {base: hf:org/base}\ntrain: {tuning: lora}\n"
    links = planned(tmp_path, text=text)
    assert links["student-adapter"]["adapter"] and links["student-adapter"]["parent"] is None
    assert (links["student"]["parent"], links["student"]["expects"]) == ("student-adapter", "exact")
    assert "student-adapter" not in planned(tmp_path, "train.tuning=adapter", text=text)


def test_a_teacher_that_is_told_the_task_has_prompts_of_its_own(tmp_path: Path) -> None:
    text = GOOD.replace(GOOD[GOOD.index("teacher:") : GOOD.index("student:")], "teacher: {base: hf:org/base}\n")
    links = planned(tmp_path, "student.tokenizer.vocabulary=400", text=text)
    assert links["teacher"]["guided"] and links["teacher-fp32"]["guided"] and not links["student"]["guided"]


LINKS = (
    Link(name="teacher"), Link(name="student", parent="teacher"), Link(name="fp32", parent="student", expects="exact"),
    Link(name="rounded", parent="student", expects="rounded"), Link(name="int4", parent="rounded", expects="rounded"),
)  # fmt: skip


def test_parents_come_first_and_answers_are_of_the_last_that_learned() -> None:
    assert [link.name for link in ordered(LINKS[::-1])] == ["teacher", "student", "rounded", "int4", "fp32"]
    assert anchor(LINKS[::-1]).name == "student"
    assert anchor((Link(name="a"), Link(name="b", parent="a", expects="exact"))).name == "a"
    with pytest.raises(ValueError, match="student, which is not there"):
        ordered(LINKS[2:])
    with pytest.raises(ValueError, match="circle"):
        ordered((Link(name="a", parent="b"), Link(name="b", parent="a")))


def meeting(**changes: Any) -> Meeting:
    whole: dict[str, Any] = {
        "prompts": 8, "compared": 8, "positions": 40, "token_agreement": 1.0, "kept": 1.0, "mean_kl": 0.0, "same_answers": 1.0,
        "template_equal": 1.0,
    } | changes  # fmt: skip
    return Meeting(**whole)


DIVERGED = {"id": "abc", "step": 2, "parent": "yes", "child": "no"}


@pytest.mark.parametrize(
    ("expects", "changes", "broke", "says"),
    [
        ("exact", {}, "", "100.0 % of next tokens are the same"),
        ("exact", {"token_agreement": 0.98}, "weights", "less than the 99 %"),
        ("exact", {"token_agreement": 0.5, "first_divergence": DIVERGED}, "weights", "prompt abc, token 2: 'no' instead of 'yes'"),
        ("rounded", {"token_agreement": 0.6, "kept": 0.9}, "", "60.0 %"),
        ("rounded", {"token_agreement": 0.6, "kept": 0.8}, "weights", "keep 80.0 % of the probability, less than 85 %"),
        ("rounded", {"furthest_weight": {"name": "a.b", "distance": 1.4}}, "weights", "a.b is not the matrix that it was"),
        ("rounded", {"furthest_weight": {"name": "a.b", "distance": 0.2}}, "", ""),
        ("exact", {"template_equal": 0.9}, "template", "other tokens"),
        ("exact", {"token_agreement": None, "kept": None, "mean_kl": None}, "nothing compared", "no prompt could be"),
        ("learned", {"token_agreement": 0.1, "kept": 0.1, "template_equal": 0.0}, "", "10.0 %"),
        ("learned", {"token_agreement": None, "kept": None}, "", "cannot be compared"),
    ],
)  # fmt: skip
def test_a_hop_is_judged_by_what_it_may_change(expects: Any, changes: dict[str, Any], broke: str, says: str) -> None:
    hop = judge(Link(name="b", parent="a", expects=expects), meeting(**changes), 0.99, 0.85)
    assert hop.broke == broke and says in hop.says and hop.says.startswith("a → b: ")


def test_the_verdict_names_the_hops() -> None:
    whole = judge(LINKS[2], meeting(), 0.99, 0.85).model_dump()
    lost = judge(LINKS[3], meeting(kept=0.1), 0.99, 0.85).model_dump()
    assert verdict([whole]) == "no hop broke the model"
    assert verdict([whole, lost]) == "student → rounded: this hop broke the model"
