"""How near is the memory that `slmops needs --train` foresees to the measured peak of trainings of real architectures?

Models of the catalogue get random weights and a made-up tokenizer as large as their vocabulary (`benchmarks/needs.py`). Each training is a
whole method from a folder of examples to a saved model, three steps long, in a fresh process; its peak is the largest resident size
that the system saw of it (ru_maxrss). All examples are as long as the context, as the prediction takes them to be.

    .venv/bin/python benchmarks/needs_training.py                    # the cases of the guide: the largest takes 6 GB
    .venv/bin/python benchmarks/needs_training.py --only smollm2-135m lora
    .venv/bin/python benchmarks/needs_training.py --table            # measures nothing, compares what is kept with the prediction

Prints the table and writes build/bench/needs/training.json.
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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from slmops.catalog import models
from slmops.flow.training_needs import TrainingNeeds, foresee, model_of, way_of

WORK = Path("build/bench/needs")
STEPS = 3


@dataclass(frozen=True)
class Case:
    """A training. `answer`: how many of the `context` tokens of an example are learned."""

    model: str
    way: str
    batch: int
    context: int
    answer: int
    teacher: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    examples: int = 24

    @property
    def name(self) -> str:
        """For people and for what is kept."""
        more = [f"teacher {self.teacher}"] if self.teacher else []
        more += [key if value is True else f"{key} {value}" for key, value in self.settings.items()]
        return ", ".join([f"{self.model} {self.way}", *more, f"{self.batch} × {self.context}, {self.answer} learned"])


CASES = (
    Case("smollm2-135m-instruct", "full", 2, 128, 64, examples=100),
    Case("smollm2-135m-instruct", "lora", 4, 256, 64, examples=100),
    Case("smollm2-135m-instruct", "qlora", 4, 256, 128, examples=100),
    Case("smollm2-135m-instruct", "logits", 2, 96, 48, teacher="smollm2-360m-instruct"),
    Case("smollm2-135m-instruct", "hidden_states", 2, 128, 64, teacher="smollm2-360m-instruct"),
    Case("smollm2-360m-instruct", "lora", 2, 192, 96),
    Case("gemma-3-270m-it", "lora", 2, 128, 64),
)


def predict(case: Case, hardware: bool | None = None) -> TrainingNeeds:
    """As `slmops needs` does; no torch is imported. `hardware`: whether the processor multiplies bfloat16; default: this one."""
    from slmops.flow.methods import bf16

    catalogue, low = models.load(), bf16() == "yes" if hardware is None else hardware
    model, teacher = (
        model_of(name, models.find(catalogue, name).config) for name in (case.model, case.teacher or case.model)
    )
    return foresee(case.way, model, teacher, case.batch, case.context, case.answer, case.examples, case.settings, low)


def text(tokenizer: Any, chance: random.Random, tokens: int, words: list[str]) -> str:
    """A text of `tokens` tokens."""
    while True:
        found = [chance.choice(words)]
        while len(tokenizer.encode(" ".join(found), add_special_tokens=False)) < tokens:
            found.append(chance.choice(words))
        while len(tokenizer.encode(" ".join(found), add_special_tokens=False)) > tokens:
            found.pop()
        while (size := len(tokenizer.encode(" ".join(found), add_special_tokens=False))) < tokens:
            found.append(chance.choice("0123456789"))
        if size == tokens:
            return " ".join(found)


def prepare(case: Case, folder: Path) -> None:
    """Examples of exactly the context, as the chat template writes them."""
    from slmops.core.example import Example, Message
    from slmops.engines.tokenizer import load_tokenizer

    tokenizer, chance = load_tokenizer(WORK / case.model / "source"), random.Random(1)
    words = [piece for piece in tokenizer.get_vocab() if piece.isascii() and piece.isalpha() and len(piece) > 2]
    marks = 3  # <|user|> … <|end|><|assistant|> of the prompt; the answer has <|end|>
    (folder / "data").mkdir()
    with (folder / "data" / "train.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(case.examples):
            prompt = text(tokenizer, chance, case.context - case.answer - marks, words)
            answer, rejected = (text(tokenizer, chance, case.answer - 1, words) for _ in range(2))
            pairs = rejected if way_of(case.way)[0] in ("dpo", "orpo") else None
            example = Example((Message("user", prompt),), answer, "gold", rejected=pairs)
            file.write(json.dumps(example.to_json()) + "\n")


def run(case: Case, folder: Path, method: str, out: str) -> dict[str, Any]:
    """One method on the folders that are there."""
    from slmops.core.method import Context

    module = importlib.import_module(f"slmops.train.{method}")
    inputs = {"data": folder / "data", "base": WORK / case.model / "source"}
    teacher = WORK / (case.teacher or case.model) / "source"
    if "teacher" in module.DECLARATION.takes:
        inputs["teacher"] = teacher
    if (folder / "logits").is_dir():
        inputs["logits"] = folder / "logits"
    params: dict[str, Any] = {"files": ["data/train.jsonl"]}
    if "training" in module.Params.model_fields:
        wanted, tuning = way_of(case.way)
        params["training"] = {
            "max_steps": STEPS,
            "batch_size": case.batch,
            "max_length": case.context,
            "tuning": tuning,
        }
        params["training"] |= case.settings
        if wanted != "sequence":
            params["training"] |= {"method": wanted}
        if wanted == "on_policy":
            params["training"] |= {"on_policy": {"max_new_tokens": case.answer}}
    else:
        inputs = {"data": folder / "data", "teacher": teacher}
        params |= {"batch_size": case.batch, "max_length": case.context}
    for name in ("scratch", out):
        (folder / name).mkdir(exist_ok=True)
    context = Context(1, folder / "scratch", folder, 1)
    facts: dict[str, Any] = module.run(
        module.Params.model_validate(params, strict=False), inputs, folder / out, context
    )
    return facts


def train(case: Case, folder: Path) -> dict[str, Any]:
    """The body of a worker: the whole training; peak in bytes."""
    method = way_of(case.way)[0]
    begin = time.monotonic()
    facts = run(case, folder, "sft" if method == "sequence" else method, "out")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    wanted = ("parameters", "precision", "steps", "tokens")
    return {
        "peak": peak,
        "seconds": time.monotonic() - begin,
        **{name: facts[name] for name in wanted if name in facts},
    }


def measure(case: Case) -> dict[str, Any]:
    """One training in a process of its own; others make the model and the examples."""
    for name in {case.model, case.teacher or case.model}:
        if not (WORK / name / "source").is_dir():
            subprocess.run([sys.executable, str(Path(__file__).with_name("needs.py")), "--make", name], check=True)
    folder = Path(tempfile.mkdtemp(prefix="slmops-needs-", dir=WORK))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    parts = ["--prepare", *(["--cache"] if way_of(case.way)[0] == "logits" else []), "--worker"]
    try:
        for part in parts:
            words = [sys.executable, __file__, "--case", json.dumps(asdict(case)), part, str(folder)]
            done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
            if done.returncode:
                raise SystemExit(f"{case.name}: failed\n{done.stderr[-3000:]}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {"case": case.name, "definition": asdict(case), **found}


def table(kept: dict[str, dict[str, Any]]) -> str:
    """Markdown; MB of 1e6 bytes."""
    lines = [
        "| model | training | batch × context | learned | foreseen | measured | off |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    offs = []
    for case in CASES:
        if case.name not in kept:
            continue
        foreseen, measured = predict(case).memory.peak, kept[case.name]["peak"]
        offs.append(foreseen / measured - 1)
        more = "".join(f", {key}" if value is True else f", {key} {value}" for key, value in case.settings.items())
        taught = f" from {case.teacher}" if case.teacher else ""
        lines.append(
            f"| {case.model} | {case.way}{taught}{more} | {case.batch} × {case.context} | {case.answer} "
            f"| {foreseen / 1e6:,.0f} MB | {measured / 1e6:,.0f} MB | {100 * offs[-1]:+.1f} % |"
        )
    worst = max((abs(off) for off in offs), default=0.0)
    return "\n".join(
        [*lines, "", f"{len(offs)} cases, the worst {100 * worst:.1f} % off; no constant was taken from them"]
    )


def main() -> int:
    """Measure the cases, keep the numbers, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="cases whose name holds all of these")
    parser.add_argument(
        "--table", action="store_true", help="measure nothing, compare what is kept with the prediction"
    )
    for hidden in ("--case", "--prepare", "--cache", "--worker"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        case = Case(**json.loads(options.case))
        if options.prepare:
            prepare(case, Path(options.prepare))
        elif options.cache:
            run(case, Path(options.cache), "cache_logits", "logits")
        else:
            print(json.dumps(train(case, Path(options.worker))))
        return 0
    WORK.mkdir(parents=True, exist_ok=True)
    file = WORK / "training.json"
    kept = {row["case"]: row for row in (json.loads(file.read_text()) if file.is_file() else [])}
    for case in CASES if not options.table else ():
        if options.only and not all(word in case.name for word in options.only):
            continue
        row = measure(case)
        foreseen = predict(case).memory
        kept[case.name] = row | {"predicted": foreseen.peak, "held": foreseen.held, "moments": foreseen.moments}
        file.write_text(json.dumps(list(kept.values()), indent=1) + "\n")
        off = 100 * (foreseen.peak / row["peak"] - 1)
        print(f"{row['seconds']:5.0f} s  {case.name}: {foreseen.peak / 1e6:.0f}, measured {row['peak'] / 1e6:.0f} MB ({off:+.1f} %)",
              file=sys.stderr, flush=True)  # fmt: skip
    print(table(kept))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
