"""What a run will cost, before it starts: seconds, disk, memory, downloads.

The time of a training is estimated by `slmops.train.estimate` from parameters and tokens; other steps by what they took on
one small machine. These are orders of magnitude, shown with `~`, never promises; only the memory of trainings and of teachers'
passes is near (`slmops.flow.memory`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from slmops.core.spec import PREFERENCE, Architecture
from slmops.flow import methods
from slmops.flow.memory import counts, pass_of, plan_of
from slmops.flow.state import State, Status
from slmops.store import environments
from slmops.train.estimate import estimate as training_estimate
from slmops.train.fit import Plan
from slmops.train.pass_memory import PassPlan

RUNTIME_BYTES = 700_000_000
"""Resident bytes of Python with torch and transformers loaded."""

FIXED_SECONDS = {
    "data.prepare": 8.0, "train.tokenizer": 3.0, "data.filter": 5.0, "data.augment": 5.0, "data.answer": 15.0, "data.generate": 30.0,
    "data.join_prompts": 1.0,
    "convert.onnx_genai": 8.0, "evaluate.predict": 10.0, "evaluate.measure": 30.0, "evaluate.report": 5.0,
    "bundle.assemble": 1.0, "train.cache_logits": 20.0, "train.cache_aligned": 20.0, "catalog.fetch": 1.0,
    "compress.vocabulary": 3.0, "compress.gptq": 10.0, "compress.depth": 10.0, "compress.width": 10.0,
    "compress.sparsegpt": 10.0, "compress.wanda": 10.0, "convert.gguf": 6.0,
    "convert.mlx": 6.0, "convert.openvino": 6.0,
    "convert.litert": 40.0,
    "convert.executorch": 60.0,
    "convert.safetensors": 5.0,
    "compress.awq": 10.0, "compress.autoround": 120.0, "compress.sensitivity": 30.0,
    "convert.onnx_adapters": 12.0, "evaluate.fidelity": 15.0, "evaluate.adapters": 3.0,
}  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """Seconds of wall clock, bytes of disk and of memory at the peak, names of what is downloaded."""

    seconds: float = 0.0
    disk_bytes: float = 0.0
    memory_bytes: float = 0.0
    downloads: tuple[str, ...] = ()
    unknown: bool = False

    def to_json(self) -> dict[str, Any]:
        """For `plan --json`."""
        return {
            "seconds": round(self.seconds, 1),
            "disk_bytes": round(self.disk_bytes),
            "memory_bytes": round(self.memory_bytes),
            "downloads": list(self.downloads),
            "unknown": self.unknown,
        }


def total(costs: Sequence[Cost]) -> Cost:
    """Seconds and disk add up; memory is the largest."""
    return Cost(
        sum(c.seconds for c in costs),
        sum(c.disk_bytes for c in costs),
        max((c.memory_bytes for c in costs), default=0.0),
        tuple(dict.fromkeys(name for c in costs for name in c.downloads)),
        any(c.unknown for c in costs),
    )


def estimate(state: State, status: Status, survey: Sequence[Status]) -> Cost:
    """The cost of one step."""
    if status.state == "cached":
        return Cost()
    step = status.step
    downloads = []
    for value in (step.params.get("model"), (step.params.get("data") or {}).get("path")):
        if isinstance(value, str) and value.startswith("hf:"):
            downloads.append(value)
    environment = methods.get(step.method).DECLARATION.environment
    if environment is not None and not environments.ready(environment):
        packages = (
            f"the packages of the environment {environment.name} ({environment.size / 1e9:.1f} GB on the disk, once)"
        )
        return Cost(FIXED_SECONDS.get(step.method, 0.0), 1e6, RUNTIME_BYTES, (*downloads, packages), bool(downloads))
    passed = pass_of(state, step, survey, _examples(state, status, survey))
    if passed is not None:
        return Cost(FIXED_SECONDS[step.method], 1e6, passed.memory().peak, tuple(downloads), bool(downloads))
    if not step.method.startswith("train.") or step.params.get("training") is None:
        return Cost(FIXED_SECONDS.get(step.method, 0.0), 1e6, RUNTIME_BYTES, tuple(downloads), bool(downloads))
    examples = _examples(state, status, survey)
    plan = plan_of(state, step, survey, examples)
    if plan is None:
        return Cost(0.0, 0.0, RUNTIME_BYTES, unknown=True)
    needed = plan.memory().peak
    if not plan.scratch:
        return Cost(0.0, 24.0 * plan.shape.parameters, needed, unknown=True)
    architecture = Architecture.model_validate(step.params["architecture"], strict=False)
    guess = training_estimate(
        architecture, plan.shape.vocabulary, plan.training, examples or 1, threads=state.threads(step),
        answers=2 if step.method.removeprefix("train.") in PREFERENCE else 1,
    )  # fmt: skip
    disk = guess.disk_bytes + guess.model_bytes
    return Cost(guess.seconds if examples is not None else 0.0, disk, needed, unknown=examples is None)


def trainings(state: State, survey: Sequence[Status]) -> list[Plan | PassPlan]:
    """The sizes of the trainings and teachers' passes that are to run, as far as known."""
    plans = [
        of(state, status.step, survey, _examples(state, status, survey))
        for status in survey
        for of in (plan_of, pass_of)
        if status.state == "run"
    ]
    return [plan for plan in plans if plan is not None]


def _examples(state: State, status: Status, survey: Sequence[Status]) -> int | None:
    """How many examples the step will train on, if the data step is there to tell."""
    known = counts(state, status.step, survey)
    if not known:
        return None
    names = {
        "data/teacher.jsonl": "teacher",
        "data/gold.jsonl": "gold",
        "data/oracle.jsonl": "oracle",
        "synthetic/train.jsonl": "pool",
    }
    files = status.step.params.get("files", [])
    found = sum(known.get(names.get(name, ""), 0) for name in files)
    if "augmented/train.jsonl" in files:
        augmented = next(s.step for s in survey if s.step.id == status.step.inputs["augmented"])
        found *= 1 + int(augmented.params["augment"]["copies"])
    return found
