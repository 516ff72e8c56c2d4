"""How well slmops foresees the memory of a training on the CPU: predicted and measured peaks, a table and JSON.

    python benchmarks/memory.py              # the shapes that are reported: about three minutes on two cores
    python benchmarks/memory.py --fit        # the shapes that the constants of slmops.train.memory were fitted on

Each training is `train.sft` from a folder of examples to a saved model, some steps long, in a fresh process; its peak is the
largest resident size that the system saw of it (ru_maxrss), libraries and page tables of all threads included. The prediction
is made in this process, which imports no torch, from the same numbers that a run knows before it trains.

Nothing was fitted on the shapes in REPORTED: `LIBRARIES`, `WASTE` and `SPREAD` of `slmops.train.memory` come from those in FITTED,
which share no width, depth, vocabulary or batch with them. Lengths of the examples differ by a factor of three, as real ones do: the
allocator's waste comes from that.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

BUILD = Path(__file__).resolve().parent.parent / "build" / "bench"
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|> {{ m.content }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
MARKS = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>")
VALIDATION = 16


@dataclass(frozen=True)
class Case:
    """A training: `tokens` are the mean of prompt and answer; lengths lie between half and one and a half of it."""

    name: str
    architecture: dict[str, Any]
    vocabulary: int
    tokens: tuple[int, int]
    training: dict[str, Any] = field(default_factory=dict)
    steps: int = 6
    spare: int = 0

    def lengths(self, count: int, seed: int) -> list[tuple[int, int]]:
        """Prompt and answer tokens of each example, marks included."""
        rng = random.Random(seed)

        def near(mean: int) -> int:
            return max(5, round(mean * rng.uniform(0.5, 1.5)))

        return [(near(self.tokens[0]), near(self.tokens[1])) for _ in range(count)]

    @property
    def examples(self) -> int:
        return self.steps * int(self.training.get("batch_size", 64)) + self.spare


def _case(
    name: str, shape: str, vocabulary: int, tokens: tuple[int, int], spare: int = 0, steps: int = 6, **training: Any
) -> Case:  # fmt: skip
    """`shape` is `TYPE LAYERSxHIDDEN/HEADS[/KV_HEADS]`."""
    kind, _, rest = shape.partition(" ")
    size, heads, *more = rest.split("/")
    layers, hidden = size.split("x")
    architecture: dict[str, Any] = {"type": kind, "layers": int(layers), "hidden": int(hidden), "heads": int(heads)}
    if more:
        architecture["kv_heads"] = int(more[0])
    architecture["context"] = 512
    return Case(name, architecture, vocabulary, tokens, training, steps, spare)


FITTED = (
    _case("small", "llama 2x96/4", 1000, (24, 8), batch_size=32),
    _case("qwen3", "qwen3 4x256/4", 3000, (40, 10), batch_size=24),
    _case("wide", "llama 2x512/8", 12000, (24, 8), steps=4, batch_size=16),
    _case("long rows", "llama 8x224/7/1", 2000, (100, 28), steps=4, batch_size=16),
    _case("big vocabulary", "llama 1x256/4", 32000, (40, 24), steps=4, batch_size=32, precision="fp32"),
    _case("large", "llama 8x640/10", 4000, (24, 8), steps=3, batch_size=8, precision="bf16"),
    _case("many examples", "llama 1x64/2", 4000, (24, 8), spare=20000, batch_size=32, max_steps=6),
    _case("medium", "llama 6x320/5", 4000, (60, 20), steps=4, batch_size=32, precision="bf16"),
    _case("parts", "llama 6x320/5", 4000, (60, 20), steps=4, batch_size=32, accumulate=4, precision="fp32"),
    _case("two parts", "llama 4x272/4", 2400, (80, 20), steps=4, batch_size=24, accumulate=2),
    _case("rounded", "llama 3x448/7", 7000, (44, 12), steps=5, batch_size=16, quantization_aware="int4"),
    _case("parts, rounded", "llama 6x320/5", 4000, (60, 20), steps=4, batch_size=32, accumulate=4, quantization_aware="int4"),
)  # fmt: skip

REPORTED = (
    _case("1M llama", "llama 3x160/5", 2048, (32, 12), batch_size=64),
    _case("5M llama", "llama 6x248/4", 2600, (30, 14), batch_size=48, steps=5),
    _case("5M qwen3, grouped heads", "qwen3 5x288/6/2", 1500, (48, 16), batch_size=20, precision="fp32"),
    _case("14M, long rows", "llama 7x384/6", 6000, (180, 40), batch_size=6, steps=4),
    _case("14M, four parts", "llama 7x384/6", 6000, (180, 40), batch_size=12, accumulate=4, steps=3),
    _case("20M, big vocabulary", "llama 3x400/8", 40000, (28, 10), batch_size=20, steps=4),
    _case("30M, dropout", "llama 9x512/8", 5000, (20, 10), batch_size=12, dropout=0.1, steps=3),
    _case("60M", "llama 12x608/8", 9000, (20, 8), batch_size=6, steps=3),
    _case("9M, int4-aware", "llama 5x352/11", 3500, (36, 12), batch_size=24, quantization_aware="int4", steps=5),
    _case("3M, packed", "llama 4x208/4", 1800, (36, 12), batch_size=28, batching="pack", steps=5),
)  # fmt: skip


def predict(case: Case) -> tuple[Any, Any]:
    """What slmops foresees: shape and memory. No torch is imported."""
    import numpy as np

    from slmops.core.spec import Architecture, Training
    from slmops.flow.methods import bf16
    from slmops.train import memory
    from slmops.train.shape import Shape

    training = Training.model_validate(case.training)
    shape = Shape.of(Architecture(**case.architecture), case.vocabulary)
    rows, held = np.array(case.lengths(case.examples, 0)), np.array(case.lengths(VALIDATION, 1))
    load = memory.Load.of(rows.sum(1), rows[:, 0], training, 1, held.sum(1))
    low = memory.computes_in_bf16(training, shape, bf16() == "yes")
    return shape, memory.memory(shape, training, load, bf16=low)


def write_inputs(case: Case, folder: Path) -> dict[str, Path]:
    """A tokenizer that knows `vocabulary` words, and examples of known lengths."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from slmops.core.example import Example, Message

    words = {word: number for number, word in enumerate(MARKS)}
    words |= {f"w{number}": number for number in range(len(MARKS), case.vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=MARKS[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=MARKS[0], eos_token=MARKS[1], additional_special_tokens=list(MARKS[2:])
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder / "tokenizer")
    rng = random.Random(2)

    def some(count: int) -> str:
        return " ".join(f"w{rng.randrange(len(MARKS), case.vocabulary)}" for _ in range(count))

    (folder / "data").mkdir()
    for name, count, seed in (("train", case.examples, 0), ("validation", VALIDATION, 1)):
        with (folder / "data" / f"{name}.jsonl").open("w") as file:
            for prompt, answer in case.lengths(count, seed):
                example = Example((Message("user", some(prompt - 3)),), some(answer - 1), "gold")
                file.write(json.dumps(example.to_json()) + "\n")
    return {"data": folder / "data", "tokenizer": folder / "tokenizer"}


def train(case: Case, threads: int) -> dict[str, Any]:
    """The body of a worker: the whole training; peak in bytes."""
    from slmops.core.method import Context
    from slmops.core.spec import Architecture, Training
    from slmops.train import sft

    folder = Path(tempfile.mkdtemp(prefix="slmops-memory-"))
    try:
        inputs = write_inputs(case, folder)
        for name in ("scratch", "out"):
            (folder / name).mkdir()
        settings = {"max_steps": case.steps, **case.training}
        params = sft.Params(
            training=Training.model_validate(settings), architecture=Architecture(**case.architecture),
            files=("data/train.jsonl",), validation="data/validation.jsonl",
        )  # fmt: skip
        begin = time.monotonic()
        facts = sft.run(params, inputs, folder / "out", Context(1, folder / "scratch", folder, threads))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        wanted = ("parameters", "precision", "steps", "tokens")
        return {"peak": peak, "seconds": time.monotonic() - begin, **{name: facts[name] for name in wanted}}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure(case: Case, threads: int) -> dict[str, Any]:
    """One training in a process of its own, beside what was foreseen."""
    shape, foreseen = predict(case)
    words = [sys.executable, __file__, "--worker", json.dumps(asdict(case)), "--threads", str(threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "TQDM_DISABLE": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{case.name}: the training failed\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    if found["parameters"] != shape.parameters:
        raise SystemExit(f"{case.name}: {found['parameters']} parameters, {shape.parameters} were foreseen")
    return {
        "case": case.name, **found, "predicted": foreseen.peak, "ratio": foreseen.peak / found["peak"],
        "held": foreseen.held, "moments": foreseen.moments, "definition": asdict(case),
    }  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table; MB of 1e6 bytes."""
    lines = [
        "| training | parameters | precision | predicted MB | measured MB | predicted / measured |",
        "| --- | ---: | --- | ---: | ---: | ---: |",
    ]
    for r in rows:
        lines.append(
            f"| {r['case']} | {r['parameters'] / 1e6:.1f} M | {r['precision']} | {r['predicted'] / 1e6:,.0f} "
            f"| {r['peak'] / 1e6:,.0f} | {r['ratio']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the cases, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true", help="the shapes that constants were fitted on")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="cases whose name holds one of these")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help="default: build/bench/memory.json, with --fit memory-fit.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        told = json.loads(options.worker)
        print(json.dumps(train(Case(**{**told, "tokens": tuple(told["tokens"])}), options.threads)))
        return
    offered = FITTED if options.fit else REPORTED
    cases = [c for c in offered if not options.only or any(text in c.name for text in options.only)]
    if not cases:
        raise SystemExit(f"no case is called {options.only}; there are: {', '.join(c.name for c in offered)}")
    rows, begin = [], time.monotonic()
    for case in cases:
        rows.append(measure(case, options.threads))
        r = rows[-1]
        print(
            f"{time.monotonic() - begin:5.0f} s  {case.name}: predicted {r['predicted'] / 1e6:.0f} MB, measured "
            f"{r['peak'] / 1e6:.0f} MB ({r['ratio']:.2f})",
            file=sys.stderr, flush=True,
        )  # fmt: skip
    out = options.json or BUILD / ("memory-fit.json" if options.fit else "memory.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(
        json.dumps({"fitted_on_these": options.fit, "threads": options.threads, "cases": rows}, indent=1) + "\n"
    )
    print(table(rows))
    off = [abs(r["ratio"] - 1) for r in rows]
    print(f"\noff by {sum(off) / len(off):.0%} on average, at most {max(off):.0%}; wrote {out}")


if __name__ == "__main__":
    main()
