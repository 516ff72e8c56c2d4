"""What single fields of a project file cannot know: whether its stages fit each other. Pure.

Each check yields where it stands, what is wrong and how to mend it. What pruning, ternary training and adapters want of a file they
say themselves.
"""

from __future__ import annotations

from collections.abc import Iterator

from slmops.core import forms, runtimes
from slmops.core.spec import FROM_TEACHER, PREFERENCE, Columns, Spec, TokenizerSpec, Training
from slmops.errors import Problem
from slmops.flow import adapters, pruning, ternary
from slmops.train.shape import ffn_width, parameters

Wrong = Iterator[tuple[str, str, str]]
"""Place, message and hint of each problem."""

NEEDS_TEACHER = ("accuracy_retained", "inference_time_reduction", "memory_reduction")
"""Gates that compare with a teacher."""


def check(spec: Spec) -> list[Problem]:
    """Everything about a spec that keeps it from being a plan."""
    found = [
        Problem(message, hint, path=path)
        for part in (
            _models,
            _distillation,
            _tunings,
            _synthesis,
            _preference,
            _data,
            _gates,
            _compression,
            _conversion,
        )
        for path, message, hint in part(spec)
    ]
    return found + ternary.check(spec) + pruning.check(spec) + adapters.check(spec)


def no_gold(spec: Spec) -> bool:
    """Whether the student has no gold label at all."""
    return spec.data.gold.per_label == 0 or spec.data.gold.total == 0


def supervised_first(spec: Spec) -> bool:
    """Whether a step of supervised learning comes before the student's method: DPO cannot start from random weights."""
    return spec.train.method == "dpo" and spec.student.model is not None


