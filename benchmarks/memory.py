"""How well slmops foresees the memory of trainings, and of teachers' passes, on the CPU: predicted and measured peaks, a table and JSON.

    python benchmarks/memory.py              # all that is reported: about eight minutes on two cores
    python benchmarks/memory.py --fit        # those that the constants were fitted on
    python benchmarks/memory.py --only pass, # teachers' passes alone

Each training is a whole method from a folder of examples to a saved model, some steps long, in a fresh process; its peak is the
largest resident size that the system saw of it (ru_maxrss), libraries and page tables of all threads included. The prediction
is made in this process, which imports no torch, from the same numbers that a run knows before it trains.

Nothing was fitted on those in REPORTED: the constants of `slmops.train.memory` and `pass_memory` come from those in FITTED, which share no
shape with them. Lengths of the examples differ by a factor of three, as real ones do: the
allocator's waste comes from that.
"""

from __future__ import annotations

import argparse
import importlib
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
PAIRS = ("dpo", "orpo")
PASSES = {"cache_logits": "logits", "cache_aligned": "aligned"}
CACHES = {"logits": ("cache_logits", "logits"), "cross_tokenizer": ("cache_aligned", "aligned")}


@dataclass(frozen=True)
class Case:
    """A training, or a teacher's pass: `tokens` are the mean of prompt and answer; lengths lie between half and one and a half of it.

    Of a pass, `architecture` is the teacher's, `teacher` that of a second one, and `training` are the pass's own settings.
    """

    name: str
    architecture: dict[str, Any]
    vocabulary: int
    tokens: tuple[int, int]
    training: dict[str, Any] = field(default_factory=dict)
    steps: int = 6
    spare: int = 0
    method: str = "sft"
    teacher: dict[str, Any] | None = None
    stored: str = "float32"

    @property
    def based(self) -> bool:
        """Whether the training goes on from a model that exists."""
        return self.method == "dpo" or self.training.get("tuning", "full") != "full"

    def lengths(self, count: int, seed: int) -> list[tuple[int, int, int]]:
        """Tokens of each example's prompt, answer and rejected answer, marks included."""
        rng = random.Random(seed)

        def near(mean: int) -> int:
            return max(5, round(mean * rng.uniform(0.5, 1.5)))

        rows = [(near(self.tokens[0]), near(self.tokens[1])) for _ in range(count)]
        return [(*row, near(self.tokens[1])) for row in rows]

    @property
    def examples(self) -> int:
        if self.method in PASSES:
            return self.spare
        return self.steps * int(self.training.get("batch_size", 64)) + self.spare


def _architecture(shape: str) -> dict[str, Any]:
    """Of `TYPE LAYERSxHIDDEN/HEADS[/KV_HEADS]`."""
    kind, _, rest = shape.partition(" ")
    size, heads, *more = rest.split("/")
    layers, hidden = size.split("x")
    found: dict[str, Any] = {"type": kind, "layers": int(layers), "hidden": int(hidden), "heads": int(heads)}
    return found | ({"kv_heads": int(more[0])} if more else {}) | {"context": 512}


def _case(
    name: str, shape: str, vocabulary: int, tokens: tuple[int, int], spare: int = 0, steps: int = 6, method: str = "sft",
    teacher: str = "", **training: Any,
) -> Case:  # fmt: skip
    taught = _architecture(teacher) if teacher else None
    return Case(name, _architecture(shape), vocabulary, tokens, training, steps, spare, method, taught)


