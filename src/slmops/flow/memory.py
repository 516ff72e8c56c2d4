"""Whether the trainings and the teachers' passes of a plan fit into this machine's memory, asked before any of them starts.

Shapes come from the steps themselves, or from the config.json of a model that is there. Lengths of examples come from the data
step's texts once it has run, and from a usual message before that; a training looks again at its own tokens before it
builds its model (`slmops.train.sft`). On a machine with a GPU nothing is refused: the weights are not in this memory then.
"""

from __future__ import annotations

import functools
import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from slmops.core.spec import Architecture, Spec, TokenizerSpec, Train, Training
from slmops.core.step import Step
from slmops.errors import Problem
from slmops.flow.methods import bf16
from slmops.flow.state import State, Status
from slmops.store.files import read_json
from slmops.train.available import available
from slmops.train.fit import Plan
from slmops.train.memory import Load
from slmops.train.pass_memory import Load as PassLoad
from slmops.train.pass_memory import PassPlan, Settings
from slmops.train.shape import Shape, lower_bytes

CHARACTERS = 3.5
"""Characters of a token, roughly; marks of the chat template are counted apart."""
MARKS = 8.0
USUAL = (16.0, 8.0)
"""Tokens of prompt and answer of a short message, where no data is there to look at."""
SAMPLE = 2000
"""Examples whose lengths are looked at, of each file."""


PASSES: dict[str, Literal["logits", "aligned"]] = {
    "train.cache_logits": "logits",
    "train.cache_aligned": "aligned",
}
"""Methods in which a teacher leaves its distributions."""
SETTINGS = ("batch_size", "max_length", "samples", "selection", "precision")


def shape_of(state: State, step: Step, survey: Sequence[Status]) -> Shape | None:
    """The shape of the model that a step trains; None while nobody knows it."""
    by_id = {status.step.id: status for status in survey}
    architecture = step.params.get("architecture")
    if architecture is not None:
        tokenizer = by_id.get(step.inputs.get("tokenizer", ""))
        wanted = tokenizer.step.params.get("vocabulary") if tokenizer else None
        vocabulary = int(wanted or TokenizerSpec().vocabulary)
        return Shape.of(Architecture.model_validate(architecture, strict=False), vocabulary)
    folder = folder_of(state, step.inputs.get("base", ""), survey)
    if folder is not None:
        return Shape.of_folder(folder)
    made = by_id.get(step.inputs.get("base", ""))
    while made and made.step.method.startswith("compress."):  # what is left of a model is no larger than it
        made = by_id.get(made.step.inputs["model"])
    return shape_of(state, made.step, survey) if made and made.step.params.get("training") is not None else None


def folder_of(state: State, id: str, survey: Sequence[Status]) -> Path | None:
    """Where the model that a step makes or fetches is, if it is there already."""
    status = next((status for status in survey if status.step.id == id), None)
    if status is None:
        return None
    if status.output is not None:
        return state.store.path(status.output)
    source = status.step.sources.get("model")
    return state.project.resolve(source) if source else None


def teacher_of(state: State, step: Step, survey: Sequence[Status], name: str = "teacher") -> Shape | None:
    """The shape of the teacher among a step's inputs; None where there is none, or nobody knows it."""
    id = step.inputs.get(name, "")
    folder = folder_of(state, id, survey)
    if folder is not None:
        return Shape.of_folder(folder)
    made = next((status.step for status in survey if status.step.id == id), None)
    return shape_of(state, made, survey) if made and made.params.get("training") is not None else None


def lengths(state: State, step: Step, survey: Sequence[Status]) -> tuple[float, float, float] | None:
    """Tokens of the longest example of a training, of a mean prompt and of a mean answer; None before the data is read."""
    outputs = {status.step.id: status.output for status in survey}
    found: list[tuple[float, float]] = []
    for entry in step.params.get("files", ()):
        name, _, file = entry.partition("/")
        output = outputs.get(step.inputs.get(name, ""))
        path = state.store.path(output) / file if output else None
        if path is not None and path.is_file():
            found += _tokens(path)
    if not found:
        return None
    prompts, answers = zip(*found, strict=True)
    return max(a + b for a, b in found), sum(prompts) / len(found), sum(answers) / len(found)


@functools.cache
def _tokens(path: Path) -> list[tuple[float, float]]:
    """Of each example in a file of the store, which never changes: of prompt and answer, roughly."""
    found = []
    with path.open(encoding="utf-8") as file:
        for line in itertools.islice(file, SAMPLE):
            turns = json.loads(line)["messages"]
            answer = sum(len(turn["content"]) for turn in turns if turn["role"] == "assistant" and turn is turns[-1])
            prompt = sum(len(turn["content"]) for turn in turns) - answer
            found.append((prompt / CHARACTERS + MARKS, answer / CHARACTERS + 1))
    return found


