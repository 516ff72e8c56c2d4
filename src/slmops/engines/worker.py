"""A fresh process that runs one model and says how long it took and how much memory it held.

`python -m slmops.engines.worker JOB.json RESULT.json`. The job names the model folder, its runtime, the threads, the
prompts (lists of messages), how many new tokens, how many warm-up answers to throw away, and maybe the `kv_cache`; the result holds seconds
per prompt, tokens per prompt, seconds to load, and peak resident bytes after the imports and at the end.

A job with `prompt_tokens` instead of prompts is for speed alone (`slmops bench`): for each of these lengths, `repeats`
answers of exactly `max_new_tokens` to a made-up text, and the energy of all answers where the processor tells it. With `batch`
above 1, so many different texts of that length are answered at once each time.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any, cast

from slmops.core.engine import AtOnce, Engine, Generation, Sampling
from slmops.engines import open_engine
from slmops.errors import ModelError, SlmopsError

LIBRARIES = {
    "torch": ("torch", "transformers"),
    "onnx_genai": ("numpy", "onnxruntime_genai"),
    "llama_cpp": ("numpy", "llama_cpp"),
    "mlx": ("numpy", "tokenizers", "mlx.core", "mlx_lm.utils"),
    "openvino": ("numpy", "tokenizers", "openvino"),
    "litert": ("numpy", "tokenizers", "ai_edge_litert.compiled_model"),
    "executorch": ("numpy", "tokenizers", "torch", "executorch.extension.pybindings._C"),
}


def peak_bytes() -> int:
    """The most memory that this process has held resident, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        import psutil

        return int(getattr(psutil.Process().memory_info(), "peak_wset", 0))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


RAPL = Path("/sys/class/powercap")
WORDS = [
    "the",
    "parcel",
    "has",
    "not",
    "come",
    "yet",
    "and",
    "I",
    "want",
    "my",
    "money",
    "back",
    "please",
    "7",
    "days",
    "later",
]


def energy(root: Path = RAPL) -> float | None:
    """Joules that the processor packages have used since some time in the past; None where nobody may read it (RAPL)."""
    try:
        files = [path / "energy_uj" for path in sorted(root.glob("intel-rapl:*")) if path.name.count(":") == 1]
        return sum(int(file.read_text()) for file in files) / 1e6 if files else None
    except (OSError, ValueError):
        return None


def opened(job: dict[str, Any]) -> tuple[Engine, int, float]:
    """The engine of a job, the peak after the imports in bytes, and the seconds to load."""
    for library in LIBRARIES[job["runtime"]]:
        importlib.import_module(library)
    imported = peak_bytes()
    started = time.perf_counter()
    engine = open_engine(Path(job["folder"]), threads=job["threads"], kind=job["runtime"], kv_cache=job.get("kv_cache"))
    return engine, imported, time.perf_counter() - started


def passage(engine: Engine, length: int, number: int = 0) -> list[int]:
    """The first `length` tokens of a conversation with a long made-up message, another one for each number."""
    start = [f"{number}:"] if number else []
    text = " ".join([*start, *(WORDS[(i * i + 3 * i) % len(WORDS)] for i in range(length))])
    ids = engine.encode([{"role": "user", "content": text}])
    while len(ids) < length:
        ids = [*ids, *ids]
    return ids[:length]


def speed(job: dict[str, Any]) -> dict[str, Any]:
    """Do a job with `prompt_tokens`; see the module. Lists are by length, then by repeat."""
    engine, _, loaded = opened(job)
    longest = max(job["prompt_tokens"]) + job["max_new_tokens"]
    if engine.context_length < longest:
        raise ModelError(
            f"the context of {job['folder']} holds {engine.context_length} tokens, {longest} are asked for",
            "ask for shorter prompts or answers",
        )
    sampling = Sampling(max_new_tokens=job["max_new_tokens"], ignore_end=True)
    batch = job.get("batch", 1)

    def answer(prompts: list[list[int]]) -> Generation:
        """The first of the answers, whose times are those of all."""
        if batch == 1:
            return engine.generate(prompts, sampling)[0]
        return cast(AtOnce, engine).at_once(prompts, sampling.max_new_tokens)[0]

    prompts = [[passage(engine, length, number) for number in range(batch)] for length in job["prompt_tokens"]]
    for _ in range(job["warmup"]):
        answer(prompts[-1])
    before = energy()
    answers = [[answer(several) for _ in range(job["repeats"])] for several in prompts]
    after = energy()
    return {
        "first_token_s": [[answer.first_token_s for answer in same] for same in answers],
        "total_s": [[answer.total_s for answer in same] for same in answers],
        "tokens": [[len(answer.tokens) for answer in same] for same in answers],
        "load_s": loaded, "peak_bytes": peak_bytes(),
        "joules": after - before if before is not None and after is not None and after >= before else None,
    }  # fmt: skip


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Do a job; see the module."""
    if "prompt_tokens" in job:
        return speed(job)
    engine, imported, loaded = opened(job)
    sampling = Sampling(max_new_tokens=job["max_new_tokens"])
    prompts = [engine.encode(messages) for messages in job["prompts"]]
    fitting = [p for p in prompts if len(p) < engine.context_length]
    for i in range(job["warmup"] if fitting else 0):
        engine.generate([fitting[i % len(fitting)]], sampling)
    first: list[float | None] = []
    total: list[float | None] = []
    tokens: list[int | None] = []
    for prompt in prompts:
        if len(prompt) >= engine.context_length:
            first.append(None)
            total.append(None)
            tokens.append(None)
            continue
        answer = engine.generate([prompt], sampling)[0]
        first.append(answer.first_token_s)
        total.append(answer.total_s)
        tokens.append(len(answer.tokens))
    return {
        "first_token_s": first,
        "total_s": total,
        "tokens": tokens,
        "prompt_tokens": [len(p) for p in prompts],
        "load_s": loaded,
        "import_bytes": imported,
        "peak_bytes": peak_bytes(),
    }


def main(job: str, result: str) -> int:
    """Read a job, write its result; errors of slmops go into the result as `error` and `hint`."""
    try:
        answer = work(json.loads(Path(job).read_text(encoding="utf-8")))
    except SlmopsError as error:
        answer = {"error": error.message, "hint": error.hint}
    Path(result).write_text(json.dumps(answer), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
