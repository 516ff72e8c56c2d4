"""What a project file must say for ternary training, and for the formats that hold ternary layers. Pure."""

from __future__ import annotations

from slmops.core import runtimes
from slmops.core.spec import Architecture, Spec, Training
from slmops.errors import Problem
from slmops.train.shape import ffn_width


def check(spec: Spec) -> list[Problem]:
    """Whether models that are trained ternary are as wide as ternary types want them, and other students are kept from those types."""
    teacher, train, convert = spec.teacher, spec.train, spec.convert
    models: list[tuple[str, Architecture | None, Training]] = [("student.model", spec.student.model, train)]
    models.append(("student.model", spec.student.model, train.preference.supervised))
    if teacher is not None:
        models.append(("teacher.model", teacher.model, teacher.train))
        models += [(f"teacher.others.{n}.model", other.model, other.train) for n, other in enumerate(teacher.others)]
    found: list[Problem] = []
    for path, model, training in models:
        if model is None or training.quantization_aware != "ternary":
            continue
        refusal = runtimes.ternary({"hidden": model.hidden, "ffn": ffn_width(model)})
        if refusal and path not in [problem.path for problem in found]:
            found.append(Problem(*refusal, path=path))
    if train.quantization_aware == "ternary":
        if (
            train.method == "dpo"
            and spec.student.model is not None
            and train.preference.supervised.quantization_aware != "ternary"
        ):
            said = "differs from train.quantization_aware: a ternary student is ternary from its first step"
            hint = "give `quantization_aware: ternary` here too"
            found.append(Problem(said, hint, path="train.preference.supervised.quantization_aware"))
        if convert.rounding is not None:
            said = "is of int4 scales, which ternary layers have from their training"
            found.append(Problem(said, "take it out", path="convert.rounding"))
        if convert.layer_precision is not None and convert.precision != "int4":
            said = f"is {convert.layer_precision} in a model in {convert.precision}"
            found.append(Problem(said, "use `precision: int4`, or take it out", path="convert.layer_precision"))
        return found
    hint = "add `train: {quantization_aware: ternary}`, or take "
    if convert.ternary:
        said = f"has {convert.ternary[0]}, which is for ternary layers: others would be lost in it"
        found.append(Problem(said, hint + "gguf-q4_0", path="convert.also"))
    if convert.layer_precision is not None:
        said = f"is {convert.layer_precision}, which holds ternary layers alone"
        found.append(Problem(said, hint + "it out", path="convert.layer_precision"))
    return found
