"""`slmops needs`: what a model takes to answer and to train, in memory and on the disk, before it is here."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops.cli.bench import positive
from slmops.cli.common import json_argument, print_json, say, size
from slmops.core.layout import columns
from slmops.errors import ModelError, UsageError

if TYPE_CHECKING:
    from slmops.flow.training_needs import TrainingNeeds

HELP = "foresee the memory that a model takes to answer, by runtime and precision, and to train, by method"
ANSWERING, LEARNING = 4096, 512
"""Tokens of the context where none is given."""
ROWS, EXAMPLES = 8, 1000
"""Examples of a training's batch, and of its data, where no number is given."""

EPILOG = """\
MODEL is a name of the catalogue (slmops catalog), its name on the hub, its Ollama tag, or a folder with config.json.

  slmops needs qwen3-0.6b
  slmops needs qwen3-0.6b --runtime llama_cpp --quant q4_0 --context 8192 --batch 4
  slmops needs qwen3-0.6b --train lora qlora --batch 4 --context 1024 --checkpointing
  slmops needs smollm2-135m-instruct --train on_policy --teacher smollm2-360m-instruct
  slmops needs ./my-model --json

Without --runtime, --quant and --train both tables are shown. A training is a tuning (full, lora, rslora, dora, qlora,
adapter), a method (sequence, logits, on_policy, hidden_states, cross_tokenizer, dpo, orpo), or METHOD+TUNING, as
`train.method` and `train.tuning` of a project file. The processor of this machine decides whether it computes in bf16."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """What `needs` takes."""
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument(
        "--runtime", choices=("onnx_genai", "llama_cpp", "openvino", "torch"), help="only this one (all)"
    )
    parser.add_argument("--quant", metavar="FORM", help="only this form, such as int4, q4_0, q8_0, fp16 or fp32 (all)")
    parser.add_argument(
        "--context",
        type=positive,
        metavar="TOKENS",
        help=f"of a prompt with its answer ({ANSWERING}, or the model's own if less; {LEARNING} for training)",
    )
    parser.add_argument(
        "--batch", type=positive, metavar="N", help=f"answered at once (1), or learned in a step ({ROWS})"
    )
    training = parser.add_argument_group("training")
    training.add_argument(
        "--train", nargs="+", metavar="TRAINING", help="only the memory of these trainings, or of `all`"
    )
    training.add_argument(
        "--answer", type=positive, metavar="TOKENS", help="of the context, those that are learned (half)"
    )
    training.add_argument("--accumulate", type=positive, metavar="N", help="parts of a batch, one after another (1)")
    training.add_argument("--checkpointing", action="store_true", help="activations are computed again, not kept")
    training.add_argument("--precision", choices=("auto", "bf16", "fp32"), help="of products (auto)")
    training.add_argument("--examples", type=positive, metavar="N", help=f"that lie in memory ({EXAMPLES})")
    training.add_argument(
        "--teacher", metavar="MODEL", help="that is in memory in on_policy and hidden_states (one as large as MODEL)"
    )
    json_argument(parser)


def run(options: argparse.Namespace) -> int:
    """Print the tables."""
    from slmops.core.parameters import count

    name, config, limit = _model(options.model)
    if (options.context or 0) > limit:
        raise UsageError(
            f"the context of {name} holds {limit:,} tokens, {options.context:,} are asked for", "ask for fewer"
        )
    asked = options.runtime or options.quant
    of_training = ("train", "answer", "accumulate", "checkpointing", "precision", "examples", "teacher")
    given = [f"--{option}" for option in of_training if getattr(options, option)]
    if asked and given:
        raise UsageError(
            f"{given[0]} does not go with --runtime and --quant",
            "ask for either: they are of trainings, and of answers",
        )
    answering = {} if options.train else _answering(options, config, limit)
    learning = {} if asked else _learning(options, name, config, limit)
    if options.json:
        print_json({"model": name, "parameters": count(config).total, **_json(answering), **_json(learning)})
        return 0
    parts = []
    if answering:
        table = [["runtime", "form", "weights", "cache", "working", "program", "in all", "file"]]
        table += [
            [row.runtime, row.form,
             *map(size, (row.weights, row.cache, row.activations, row.program, row.total, row.disk))]
            for row in answering["needs"]
        ]  # fmt: skip
        parts.append("\n".join(columns(table, right=range(2, 8))))
    if learning.get("training"):
        table = [["training", "weights", "optimizer", "working", "program", "in all"]]
        table += [
            [row.way, *map(size, (row.weights, row.moments, row.working, row.program, row.memory.peak))]
            for row in learning["training"]
        ]
        parts.append("\n".join(columns(table, right=range(1, 6))))
    print("\n\n".join(parts))
    say()
    for line in _talk(name, count(config).total, answering, learning):
        say(textwrap.fill(line, 79))
    return 0


def _answering(options: argparse.Namespace, config: Mapping[str, Any], limit: int) -> dict[str, Any]:
    """What it takes to answer, by runtime and form.

    Raises:
        UsageError: there is no such form.
    """
    from slmops.catalog import needs

    context, batch = options.context or min(ANSWERING, limit), options.batch or 1
    forms = [
        (runtime, form) for runtime in needs.RUNTIMES for form in needs.BITS[runtime]
        if options.runtime in (None, runtime) and options.quant in (None, form)
    ]  # fmt: skip
    if not forms:
        known = "; ".join(f"{runtime}: {', '.join(needs.BITS[runtime])}" for runtime in needs.RUNTIMES)
        raise UsageError(
            f"there is no form {options.quant}" + (f" in {options.runtime}" if options.runtime else ""), known
        )
    found = [needs.needs(config, runtime, form, context, batch) for runtime, form in forms]
    return {"context": context, "batch": batch, "needs": found}


def _learning(options: argparse.Namespace, name: str, config: Mapping[str, Any], limit: int) -> dict[str, Any]:
    """What it takes to train, by method; the reason where that is not known and was not asked for.

    Raises:
        ModelError: it was asked for.
        UsageError: there is no such training, or numbers do not go together.
    """
    from slmops.flow import training_needs as foreseen
    from slmops.flow.methods import bf16

    context, batch = options.context or min(LEARNING, limit), options.batch or ROWS
    answer = options.answer or max(1, context // 2)
    if context < 2 and not options.train:  # nothing to learn from
        return {}
    if answer >= context:
        raise UsageError(
            f"an answer of {answer:,} tokens leaves none of the {context:,} for its prompt", "give less as --answer"
        )
    parts, examples = options.accumulate or 1, options.examples or EXAMPLES
    if parts > batch:
        raise UsageError(f"{batch} examples cannot go in {parts} parts", "give less as --accumulate")
    wanted = [foreseen.WAYS if way == "all" else (way,) for way in options.train or ["all"]]
    ways = list(dict.fromkeys(way for given in wanted for way in given))
    methods = {foreseen.way_of(way)[0] for way in ways}
    if options.teacher and not methods & set(foreseen.ASKED):
        raise UsageError(
            "none of these trainings asks a teacher while the student learns",
            f"those that do: {', '.join(foreseen.ASKED)}",
        )
    try:
        model = foreseen.model_of(name, config, Path(options.model))
        taught = _model(options.teacher) if options.teacher else None
        teacher = foreseen.model_of(taught[0], taught[1], Path(options.teacher)) if taught else model
    except ModelError as error:
        if options.train or options.teacher:
            raise
        return {"reason": error}
    settings = {"accumulate": parts, "checkpointing": options.checkpointing, "precision": options.precision or "auto"}
    rows = [
        foreseen.foresee(way, model, teacher, batch, context, answer, examples, settings, bf16() == "yes")
        for way in ways
    ]
    return {"context": context, "batch": batch, "answer": answer, "examples": examples, "training": rows}


def _json(found: Mapping[str, Any]) -> dict[str, Any]:
    """A table as JSON values; of training, its conditions stand in each row."""
    if "needs" in found:
        rows = [
            {"runtime": row.runtime, "form": row.form, "disk_bytes": row.disk, "weights_bytes": row.weights,
             "cache_bytes": row.cache, "activations_bytes": row.activations, "program_bytes": row.program,
             "total_bytes": row.total}
            for row in found["needs"]
        ]  # fmt: skip
        return {"context": found["context"], "batch": found["batch"], "needs": rows}
    if "training" not in found:
        return {"training": None} if found else {}
    conditions = {name: found[name] for name in ("context", "batch", "answer", "examples")}
    return {"training": [{"training": row.way, **conditions, **_numbers(row)} for row in found["training"]]}


def _numbers(row: TrainingNeeds) -> dict[str, Any]:
    return {
        "precision": "bf16" if row.bf16 else "fp32", "teacher": row.teacher or None, "weights_bytes": row.weights,
        "optimizer_bytes": row.moments, "working_bytes": row.working, "program_bytes": row.program,
        "total_bytes": row.memory.peak,
    }  # fmt: skip


def _talk(name: str, weights: int, answering: Mapping[str, Any], learning: Mapping[str, Any]) -> list[str]:
    """What the numbers are of."""
    lines = []
    if answering:
        lines.append(
            f"{name}: {weights:,} weights; to answer, {answering['batch']} × {answering['context']:,} tokens on the processor, "
            "foreseen and not measured. `slmops bench` measures a model that is here."
        )
    if reason := learning.get("reason"):
        lines.append(f"{reason}; {reason.hint}")
    if rows := learning.get("training"):
        teachers = sorted({row.teacher for row in rows if row.teacher})
        taught = f", with {teachers[0]} as a teacher in memory where one is" if teachers else ""
        size_of = f"{learning['batch']} × {learning['context']:,} tokens a step, {learning['answer']:,} of each example learned"
        lines.append(
            f"{'' if answering else f'{name}: {weights:,} weights; '}to train, {size_of}, in {'bf16' if rows[0].bf16 else 'fp32'} on the "
            f"processor{taught}: foreseen and not measured. A run asks again for its own examples."
        )
    return lines


def _model(text: str) -> tuple[str, Mapping[str, Any], int]:
    """Name, configuration and context of a folder or a model of the catalogue."""
    from slmops.catalog import models
    from slmops.core.parameters import KINDS, count, kind_of, language

    folder = Path(text)
    if not folder.is_dir():
        model = models.find(models.load(), text)
        return model.name, model.config, model.context
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        limit = int(language(config).get("max_position_embeddings") or 2048)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{folder} has no config.json that can be read: {error}", "give a model in Hugging Face form"
        ) from None
    if kind_of(config) not in KINDS:
        known = ", ".join(KINDS)
        raise ModelError(f"{folder}: the architecture {kind_of(config)!r} is not known", f"known: {known}")
    try:
        count(config)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError, IndexError) as error:
        raise ModelError(
            f"{folder}: its config.json does not say how large it is: {type(error).__name__}: {error}",
            "fetch the model again, or give a folder in Hugging Face form",
        ) from None
    return folder.resolve().name, config, limit