def _pass(name: str, shape: str, vocabulary: int, tokens: tuple[int, int], examples: int, method: str = "cache_logits",
          second: str = "", stored: str = "float32", **settings: Any) -> Case:  # fmt: skip
    other = _architecture(second) if second else None
    return Case(name, _architecture(shape), vocabulary, tokens, settings, 0, examples, method, other, stored)


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
    _case("again", "llama 6x320/5", 4000, (60, 20), steps=4, batch_size=32, checkpointing=True, precision="fp32"),
    _case("lora, again", "llama 6x320/5", 4000, (90, 30), steps=4, batch_size=32, checkpointing=True, tuning="lora"),
    _case("lora", "llama 6x448/7", 4000, (60, 20), steps=4, batch_size=24, tuning="lora", precision="fp32"),
    _case("qlora", "llama 6x448/7", 4000, (60, 20), steps=4, batch_size=24, tuning="qlora", precision="fp32"),
    _case("adapter", "llama 5x384/6", 4000, (60, 20), steps=4, batch_size=24, tuning="adapter", precision="bf16"),
    _case("dora", "qwen3 4x384/6", 3000, (60, 20), steps=4, batch_size=24, tuning="dora"),
    _case("logits", "llama 3x224/4", 4400, (40, 16), steps=4, batch_size=48, method="logits", teacher="llama 4x256/4"),
    _case("on policy", "llama 3x224/4", 4400, (40, 16), steps=8, batch_size=24, method="on_policy", teacher="llama 4x256/4"),
    _case("hidden", "llama 3x224/4", 4400, (40, 16), steps=4, batch_size=32, method="hidden_states", teacher="llama 4x320/5"),
    _case("dpo", "llama 4x288/4", 4400, (40, 16), steps=4, batch_size=24, method="dpo"),
    _pass("pass, small", "llama 2x128/4", 2000, (40, 10), 600),
    _pass("pass, wide", "llama 4x448/7", 6000, (60, 20), 500),
    _pass("pass, vocabulary", "llama 2x256/4", 30000, (30, 20), 400),
    _pass("pass, many", "llama 1x96/4", 3000, (24, 10), 8000, samples=12),
    _pass("pass, top k", "qwen3 3x320/5", 12000, (40, 16), 1200, selection="top_k", samples=32),
    _pass("pass, fp32", "llama 6x320/5", 5000, (90, 20), 500, precision="fp32"),
    _pass("pass, two teachers", "llama 3x256/4", 9000, (40, 16), 400, second="llama 2x320/5"),
    _pass("pass, aligned", "llama 4x320/5", 8000, (40, 16), 2500, method="cache_aligned"),
)  # fmt: skip

REPORTED = (
    _case("1M llama", "llama 3x160/5", 2048, (32, 12), batch_size=64),
    _case("5M llama", "llama 6x248/4", 2600, (30, 14), batch_size=48, steps=5),
    _case("5M qwen3, grouped heads", "qwen3 5x288/6/2", 1500, (48, 16), batch_size=20, precision="fp32"),
    _case("14M, long rows", "llama 7x384/6", 6000, (180, 40), batch_size=6, steps=4),
    _case("14M, four parts", "llama 7x384/6", 6000, (180, 40), batch_size=12, accumulate=4, steps=3),
    _case("14M, checkpointing", "llama 7x384/6", 6000, (180, 40), batch_size=12, checkpointing=True, steps=3),
    _case("20M, big vocabulary", "llama 3x400/8", 40000, (28, 10), batch_size=20, steps=4),
    _case("30M, dropout", "llama 9x512/8", 5000, (20, 10), batch_size=12, dropout=0.1, steps=3),
    _case("60M", "llama 12x608/8", 9000, (20, 8), batch_size=6, steps=3),
    _case("9M, int4-aware", "llama 5x352/11", 3500, (36, 12), batch_size=24, quantization_aware="int4", steps=5),
    _case("3M, packed", "llama 4x208/4", 1800, (36, 12), batch_size=28, batching="pack", steps=5),
    _case("lora", "llama 8x512/8", 6000, (70, 30), batch_size=20, tuning="lora", steps=3),
    _case("lora with dropout, parts", "qwen3 5x416/8/4", 5000, (50, 20), batch_size=36, accumulate=3, tuning="lora", steps=3,
          lora={"rank": 8, "dropout": 0.1}),
    _case("lora, checkpointing", "llama 8x512/8", 6000, (120, 30), batch_size=32, tuning="lora", checkpointing=True, steps=3),
    _case("dora", "llama 5x480/8", 5200, (50, 20), batch_size=20, tuning="dora", steps=3),
    _case("qlora", "llama 9x544/8", 5000, (70, 30), batch_size=12, tuning="qlora", steps=3),
    _case("adapter", "qwen3 6x432/6", 5200, (50, 20), batch_size=28, tuning="adapter", steps=3),
    _case("logits", "llama 4x264/4", 5600, (36, 20), batch_size=36, method="logits", teacher="llama 5x320/4", steps=4),
    _case("on-policy", "llama 4x264/4", 5600, (36, 20), batch_size=20, method="on_policy", teacher="llama 6x352/4", steps=8),
    _case("hidden states", "qwen3 4x264/4", 5600, (36, 20), batch_size=28, method="hidden_states", teacher="qwen3 5x352/4", steps=4),
    _case("cross-tokenizer", "llama 4x264/4", 5600, (36, 20), batch_size=36, method="cross_tokenizer", teacher="llama 5x320/4",
          steps=4),
    _case("dpo", "qwen3 5x312/6", 5200, (36, 20), batch_size=18, method="dpo", steps=4),
    _case("dpo, lora", "llama 7x392/7", 3600, (50, 20), batch_size=12, method="dpo", tuning="lora", steps=4),
    _case("lora, checkpointing, qwen3", "qwen3 7x368/8/4", 4600, (80, 25), batch_size=26, tuning="lora", checkpointing=True, steps=3),
    _case("adapter, two parts", "llama 6x464/8", 4600, (60, 25), batch_size=26, tuning="adapter", accumulate=2, steps=3),
    _case("lora, embeddings", "llama 6x448/8", 12000, (50, 20), batch_size=20, tuning="lora", steps=3,
          lora={"rank": 16, "embeddings": True}),
    _case("qlora, embeddings, qwen3", "qwen3 5x384/6", 16000, (40, 20), batch_size=24, tuning="qlora", steps=3,
          lora={"rank": 16, "embeddings": True}),
    _case("orpo", "llama 5x312/6", 5200, (36, 20), batch_size=18, method="orpo", steps=4),
    _pass("pass, 3M", "llama 4x224/4", 4000, (36, 14), 700),
    _pass("pass, 19M", "llama 6x480/8", 9000, (70, 24), 300),
    _pass("pass, 48M", "llama 10x608/8", 8000, (40, 16), 150),
    _pass("pass, vocabulary of 50,000", "qwen3 2x320/5", 50000, (30, 16), 250),
    _pass("pass, top k, batches of 16", "llama 3x288/4", 9000, (120, 40), 250, selection="top_k", samples=50, batch_size=16),
    _pass("pass, two teachers", "qwen3 4x288/4", 7000, (40, 16), 400, second="llama 3x352/4"),
    _pass("pass, from a file in bf16", "llama 6x512/8", 6000, (40, 16), 250, stored="bfloat16"),
    _pass("pass, many examples", "llama 2x112/4", 2600, (20, 10), 9000),
    _pass("pass, 28M qwen3", "qwen3 5x640/10", 7000, (50, 12), 200),
    _pass("pass, long rows", "llama 2x512/8", 4000, (260, 40), 160),
    _pass("pass, aligned", "qwen3 5x352/4", 6000, (40, 16), 900, method="cache_aligned"),
)  # fmt: skip


