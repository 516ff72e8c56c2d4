"""The chain that `evaluate.fidelity` follows: from the teacher to every form of the student, by the steps that make them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slmops.core.fidelity import Link
from slmops.core.spec import Spec
from slmops.core.step import Step
from slmops.core.words import Expect

LEFT_OUT = ("few", "all", "unpruned", "whole", "nearest")
"""Variants that are no step on the way to what ships."""
FULL = ("fp32", "fp16")
"""Precisions in which a conversion changes nothing that shows."""
SAME = ("compress.vocabulary",)
"""Methods whose result answers as what it was made from, for texts that both can write."""
ROUNDING = ("compress.gptq", "compress.awq", "compress.autoround")
NEAR = ("compress.gptq", "compress.autoround")
"""Of these, those that leave each weight about where it was."""
ADAPTER = "student-adapter"


def expects(step: Step) -> Expect:
    """What a step may change of the model that it takes."""
    if step.method.startswith("convert."):
        return "exact" if step.params.get("precision") in FULL else "rounded"
    if step.method in SAME or step.params.get("round") is False:
        return "exact"
    return "rounded" if step.method in ROUNDING else "learned"


def _parent(step: Step, known: Mapping[str, Step]) -> str | None:
    """The step whose model this one was made from; a student's is its teacher."""
    if "model" in step.inputs:
        return step.inputs["model"]
    if step.id == "student":
        return "teacher" if "teacher" in known else None
    base = step.inputs.get("base")
    return base if base is not None and base.startswith("student-") and base != "student-base" else None


def chain(
    spec: Spec, steps: Sequence[Step], models: Mapping[str, tuple[str, str]], guided: bool
) -> tuple[list[Link], dict[str, str]]:  # fmt: skip
    """Links, and the inputs of `evaluate.fidelity` that they are.

    Args:
        steps: of the plan so far.
        models: variant to the step that makes it and its runtime.
        guided: whether the teacher is told the task in words.
    """
    known = {step.id: step for step in steps}
    runtimes = dict(models.values())
    found: dict[str, Link] = {}
    inputs: dict[str, str] = {}

    def add(id: str) -> None:
        if id in found:
            return
        step, parent = known[id], _parent(known[id], known)
        if parent is not None:
            add(parent)
        told = guided and id.startswith("teacher")
        kind: Expect = expects(step)
        if id == "student" and spec.train.tuning in ("lora", "rslora", "dora", "qlora") and "base" in step.inputs:
            found[ADAPTER] = Link(name=ADAPTER, parent=parent, adapter=True)
            inputs.update({f"model.{ADAPTER}": id, f"base.{ADAPTER}": step.inputs["base"]})
            parent, kind = ADAPTER, "exact"
        runtime: Any = runtimes.get(id, "torch")
        near = step.method in NEAR and "widths" not in step.inputs  # with 2 bits a weight may end far off
        found[id] = Link(name=id, parent=parent, expects=kind, runtime=runtime, guided=told, near=near)
        inputs[f"model.{id}"] = id

    for variant, (step, _runtime) in models.items():
        if variant.partition("-")[0] not in LEFT_OUT:
            add(step)
    return list(found.values()), inputs
