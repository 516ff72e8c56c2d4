"""The part of a plan that `compress.prune` asks for: steps between the student's training and all that is done with it.

    student ─ student-shortened ─ student-narrowed ─ student-sparse ─ student-recovered

Each is there only if it is asked for. Recovery is the student's training once more with the pruned model as its base: the
same method, examples, teacher and, where there are some, the same cached distributions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from slmops.core import pruning
from slmops.core.spec import PREFERENCE, Architecture, Prune, Spec
from slmops.core.step import Step
from slmops.errors import Problem
from slmops.train.shape import ffn_width

SHORTENED, NARROWED, SPARSE, RECOVERED = "student-shortened", "student-narrowed", "student-sparse", "student-recovered"


class Builder(Protocol):
    """What of the planner's builder is used here."""

    steps: list[Step]

    def add(self, id: str, method: str, params: Mapping[str, Any], about: str, inputs: Mapping[str, str] | None = None, *,
            seed: int | None = None, threads: int = 0) -> str: ...  # fmt: skip


def last(spec: Spec) -> str:
    """The step whose model is the student after pruning, or as it was trained where nothing is pruned."""
    asked = stages(spec.compress.prune)
    return asked[-1] if asked else "student"


def stages(prune: Prune | None) -> list[str]:
    """The steps that are asked for, in their order."""
    if prune is None:
        return []
    wanted = {
        SHORTENED: prune.layers, NARROWED: prune.ffn or prune.heads, SPARSE: prune.sparsity, RECOVERED: prune.recover is not None,
    }  # fmt: skip
    return [id for id, asked in wanted.items() if asked]


def shape(prune: Prune) -> dict[str, Any]:
    """What a model that is fetched is checked for: it knows its own shape."""
    return prune.model_dump(mode="json", include={"layers", "ffn", "heads", "sparsity"})


def check(spec: Spec) -> list[Problem]:
    """Whether pruning fits the other stages, and the student if its shape is known."""
    prune, train = spec.compress.prune, spec.train
    if prune is None:
        return []
    found: list[tuple[str, str, str]] = []
    if spec.student.model is not None:
        refusal = pruning.refusal(_config(spec.student.model), prune)
        found += [("compress.prune", *refusal)] if refusal else []
    if prune.sparsity is not None and spec.compress.quantization != "none":
        said = f"fills the zeros of compress.prune.sparsity again ({spec.compress.quantization})"
        found.append(("compress.quantization", said, "take one of them out"))
    if "sparsity_method" in prune.model_fields_set and prune.sparsity is None:
        found.append(("compress.prune.sparsity_method", "is for `sparsity`", "give a sparsity, or take it out"))
    if prune.recover is None and train.quantization_aware != "off":
        hint = "add `recover: {}` to compress.prune, or take it out"
        found.append(("train.quantization_aware", "trains for rounding before weights are taken out", hint))
    if prune.recover is not None and train.method in PREFERENCE:
        said = f"trains again by {train.method}, which would take the pruned model for its reference"
        found.append(("compress.prune.recover", said, "take it out"))
    if prune.recover is not None and prune.sparsity is not None and train.tuning != "full":
        said = f"is {train.tuning}, whose additions would fill the zeros of compress.prune.sparsity"
        found.append(("train.tuning", said, "use `tuning: full`, or take `recover` out"))
    return [Problem(message, hint, path=path) for path, message, hint in found]


def _config(model: Architecture) -> dict[str, Any]:
    """The config.json that a student from scratch will have, as far as it is looked at."""
    return {
        "model_type": model.type, "num_hidden_layers": model.layers, "hidden_size": model.hidden,
        "num_attention_heads": model.heads, "num_key_value_heads": model.kv_heads or model.heads,
        "intermediate_size": ffn_width(model),
    }  # fmt: skip


def steps(spec: Spec, builder: Builder, texts: Sequence[str], inputs: Mapping[str, str], threads: int) -> None:
    """Add the steps to a plan that has `student` already.

    Args:
        texts: files of examples to calibrate on, as `input/file`, and `inputs`: where those come from.
    """
    prune = spec.compress.prune
    if prune is None:
        return
    student = next(step for step in builder.steps if step.id == "student")
    model, wanted = "student", stages(prune)
    common: dict[str, Any] = {"files": list(texts), "examples": spec.compress.calibration_examples}
    methods: dict[str, tuple[str, dict[str, Any], str]] = {
        SHORTENED: ("compress.depth", {"layers": prune.layers}, f"take out {prune.layers} of its blocks"),
        NARROWED: ("compress.width", {"ffn": prune.ffn, "heads": prune.heads}, "take out neurons and heads"),
        SPARSE: (f"compress.{prune.sparsity_method}", {"sparsity": prune.sparsity}, "set weights to zero"),
    }
    for id, (method, params, about) in methods.items():
        if id in wanted:
            given = {"model": model, **inputs}
            model = builder.add(id, method, common | params, about, given, seed=0, threads=threads)
    if prune.recover is not None:
        changed = prune.recover.model_dump(mode="json", exclude_none=True)
        changed |= {"max_steps": None} if prune.recover.epochs is not None else {}
        params = {**student.params, "architecture": None, "training": {**student.params["training"], **changed}}
        if prune.sparsity is not None:
            params["keep_zeros"] = True
        given = {name: step for name, step in student.inputs.items() if name not in ("tokenizer", "base")} | {
            "base": model
        }
        about = "train the pruned student again"
        builder.add(RECOVERED, student.method, params, about, given, seed=student.seed, threads=student.threads)
