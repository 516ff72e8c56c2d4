"""The part of a plan that `adapters:` asks for: several tasks over one base, each a step of its own, and one model of all.

student-base ─┬─ adapter-NAME (on data-NAME) ─ … ─┬─ student-adapters ─ predict-adapter-NAME ─ adapters (scores)
              └───────────────────────────────────┘

The same again for each form of `convert.also`, with its name behind: `student-adapters-gguf-fp16` and so on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from slmops.core import forms
from slmops.core.spec import AdapterTask, Data, Spec, Task, Train, Training
from slmops.errors import Problem

TUNINGS = ("lora", "rslora", "qlora")
"""Those whose additions have the form W + scale · B·A, which a runtime can switch on and off."""


class Builder(Protocol):
    """What of the planner's builder is used here."""

    def add(self, id: str, method: str, params: Mapping[str, Any], about: str, inputs: Mapping[str, str] | None = None, *,
            seed: int | None = None, threads: int = 0) -> str: ...  # fmt: skip

    def prepare(self, id: str, data: Data, task: Task, needs_teacher: bool, about: str) -> str: ...

    def augmented(
        self, model: str, files: list[str], inputs: Mapping[str, str], data: Data
    ) -> tuple[list[str], dict[str, str]]: ...


def check(spec: Spec) -> list[Problem]:
    """Whether the adapters fit the project and the runtime."""
    found = []
    fixed = [form for form in spec.convert.also if not forms.FORMATS[forms.split(form)[0]].adapters]
    if spec.adapters and fixed:
        can = " and ".join(name for name, format in forms.FORMATS.items() if format.adapters)
        said = f"asks for {fixed[0]}, in which adapters cannot be switched"
        found.append(Problem(said, f"take it out; adapters can be switched in {can}", path="convert.also"))
    if spec.adapters and spec.student.base is None:
        found.append(Problem("need a base that they share", "give student.base, an existing model", path="adapters"))
    for name, one in spec.adapters.items():
        train, task = _train(spec, one), one.task or spec.task
        here = f"adapters.{name}.train" if one.train else "train"
        if train.tuning not in TUNINGS:
            hint = f"give adapters.{name}.train.tuning: {', '.join(TUNINGS[:-1])} or {TUNINGS[-1]}"
            said = f"is {train.tuning}, but adapter {name} has to be low-rank additions to the base"
            found.append(Problem(said, hint, path=f"{here}.tuning"))
        if train.lora.embeddings:
            said = f"is set, but adapter {name} shares the embedding of the base with the others"
            found.append(Problem(said, f"take it out of adapters.{name}.train.lora", path=f"{here}.lora.embeddings"))
        if train.method != "sequence":
            said = f"is {train.method}, but adapter {name} has no teacher"
            found.append(Problem(said, f"give adapters.{name}.train.method: sequence", path=f"{here}.method"))
        if train.quantization_aware != "off":
            said = f"is set, but adapter {name} is not rounded, and the base is rounded once for all"
            hint = f"take it out of adapters.{name}.train"
            found.append(Problem(said, hint, path=f"{here}.quantization_aware"))
        if one.data.path.strip() in ("", ".", "./"):
            hint = "give a file, a folder of its own, or hf:ORG/NAME"
            found.append(Problem("names no data", hint, path=f"adapters.{name}.data.path"))
        if one.data.augment is not None and task.type != "extraction":
            said = "swaps values between messages and JSON answers, which only extraction has"
            found.append(Problem(said, "take it out", path=f"adapters.{name}.data.augment"))
    return found


def steps(spec: Spec, builder: Builder) -> None:
    """Add the steps to a plan that has `student-base` already."""
    models = {"base": "student-base"}
    data, params = {}, dict[str, Any]()
    for name, one in spec.adapters.items():
        task = one.task or spec.task
        about = f"read, split, keep test data apart, for adapter {name}"
        data[f"data.{name}"] = builder.prepare(f"data-{name}", one.data, task, False, about)
        inputs = {"data": f"data-{name}", "base": "student-base"}
        files, inputs = builder.augmented(f"adapter-{name}", ["data/gold.jsonl"], inputs, one.data)
        train = _train(spec, one)
        training = Training.model_validate({k: getattr(train, k) for k in Training.model_fields}, strict=False)
        params = {
            "training": training.model_dump(mode="json"),
            "files": files,
            "architecture": None,
            "validation": "data/validation.jsonl",
        }
        about = f"train adapter {name} ({train.tuning}) over the base"
        models[f"adapter.{name}"] = builder.add(f"adapter-{name}", "train.sft", params, about, inputs)
    convert = spec.convert.onnx(spec.convert.precision)
    convert["rounding"] = convert["rounding"] or "search"
    about = f"the base and its adapters to ONNX Runtime GenAI, {spec.convert.precision}"
    builder.add("student-adapters", "convert.onnx_adapters", convert, about, models | data, seed=0, threads=1)
    _judge(spec, builder, data, "", "onnx_genai")
    for form in spec.convert.also:
        name, kind = forms.split(form)
        format = forms.FORMATS[name]
        params = {
            "base": kind, "fidelity_prompts": spec.convert.fidelity_prompts, "min_token_agreement": spec.convert.min_token_agreement,
        }  # fmt: skip
        about = f"the base and its adapters to {format.name}, {kind}"
        builder.add(f"student-adapters-{form}", format.adapters, params, about, models | data, seed=0, threads=1)
        _judge(spec, builder, data, f"-{form}", format.runtime)


def _judge(spec: Spec, builder: Builder, data: dict[str, str], form: str, runtime: str) -> None:
    """Predictions of every adapter of `student-adapters` with this ending, and their scores."""
    predictions = {}
    for name in spec.adapters:
        inputs = {"model": f"student-adapters{form}", "data": f"data-{name}"}
        params: dict[str, Any] = {
            "max_new_tokens": spec.evaluate.max_new_tokens, "max_examples": spec.evaluate.max_examples, "runtime": runtime,
            "adapter": name,
        }  # fmt: skip
        if runtime == "llama_cpp" and spec.evaluate.kv_cache:
            params["kv_cache"] = spec.evaluate.kv_cache
        about = f"adapter {name} on its test data"
        predictions[f"predictions.{name}"] = builder.add(
            f"predict-adapter-{name}{form}", "evaluate.predict", params, about, inputs, seed=0, threads=1
        )
    tasks = {name: (one.task or spec.task).model_dump(mode="json") for name, one in spec.adapters.items()}
    params = {"tasks": tasks, "confidence": spec.evaluate.confidence, "resamples": spec.evaluate.resamples}
    builder.add(f"adapters{form}", "evaluate.adapters", params, "scores of the adapters", predictions | data, threads=1)


def _train(spec: Spec, one: AdapterTask) -> Train:
    return one.train or spec.train
