"""`slmops needs`: what a model takes to answer, in memory and on the disk, by runtime, before it is here."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slmops.cli.bench import positive
from slmops.cli.common import json_argument, print_json, say, size
from slmops.core.layout import columns
from slmops.errors import ModelError, UsageError

HELP = "foresee the memory and disk that a model takes to answer, by runtime and precision"

EPILOG = """\
MODEL is a name of the catalogue (slmops catalog), its name on the hub, its Ollama tag, or a folder with config.json.

  slmops needs qwen3-0.6b
  slmops needs qwen3-0.6b --runtime llama_cpp --quant q4_0 --context 8192 --batch 4
  slmops needs ./my-model --json"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """What `needs` takes."""
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--runtime", choices=("onnx_genai", "llama_cpp", "torch"), help="only this one (all)")
    parser.add_argument("--quant", metavar="FORM", help="only this form, such as int4, q4_0, q8_0, fp16 or fp32 (all)")
    parser.add_argument(
        "--context",
        type=positive,
        metavar="TOKENS",
        help="of a prompt with its answer (4096, or the model's own if less)",
    )
    parser.add_argument("--batch", type=positive, default=1, metavar="N", help="answered at once (1)")
    json_argument(parser)


def run(options: argparse.Namespace) -> int:
    """Print the table."""
    from slmops.catalog import needs
    from slmops.core.parameters import count

    name, config, limit = _model(options.model)
    context = options.context or min(4096, limit)
    if context > limit:
        raise UsageError(f"the context of {name} holds {limit:,} tokens, {context:,} are asked for", "ask for fewer")
    forms = [
        (runtime, form) for runtime in needs.RUNTIMES for form in needs.BITS[runtime]
        if options.runtime in (None, runtime) and options.quant in (None, form)
    ]  # fmt: skip
    if not forms:
        known = "; ".join(f"{runtime}: {', '.join(needs.BITS[runtime])}" for runtime in needs.RUNTIMES)
        raise UsageError(
            f"there is no form {options.quant}" + (f" in {options.runtime}" if options.runtime else ""), known
        )
    found = [needs.needs(config, runtime, form, context, options.batch) for runtime, form in forms]
    if options.json:
        print_json({
            "model": name, "parameters": count(config).total, "context": context, "batch": options.batch,
            "needs": [
                {"runtime": row.runtime, "form": row.form, "disk_bytes": row.disk, "weights_bytes": row.weights,
                 "cache_bytes": row.cache, "activations_bytes": row.activations, "program_bytes": row.program,
                 "total_bytes": row.total}
                for row in found
            ],
        })  # fmt: skip
        return 0
    table = [["runtime", "form", "weights", "cache", "working", "program", "in all", "file"]]
    table += [
        [row.runtime, row.form, *map(size, (row.weights, row.cache, row.activations, row.program, row.total, row.disk))]
        for row in found
    ]
    print("\n".join(columns(table, right=range(2, 8))))
    say(f"\n{name}: {count(config).total:,} weights; {options.batch} × {context:,} tokens")
    say(textwrap.fill(
        "foreseen, not measured: the peak of a process that answers on the processor. `slmops bench` measures a model that is here.",
        79,
    ))  # fmt: skip
    return 0


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