def predict(case: Case) -> Any:
    """What slmops foresees. No torch is imported."""
    import numpy as np

    from slmops.core.spec import Architecture, Train
    from slmops.flow.methods import bf16
    from slmops.train import memory, pass_memory
    from slmops.train.shape import Shape

    if case.method in PASSES:
        settings = pass_memory.Settings(PASSES[case.method], **case.training)  # type: ignore[arg-type]
        pairs = np.array(case.lengths(case.examples, 0))
        given = pass_memory.Load.of(pairs[:, :2].sum(1), pairs[:, 0], settings.batch_size)
        shapes = [Shape.of(Architecture(**a), case.vocabulary) for a in (case.architecture, case.teacher) if a]
        file = 0 if case.stored == "float32" else 2 * sum(shape.parameters for shape in shapes)
        return pass_memory.memory(settings, given, shapes, bf16() == "yes", file)
    settings = {"max_steps": case.steps, **case.training}
    training = Train.model_validate(settings | ({} if case.method == "sft" else {"method": case.method}))
    shape = Shape.of(Architecture(**case.architecture), case.vocabulary)
    asked = case.teacher is not None and case.method not in CACHES
    teacher = Shape.of(Architecture(**case.teacher), case.vocabulary) if case.teacher and asked else None
    rows, held = np.array(case.lengths(case.examples, 0)), np.array(case.lengths(VALIDATION, 1))
    rejected = rows[:, 0] + rows[:, 2] if case.method in PAIRS else None
    load = memory.Load.of(rows[:, :2].sum(1), rows[:, 0], training, 1, held[:, :2].sum(1), rejected)
    low = memory.computes_in_bf16(training.precision, shape, bf16() == "yes")
    return memory.memory(shape, training, load, bf16=low, teacher=teacher)