def _models(spec: Spec) -> Wrong:
    teacher, student = spec.teacher, spec.student
    for path, model in (("teacher.model", teacher and teacher.model), ("student.model", student.model)):
        refusal = model and runtimes.head_size(model.hidden, model.heads)
        if refusal:
            yield f"{path}.heads", *refusal
    own = teacher.tokenizer if teacher is not None and teacher.model is not None else None
    shared = own if student.tokenizer == "teacher" else student.tokenizer
    for path, model, tokenizer in (("teacher", teacher and teacher.model, own), ("student", student.model, shared)):
        if model and isinstance(tokenizer, TokenizerSpec):
            keys = (model.kv_heads or model.heads) * (model.hidden // model.heads)
            refusal = runtimes.as_many_tokens(tokenizer.vocabulary, (model.hidden, keys, ffn_width(model)))
            if refusal:
                yield f"{path}.model", *refusal
    if student.model is None and student.base is None:
        yield "student", "is missing", "give student.model (an architecture) or student.base (an existing model)"
    if student.model is not None and student.tokenizer == "teacher" and teacher is not None and teacher.endpoint:
        yield "student.tokenizer", "an endpoint has no tokenizer to share", "give `tokenizer: {vocabulary: 2048}`"


def _distillation(spec: Spec) -> Wrong:
    teacher, student, method = spec.teacher, spec.student, spec.train.method
    if method in FROM_TEACHER:
        if teacher is None:
            yield "train.method", f"{method} needs a teacher", "add a teacher, or use `method: sequence`"
        elif teacher.endpoint is not None:
            yield "train.method", "an endpoint does not give its distributions", "use `method: sequence`"
        elif teacher.instructed:
            hint = "use `method: sequence`, or `teacher: {instruct: false}` for a model that was trained on the task"
            said = "distributions are taken on plain prompts, which an instructed teacher does not understand"
            yield "train.method", said, hint
        elif method != "cross_tokenizer" and student.model is not None and student.tokenizer != "teacher":
            hint = "use `tokenizer: teacher`, or `method: cross_tokenizer`"
            yield "student.tokenizer", f"{method} needs the teacher's tokenizer", hint
    if teacher is not None and teacher.others and method != "logits":
        yield "teacher.others", "is for logit distillation", "use `train: {method: logits}`, or take them out"
    if teacher is not None and teacher.others and teacher.model is None and any(o.model for o in teacher.others):
        said = "a teacher trained here needs the tokenizer of a first one trained here"
        yield "teacher.others", said, "give others a `base`"


def _tunings(spec: Spec) -> Wrong:
    teacher = spec.teacher
    trainings: list[tuple[str, Training]] = [("train", spec.train)]
    if teacher is not None:
        trainings += [("teacher.train", teacher.train)]
        trainings += [(f"teacher.others.{n}.train", other.train) for n, other in enumerate(teacher.others)]
    for path, training in trainings:
        if training.tuning != "full" and (path != "train" or spec.student.base is None):
            said = f"{training.tuning} adds to a model that exists"
            yield f"{path}.tuning", said, "give student.base, or use `tuning: full`"
        elif training.tuning != "full" and training.quantization_aware != "off":
            said = f"rounds trained weights, but {training.tuning} trains others"
            yield f"{path}.quantization_aware", said, "take it out, or use `tuning: full`"


def _synthesis(spec: Spec) -> Wrong:
    teacher, generate = spec.teacher, spec.synthesize.generate
    if spec.synthesize.shards > 1 and teacher is not None and teacher.endpoint is not None:
        hint = "an endpoint is asked many things at once: set its concurrency"
        yield "synthesize.shards", "are for a local teacher", hint
    filters = spec.synthesize.filters
    if filters.min_characters > filters.max_characters:
        yield "synthesize.filters.max_characters", "is less than min_characters", "swap them"
    if generate is None:
        return
    if teacher is None and generate.method != "template":
        yield "synthesize.generate", f"`{generate.method}` needs a teacher", "add a teacher, or use templates"
    if generate.method == "template" and not generate.templates:
        hint = "give at least one template, such as 'where is my {item}'"
        yield "synthesize.generate.templates", "is empty", hint
    if generate.method == "sample" and teacher is not None:
        if teacher.endpoint is not None:
            yield "synthesize.generate.method", "an endpoint cannot write user turns from nothing", "use `seed`"
        if teacher.model is not None and teacher.train.prompt_weight == 0:
            said = "is 0, so the teacher never learns to write messages that it could be sampled for"
            yield "teacher.train.prompt_weight", said, "give for instance 0.3"


def _preference(spec: Spec) -> Wrong:
    """What the preference methods cannot work with."""
    method, data, supervised = spec.train.method, spec.data, spec.train.preference.supervised
    if method not in PREFERENCE:
        return
    if data.format in ("messages", "alpaca", "sharegpt", "prompt_completion"):
        hint = "use `format: preference`, with rows of prompt, chosen and rejected"
        yield "data.format", f"`{data.format}` has no rejected answers, which {method} learns from", hint
    elif data.columns != Columns() and data.columns.rejected is None:
        yield "data.columns.rejected", "is missing", f"name the column of the answers that {method} turns from"
    if spec.train.prompt_weight:
        yield "train.prompt_weight", f"is not used by {method}, which looks at answers alone", "take it out"
    if spec.train.label_smoothing:
        yield "train.label_smoothing", f"is not used by {method}", "use train.preference.label_smoothing"
    if no_gold(spec) and spec.teacher is not None:
        yield "data.gold", f"is 0, but the pairs that {method} learns from are gold", "take it out"
    if supervised_first(spec):
        if supervised.tuning != "full":
            yield "train.preference.supervised.tuning", "a model from scratch has no base to add to", "use `full`"
        return
    if spec.teacher is not None and (spec.synthesize.label_pool or spec.synthesize.generate is not None):
        hint = "take it out, or set synthesize.label_pool: false to keep the teacher for comparison"
        yield "teacher", f"answers, but its answers are no pairs for {method} to learn from", hint
    if data.augment is not None:
        yield "data.augment", f"makes copies without a rejected answer, which {method} needs", "take it out"


def _data(spec: Spec) -> Wrong:
    teacher = spec.teacher
    if spec.data.path.strip() in ("", ".", "./"):
        yield "data.path", "names no data", "give a file, a folder of its own, or hf:ORG/NAME"
    if spec.data.augment is not None and spec.task.type != "extraction":
        said = "swaps values between messages and JSON answers, which only extraction has"
        yield "data.augment", said, "take it out"
    if teacher is not None and teacher.model is not None and spec.data.teacher_share == 0:
        yield "data.teacher_share", "is 0, so the teacher has nothing to learn from", "give for instance 0.5"
    answers = teacher is not None and (spec.synthesize.label_pool or spec.synthesize.generate is not None)
    if no_gold(spec) and not answers:
        said = "is 0 and no teacher answers anything, so the student has nothing to learn from"
        yield "data.gold", said, "give it gold labels, or set synthesize.label_pool"


def _gates(spec: Spec) -> Wrong:
    if spec.teacher is None and any(g.metric in NEEDS_TEACHER for g in spec.evaluate.gates):
        yield "evaluate.gates", "compare with a teacher, but there is none", "add a teacher or take these gates out"
    has_label_metrics = any(g.metric in ("in_scope_accuracy", "out_of_scope_recall") for g in spec.evaluate.gates)
    if has_label_metrics and spec.task.out_of_scope is None:
        yield "task.out_of_scope", "is missing", "name the label that a gate on scope looks at"
    if spec.evaluate.kv_cache is not None and not any(forms.split(form)[0] == "gguf" for form in spec.convert.also):
        said = (
            f"{spec.evaluate.kv_cache} is for llama.cpp, which runs nothing here: ONNX Runtime GenAI has no quantised cache "
            "on the CPU"
        )
        yield "evaluate.kv_cache", said, "add a form to convert.also, such as gguf-q8_0, or take it out"


def _compression(spec: Spec) -> Wrong:
    compress, convert, aware = spec.compress, spec.convert, spec.train.quantization_aware
    if compress.vocabulary_at_least and compress.vocabulary == "whole":
        yield "compress.vocabulary_at_least", "is for a vocabulary that is trimmed", "add `vocabulary: seen`"
    if compress.quantization != "none" and convert.precision != "int4":
        said = f"rounds to int4, but the result is {convert.precision}"
        yield "compress.quantization", said, "use `convert: {precision: int4}`, or take it out"
    if compress.quantization != "none" and aware != "off":
        said = "rounds weights that train.quantization_aware has rounded already"
        yield "compress.quantization", said, "take one of them out"
    if convert.file_mb is None:
        return
    if convert.precision != "int4":
        yield "convert.file_mb", f"is for int4, but the result is {convert.precision}", "take one of them out"
    if convert.embedding_precision is not None:
        yield "convert.embedding_precision", "is chosen by convert.file_mb", "take one of them out"
    if aware != "off":
        said = "trains for int4 throughout, not for convert.file_mb"
        yield "train.quantization_aware", said, "take one of them out"
    model = spec.student.model
    least = parameters(model, 0) * (2 + 16 / convert.block_size) / 8e6 if model else 0.0
    if convert.file_mb < least:
        said = f"({convert.file_mb:g}) is less than the blocks take with 2 bits for each weight"
        yield "convert.file_mb", said, f"give more than {least:.2f}, or a smaller student.model"


def _conversion(spec: Spec) -> Wrong:
    convert, aware = spec.convert, spec.train.quantization_aware
    if convert.embedding_precision not in (None, convert.precision):
        if convert.precision != "int4":
            said = f"is {convert.embedding_precision} in a model in {convert.precision}"
            yield "convert.embedding_precision", said, "use `precision: int4`, or take it out"
        elif aware == "int4":
            said = "is not what train.quantization_aware trains for, which is int4 throughout"
            yield "convert.embedding_precision", said, "take one of them out"
    if convert.precision == "fp32" and aware != "off":
        yield "train.quantization_aware", "is set, but the result is fp32", "use `convert: {precision: int4}`"
    if aware == "int4" and spec.train.block_size != convert.block_size:
        said = f"({spec.train.block_size}) differs from convert.block_size"
        yield "train.block_size", said, "give both the same"
    rounded = next((form for form in convert.also if form in ("mlx-int8", "mlx-int4")), None)
    if rounded is not None:
        model = spec.student.model  # a base is looked at when it is fetched
        refusal = runtimes.mlx_groups((model.hidden, ffn_width(model)) if model else (0,), convert.block_size)
        if refusal:
            yield "convert.block_size", f"does not suit {rounded}: {refusal.message}", refusal.hint
    if "litert-int4" in convert.also and convert.block_size not in runtimes.LITERT_GROUPS:
        these = ", ".join(map(str, runtimes.LITERT_GROUPS))
        said = f"does not suit litert-int4: LiteRT does not round in groups of {convert.block_size} weights"
        yield "convert.block_size", said, f"these can: {these}"
    if "executorch-int4" in convert.also and convert.block_size not in runtimes.EXECUTORCH_GROUPS:
        these = ", ".join(map(str, runtimes.EXECUTORCH_GROUPS))
        said = f"does not suit executorch-int4: XNNPACK does not round in groups of {convert.block_size} weights"
        yield "convert.block_size", said, f"these can: {these}"