def counts(state: State, step: Step, survey: Sequence[Status]) -> dict[str, int]:
    """Examples in the files of the data that a step reads, by name without ending; nothing before the data is read."""
    outputs = {status.step.id: status.output for status in survey}
    output = outputs.get(step.inputs.get("data", ""))
    info = (read_json(state.store.path(output) / "info.json") if output else None) or {}
    return {name.removesuffix(".jsonl"): int(file.get("examples", 0)) for name, file in info.get("files", {}).items()}


def plan_of(state: State, step: Step, survey: Sequence[Status], examples: int | None) -> Plan | None:
    """What is known of the size of a training; None for other steps, and where the model is not known.

    Args:
        examples: that it learns from, as far as known.
    """
    settings = step.params.get("training")
    shape = shape_of(state, step, survey) if settings is not None and step.method.startswith("train.") else None
    if settings is None or shape is None:
        return None
    training = training_of(settings)
    known = lengths(state, step, survey)
    context = int((step.params.get("architecture") or {}).get("context") or 1 << 20)
    longest, prompt, answer = known or (sum(USUAL), *USUAL)
    wide = min(longest, context)
    share = answer / (prompt + answer)
    held = counts(state, step, survey).get("validation", 0) if step.params.get("validation") else 0

    def load(changed: Training) -> Load:
        width = min(wide, changed.max_length or wide)
        return Load.guess(changed, examples or training.batch_size, width * (1 - share), width * share, held)

    base = folder_of(state, step.inputs.get("base", ""), survey)
    file = lower_bytes(base) if base else 0
    return Plan(
        step.id, key_of(state.project.spec, step.id), shape, training, load, step.params.get("architecture") is not None, bf16() == "yes",
        teacher_of(state, step, survey), file,
    )  # fmt: skip


def pass_of(state: State, step: Step, survey: Sequence[Status], examples: int | None) -> PassPlan | None:
    """What is known of the size of a teacher's pass; None for other steps, and where a teacher is not known.

    Args:
        examples: that it goes over, as far as known.
    """
    kind = PASSES.get(step.method)
    names = [name for name in step.inputs if name == "teacher" or name.startswith("teacher.")]
    shapes = [teacher_of(state, step, survey, name) for name in names] if kind else []
    teachers = tuple(shape for shape in shapes if shape is not None)
    if kind is None or len(teachers) < len(names):
        return None
    asked = {name: step.params[name] for name in SETTINGS if name in step.params}
    known = lengths(state, step, survey)
    longest, prompt, answer = known or (sum(USUAL), *USUAL)
    settings = Settings(kind, **asked)
    count = examples or settings.batch_size

    def load(changed: Settings) -> PassLoad:
        most = changed.max_length or longest
        shorter = min(1.0, most / (prompt + answer))
        return PassLoad.guess(changed.batch_size, count, min(longest, most), prompt * shorter, answer * shorter)

    folders = [folder_of(state, step.inputs[name], survey) for name in names]
    file = sum(lower_bytes(folder) for folder in folders if folder is not None)
    return PassPlan(step.id, "train.", settings, load, teachers, bf16() == "yes", file)


def key_of(spec: Spec, id: str) -> str:
    """What stands before the names of a training's settings in the project file."""
    kind, _, rest = id.partition("-")
    if kind == "teacher":
        return f"teacher.others.{int(rest) - 2}.train." if rest else "teacher.train."
    if id == "student-sft":
        return "train.preference.supervised."
    if kind == "adapter" and rest in spec.adapters and spec.adapters[rest].train is not None:
        return f"adapters.{rest}.train."
    return "train."


def training_of(settings: dict[str, Any]) -> Training:
    """The settings of a training step, those of its method included where it has some."""
    kind = Train if set(settings) - set(Training.model_fields) else Training
    return kind.model_validate({k: v for k, v in settings.items() if k in kind.model_fields}, strict=False)


def place(state: State, key: str) -> str:
    """`slmops.yaml:12: ` where the settings of a training stand."""
    project = state.project
    file = project.file.name
    if project.places is None:
        return f"{file}: "
    found = project.places.find(Problem("", path=f"{key}batch_size"))
    return f"{found.file}:{found.line}: " if found.line else f"{found.file or file}: "


def require(state: State, plans: Sequence[Plan | PassPlan], bytes_: int | None = None) -> None:
    """Refuse trainings and teachers' passes that do not fit, the first of them.

    Args:
        bytes_: what may be taken; default: what this machine has.

    Raises:
        ResourceError: with the line of its settings, and what would make it fit.
    """
    if bytes_ is None and shutil.which("nvidia-smi") is None:
        bytes_ = available()
    for plan in plans:
        plan.require(bytes_, place(state, plan.key))
