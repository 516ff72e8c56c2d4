"""`slmops bench`: how fast models run here and what they hold, across formats and runtimes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from slmops.cli.common import cores, json_argument, print_json, say, seconds, size
from slmops.core.engine import KV_CACHES
from slmops.core.layout import columns
from slmops.errors import UsageError

HELP = "measure how fast models run here and what they hold, across formats and runtimes"

EPILOG = """\
A MODEL is a folder in the form of Hugging Face, ONNX Runtime GenAI, GGUF, MLX, OpenVINO, LiteRT or ExecuTorch, or NAME=FOLDER. Models
run in turns, each in a fresh process per round, one answer at a time; numbers are medians, with the least and greatest round in JSON.
With --batch, several prompts of one length are answered at once: the first token's time is that of all of them, new tokens and answers
per second are of all together, speed-up is that of new tokens over batch 1. LiteRT and ExecuTorch answer one at a time.

  slmops bench outputs/demo/bundle/model outputs/demo/student
  slmops bench int4=outputs/demo/bundle/model q4=outputs/demo/gguf-q4_0 --prompt 32 128 --new 64 --html bench.html
  slmops bench outputs/demo/gguf-q4_0 --prompt 1024 --kv-cache f16 q8_0 q4_0
  slmops bench outputs/demo/bundle/model outputs/demo/gguf-q4_0 --batch 1 2 4 8"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """What `bench` takes."""
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument(
        "--prompt", nargs="+", type=positive, default=[32], metavar="TOKENS", help="lengths of prompts (32)"
    )
    parser.add_argument("--new", type=positive, default=32, metavar="TOKENS", help="tokens of each answer (32)")
    parser.add_argument("--rounds", type=positive, default=3, metavar="N", help="fresh processes of each model (3)")
    parser.add_argument("--repeats", type=positive, default=10, metavar="N", help="answers to each prompt in each (10)")
    parser.add_argument(
        "--kv-cache", nargs="+", default=[], choices=KV_CACHES, metavar="TYPE",
        help="GGUF: how llama.cpp holds keys and values, each in turn: f32, f16 (its default), q8_0, q4_0",
    )  # fmt: skip
    parser.add_argument(
        "--batch", nargs="+", default=[], type=positive, metavar="N",
        help="answers at once, each number in processes of its own (one after the other)",
    )  # fmt: skip
    parser.add_argument("--threads", type=positive, metavar="N", help="the same for every model (all cores)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the numbers as a page with drawings")
    json_argument(parser)


def run(options: argparse.Namespace) -> int:
    """Measure, print a table; write the page."""
    from slmops.evaluate.bench import bench

    models = named(options.models)
    if options.html and not options.html.absolute().parent.is_dir():
        raise UsageError(f"there is no folder {options.html.parent} for the page", "make it, or give another FILE")
    threads = options.threads or cores()
    say(f"models: {len(models)}, rounds: {options.rounds}, threads: {threads}")
    found = bench(
        models,
        sorted(options.prompt),
        options.new,
        options.rounds,
        options.repeats,
        threads,
        lambda name: say(f"  {name}"),
        options.kv_cache,
        sorted(set(options.batch)),
    )
    if options.html:
        from slmops.evaluate.bench_page import render_bench

        options.html.write_text(render_bench(found), encoding="utf-8")
        say(f"the page: {options.html}")
    if options.json:
        print_json(found)
    else:
        print("\n".join(table(found)))
    return 0


def positive(text: str) -> int:
    """A number of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("give at least 1")
    return value


def named(models: list[str]) -> dict[str, Path]:
    """Name to folder. A folder without a name is called by its last part, or by more of them where two have the same.

    Raises:
        UsageError: two models have one name.
    """
    found: dict[str, Path] = {}
    for text in models:
        name, equals, folder = text.partition("=")
        path = Path(folder if equals else text)
        if not equals:
            parts = path.resolve().parts
            same = [p for t in models if "=" not in t and (p := Path(t).resolve().parts) != parts]
            count = next((n for n in range(1, len(parts)) if all(p[-n:] != parts[-n:] for p in same)), len(parts))
            name = "/".join(parts[-count:])
        if name in found:
            raise UsageError(f"two models are called {name}", "give them names: NAME=FOLDER")
        found[name] = path
    return found


def table(found: dict[str, Any]) -> list[str]:
    """The numbers in columns, for people."""
    lengths = found["settings"]["prompt_tokens"]
    head = ["", "runtime", "file", "load", "memory", "over idle"]
    batches = found["settings"]["batches"]
    for length in lengths:
        head += [f"first token ({length})", "prompt tokens/s", "new tokens/s"]
        head += ["of each", "speed-up", "answers/s"] if batches else []
    energy = any(model["joules_per_token"] is not None for model in found["models"].values())
    rows = [[*head, *(["energy a token"] if energy else [])]]
    for name, model in found["models"].items():
        row = [name, model["runtime"], size(model["model_bytes"]), seconds(model["load_s"]), size(model["peak_bytes"]),
               size(model["over_idle_bytes"])]  # fmt: skip
        for prompt in model["prompts"]:
            new = prompt["new_tokens_per_s"]
            row += [
                f"{1000 * prompt['first_token_s']['value']:.1f} ms", f"{prompt['prompt_tokens_per_s']['value']:,.0f}",
                f"{new['value']:,.0f}" if new else "–",
            ]  # fmt: skip
            if batches:
                times = prompt["speed_up"]
                row += [
                    f"{new['value'] / model['batch']:,.0f}" if new else "–", f"× {times['value']:.2f}" if times else "–",
                    f"{prompt['answers_per_s']['value']:,.1f}",
                ]  # fmt: skip
        if energy:
            row.append("–" if model["joules_per_token"] is None else f"{1000 * model['joules_per_token']:.1f} mJ")
        rows.append(row)
    return columns(rows, right=range(2, len(rows[0])))