def write_inputs(case: Case, folder: Path) -> None:
    """What the training reads, in folders named as its inputs: a tokenizer that knows `vocabulary` words, examples of known
    lengths, and as the method needs it a base, a teacher or what its pass leaves."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from slmops.core.example import Example, Message
    from slmops.core.spec import Architecture
    from slmops.train import network

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
            for prompt, answer, other in case.lengths(count, seed):
                rejected = some(other - 1) if case.method in PAIRS else None
                example = Example((Message("user", some(prompt - 3)),), some(answer - 1), "gold", rejected=rejected)
                file.write(json.dumps(example.to_json()) + "\n")
    made = (("base", case.architecture if case.based else None), ("teacher", case.teacher))
    if case.method in PASSES:
        made = (("teacher", case.architecture), ("teacher.b", case.teacher))
    for name, shape in made:
        if shape is not None:
            model = network.build(Architecture(**shape), fast, 3)
            network.save(model.to(getattr(torch, case.stored)), folder / "tokenizer", folder / name)
    if case.method in CACHES:
        _run(CACHES[case.method][0], case, folder, CACHES[case.method][1])


def _run(method: str, case: Case, folder: Path, out: str, threads: int = 2) -> dict[str, Any]:
    """Run a method on the folders that are there."""
    from slmops.core.method import Context

    module = importlib.import_module(f"slmops.train.{method}")
    takes = {name.rstrip("?") for name in module.DECLARATION.takes}
    takes |= {"teacher.b"} if "teacher.*" in takes else set()
    inputs = {name: folder / name for name in takes if (folder / name).is_dir()}
    if case.based and method != "cache_logits":
        inputs.pop("tokenizer", None)
    params: dict[str, Any] = {"files": ["data/train.jsonl"]}
    if "training" in module.Params.model_fields:
        params["training"] = {"max_steps": case.steps, **case.training}
        if method != "sft":
            params["training"]["method"] = method
        params["architecture"] = None if case.based else case.architecture
        params["validation"] = "data/validation.jsonl"
    if method in PASSES and method == case.method:
        params |= case.training
    for name in ("scratch", out):
        (folder / name).mkdir(exist_ok=True)
    context = Context(1, folder / "scratch", folder, threads)
    facts: dict[str, Any] = module.run(
        module.Params.model_validate(params, strict=False), inputs, folder / out, context
    )
    return facts


def train(case: Case, folder: Path, threads: int) -> dict[str, Any]:
    """The body of a worker: the whole training; peak in bytes."""
    begin = time.monotonic()
    facts = _run(case.method, case, folder, "out", threads)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    wanted = ("parameters", "precision", "steps", "tokens")
    if case.method in PASSES:
        from slmops.core.spec import Architecture
        from slmops.train.shape import parameters

        shapes = [Architecture(**shape) for shape in (case.architecture, case.teacher) if shape]
        facts |= {"parameters": sum(parameters(shape, case.vocabulary) for shape in shapes)}
    return {"peak": peak, "seconds": time.monotonic() - begin, **{n: facts[n] for n in wanted if n in facts}}


def measure(case: Case, threads: int) -> dict[str, Any]:
    """One training in a process of its own, beside what was foreseen. Another process writes its inputs."""
    foreseen = predict(case)
    folder = Path(tempfile.mkdtemp(prefix="slmops-memory-"))
    words = [sys.executable, __file__, "--case", json.dumps(asdict(case)), "--threads", str(threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "TQDM_DISABLE": "1"}
    try:
        for part in ("--prepare", "--worker"):
            done = subprocess.run(
                [*words, part, str(folder)], capture_output=True, text=True, env=environment, check=False
            )
            if done.returncode:
                raise SystemExit(f"{case.name}: the training failed\n{done.stderr[-2000:]}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return {
        "case": case.name, **found, "predicted": foreseen.peak, "ratio": foreseen.peak / found["peak"],
        "held": foreseen.held, "moments": foreseen.moments, "definition": asdict(case),
    }  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table; MB of 1e6 bytes."""
    lines = [
        "| training or pass | parameters | precision | predicted MB | measured MB | predicted / measured |",
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
    for hidden in ("--case", "--prepare", "--worker"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        told = json.loads(options.case)
        case = Case(**{**told, "tokens": tuple(told["tokens"])})
        if options.prepare:
            write_inputs(case, Path(options.prepare))
        else:
            print(json.dumps(train(case, Path(options.worker), options.threads)))
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
