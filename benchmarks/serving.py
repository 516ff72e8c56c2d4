"""`slmops serve` beside the servers people run, on the same model, cores and prompts: tokens per second, waiting times, memory.

    python benchmarks/serving.py                              # a random Qwen3 of 25 M; three rounds
    python benchmarks/serving.py --quick                      # one short round of slmops alone on a random Qwen3 of 2 M
    python benchmarks/serving.py --large                      # also one of 0.6 B
    python benchmarks/serving.py --model NAME=FOLDER          # a model of yours, in Hugging Face form
    python benchmarks/serving.py --cores 1 --client 0         # servers on core 1, clients on core 0
    python benchmarks/serving.py --skip llama-server --streams 1 8

Each server gets the same weights in 4 bits in blocks of 32 (int4 for ONNX, q4_0 as GGUF) and as many threads as cores. All are up at
once; loads come in turns (slmops, llama-server, …, slmops, …), and what is shown is the median over the rounds. README.md beside it says
what the columns are. At the first run llama-server is built, and environments made for llama-cpp-python's server and for Foundry Local.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from serving_load import Heard, load
from serving_peers import FOUNDRY, PEERS, SYSTEMS, Server, llama_server
from slmops.core.method import SilentProgress
from slmops.serve.pages import environment
from slmops.store import environments

BUILD = Path(os.environ.get("SLMOPS_BENCH") or Path(__file__).resolve().parent.parent / "build" / "bench") / "serving"
BLOCK = 32
CONTEXT = 256
STREAMS = (1, 2, 4, 8, 16)
PROMPT = 50
"""Tokens of a prompt, about."""
WARM = 500_000
"""Seed of the prompts that come before all loads: a server that keeps what it read would have a start with others."""

SHAPES: dict[str, dict[str, Any]] = {
    "2M": {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
           "intermediate_size": 384, "vocab_size": 4096},
    "25M": {"hidden_size": 512, "num_hidden_layers": 7, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
            "intermediate_size": 1408, "vocab_size": 8192},
    "0.6B": {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
             "intermediate_size": 3072, "vocab_size": 151936},
}  # fmt: skip
"""Random weights in the shape of Qwen3; the last is that of Qwen3 0.6B."""
WORK = {"2M": (96, 48), "25M": (32, 48), "0.6B": (4, 16)}
"""Requests of a load at the least (twice the streams, if that is more; of the last as many as streams), and tokens of an answer."""


# -- in a worker -------------------------------------------------------------------------------------------------------


def make(shape: str, folder: Path, seed: int) -> None:
    """A random model with a made-up tokenizer that fills its vocabulary with short words, so that any token is text."""
    import random

    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    from slmops.engines.minimal import END, _write_tokenizer

    config = Qwen3Config(
        **SHAPES[shape], max_position_embeddings=2048, tie_word_embeddings=True, eos_token_id=END, pad_token_id=0,
        bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    _write_tokenizer(folder)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text("utf-8"))
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    pieces, merges, chance = [*letters, "\u0120"], [], random.Random(seed)
    while len(vocabulary) < config.vocab_size:
        left, right = chance.choice(pieces), chance.choice(letters)
        if left + right not in vocabulary and len(left) < 12:
            vocabulary[left + right] = len(vocabulary)
            pieces.append(left + right)
            merges.append([left, right])
    tokenizer["model"]["merges"] = merges
    file.write_text(json.dumps(tokenizer, ensure_ascii=False), "utf-8")


def convert(source: Path, out: Path) -> None:
    """The same weights for each of the servers."""
    from slmops.convert import gguf, onnx_genai
    from slmops.core.method import Context

    work = out / "work"
    for name in ("work", "graph", "onnx", "gguf", "data"):
        shutil.rmtree(out / name, ignore_errors=True)
        (out / name).mkdir(parents=True)
    onnx_genai.build(source, out / "graph")
    onnx_genai.write(source, out / "graph", out / "onnx", onnx_genai.Params(precision="int4", block_size=BLOCK))
    gguf.run(gguf.Params(precision="q4_0"), {"model": source}, out / "gguf", Context(0, work, work))
    command = [
        sys.executable,
        "-m",
        "onnxruntime_genai.models.builder",
        "-i",
        str(source),
        "-o",
        str(out / "genai"),
        "-p",
        "int4",
    ]
    options = ["--extra_options", f"int4_block_size={BLOCK}", "int4_accuracy_level=4"]
    subprocess.run([*command, "-e", "cpu", "-c", str(work), *options], check=True)
    (out / "done").touch()


def alone(folder: Path, prompts: Sequence[str], tokens: int, threads: int, rows: int) -> dict[str, Any]:
    """The engine of `slmops serve` without the server, in this process, with as many rows as it has streams."""
    from slmops.engines.plain_tokenizer import PlainTokenizer
    from slmops.serve.engines.onnx import OnnxRows
    from slmops.serve.scheduler import Request, Scheduler

    words = PlainTokenizer(folder, "serve")
    engine = OnnxRows(folder, rows=rows, context=CONTEXT, threads=threads)
    scheduler = Scheduler(engine)
    asked = [tuple(words.ids(prompt)) for prompt in prompts]
    for number, prompt in enumerate(asked[:2]):  # memory is touched, code loaded
        scheduler.submit(Request(-1 - number, prompt[::-1], tokens, ignore_end=True))
    while scheduler.busy or scheduler.waiting:
        scheduler.step()
    began = time.perf_counter()
    for number, prompt in enumerate(asked):
        scheduler.submit(Request(number, prompt, tokens, ignore_end=True))
    written = 0
    while scheduler.busy or scheduler.waiting:
        written += len(scheduler.step())
    return {"tokens_s": written / (time.perf_counter() - began)}


# -- the rounds --------------------------------------------------------------------------------------------------------


def own(job: list[str], log: Path, cores: Sequence[int] | None = None) -> str:
    """Run this file with `--worker` in a fresh process; what it printed."""
    with log.open("w") as file:
        found = subprocess.run(
            [sys.executable, __file__, "--worker", *job], stdout=subprocess.PIPE, stderr=file, text=True, env=environment(),
            preexec_fn=(lambda: os.sched_setaffinity(0, set(cores))) if cores else None,
        )  # fmt: skip
    if found.returncode:
        raise SystemExit(f"the worker failed: see {log}")
    return found.stdout


def letters(folder: Path) -> int:
    """Of a text that has `PROMPT` tokens."""
    from tokenizers import Tokenizer

    words, text = Tokenizer.from_file(str(folder / "tokenizer.json")), prompts_of(1, 1, 1000)[0]
    return next(size for size in range(1000, 0, -5) if len(words.encode(text[:size]).ids) <= PROMPT)


def prompts_of(count: int, seed: int, size: int) -> list[str]:
    """Texts that no other load has, of equal length."""
    from slmops.templates import support_desk

    texts = (row["messages"][0]["content"] for row in support_desk.generate(count * 8, seed))
    found = []
    for number in range(count):
        text = f"{chr(97 + number % 26)}{chr(97 + number // 26 % 26)}{seed % 1000} "
        while len(text) < size:
            text += next(texts, "where is my parcel") + " "
        found.append(text[:size])
    return found


def once(server: Server, prompts: Sequence[str], streams: int, tokens: int, stream: bool) -> dict[str, Any]:
    """One load, in numbers."""
    if server.system.startswith("ONNX"):
        said = server.genai({"prompts": list(prompts), "streams": streams, "tokens": tokens})
        seconds, heard = said["seconds"], [Heard(**one) for one in said["heard"]]
    else:
        body = server.body | ({"stream_options": {"include_usage": True}} if stream else {})
        if server.system == "llama-cpp-python" and stream:
            body.pop("stream_options")  # it has none; every answer has its number of tokens all the same
        path = f"{server.api}/{'chat/' * (server.system == 'Foundry Local')}completions"
        seconds, heard = asyncio.run(load(server.port, prompts, streams, body, stream, path))
    wrong = sorted({one.tokens for one in heard} - {tokens, 0})
    if wrong:
        say(f"{server.system}: answers of {wrong} tokens, not {tokens}")
    first = sorted(one.texts[0] - one.asked for one in heard if one.texts)
    gaps = sorted(gap for one in heard for gap in one.gaps)
    return {
        "tokens_s": len(heard) * tokens / seconds,
        "whole_s": median(one.ended - one.asked for one in heard),
        "first_p50": share(first, 0.5), "first_p95": share(first, 0.95),
        "gap_p50": share(gaps, 0.5), "gap_p95": share(gaps, 0.95),
        "events": sum(len(one.texts) for one in heard) / len(heard), "prompt": median(one.read for one in heard),
        "peak_bytes": server.peak(),
    }  # fmt: skip


def share(values: Sequence[float], part: float) -> float:
    """A percentile of sorted values."""
    return values[min(len(values) - 1, int(part * len(values)))] if values else 0.0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All rounds of all models."""
    systems = [
        s
        for s in SYSTEMS
        if not any(word.lower() in s.lower() for word in options.skip) and (not options.quick or s == "slmops")
    ]
    tools: dict[str, Path] = {}
    if "llama-server" in systems:
        tools["llama-server"] = llama_server(BUILD, Talk())
    if "llama-cpp-python" in systems:
        tools["python"] = environments.ensure(PEERS, Talk())
    if "Foundry Local" in systems:
        tools["foundry"] = environments.ensure(FOUNDRY, Talk())
    cores = options.cores or sorted(os.sched_getaffinity(0))
    load_before = os.getloadavg()[0]
    os.sched_setaffinity(0, set(options.client or cores))
    models: dict[str, Path] = {}
    for given in options.model:
        name, _, folder = given.partition("=")
        models[name] = Path(folder)
    for shape in (
        [] if options.model and not options.large else ["2M"] if options.quick else ["25M", *(["0.6B"] * options.large)]
    ):
        folder = BUILD / f"random-{shape}-{options.seed}"
        if not (folder / "tokenizer.json").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            own(["make", shape, str(folder), str(options.seed)], BUILD / "make.log")
        models[shape] = folder
    found: dict[str, Any] = {"models": {}}
    for name, source in models.items():
        files = BUILD / f"files-{name}-{options.seed}"
        if not (files / "done").is_file():
            say(f"{name}: converting")
            files.mkdir(parents=True, exist_ok=True)
            own(["convert", str(source), str(files)], files.with_suffix(".log"))
        found["models"][name] = one_model(name, files, source, systems, tools, cores, options)
    found["machine"] = {"cpu": cpu(), "cores": cores, "rounds": options.rounds, "load_before": load_before}
    return found


def one_model(
    name: str, files: Path, source: Path, systems: Sequence[str], tools: dict[str, Path], cores: Sequence[int],
    options: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    """All rounds of a model."""
    requests, tokens = WORK.get(name, WORK["2M"])
    requests, tokens = options.requests or requests, options.tokens or tokens
    config = json.loads((source / "config.json").read_text("utf-8"))
    end = config["eos_token_id"]
    where = {"onnx": files / "onnx", "gguf": files / "gguf" / "model.gguf", "genai": files / "genai"}
    size = letters(source)
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {system: {} for system in systems}
    servers: dict[str, Server] = {}
    try:
        for system in systems:
            servers[system] = Server(
                system, where, cores=cores, streams=max(options.streams), context=CONTEXT, tokens=tokens,
                end=end[0] if isinstance(end, list) else end, tools=tools, log=files / f"{system.replace(' ', '-')}.log",
                tell=options.tell,
            )  # fmt: skip
            once(servers[system], prompts_of(2, WARM, size), 2, tokens, True)
        seed = options.seed
        for number in range(options.rounds):
            for streams in options.streams:
                count = max(requests, (1 if name == "0.6B" else 2) * streams)
                seed += 1
                given = prompts_of(count, seed, size)
                for system in systems:
                    one = once(servers[system], given, streams, tokens, True)
                    if not system.startswith("ONNX"):
                        one["whole_tokens_s"] = once(
                            servers[system], prompts_of(count, seed + 10_000, size), streams, tokens, False
                        )["tokens_s"]
                    runs[system].setdefault(str(streams), []).append(one)
                    say(f"{name}, round {number + 1}, {streams} streams, {system}: {one['tokens_s']:.0f} tokens/s")
                if streams in options.alone:
                    (files / "prompts.json").write_text(json.dumps(given), "utf-8")
                    job = [
                        "alone",
                        str(files / "onnx"),
                        str(files / "prompts.json"),
                        str(tokens),
                        str(len(cores)),
                        str(streams),
                    ]
                    one = json.loads(own(job, files / "alone.log", cores))
                    runs.setdefault("slmops, engine alone", {}).setdefault(str(streams), []).append(one)
                    say(f"{name}, round {number + 1}, {streams} streams, engine alone: {one['tokens_s']:.0f} tokens/s")
    finally:
        for server in servers.values():
            server.stop()
    medians = {
        system: {streams: {key: median(one[key] for one in some) for key in some[0]} for streams, some in by.items()}
        for system, by in runs.items()
    }
    return {"tokens": tokens, "runs": runs, "medians": medians}


def table(found: dict[str, Any]) -> str:
    """For people."""
    lines = []
    for name, model in found["models"].items():
        lines += [f"**{name}**, {model['tokens']} tokens an answer", ""]
        lines.append("| streams | server | tokens/s, streamed | slmops to it | tokens/s, whole | first text p50 / p95 | gap p50 / p95 | "
                     "events | peak |")  # fmt: skip
        lines.append("| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
        for streams in next(iter(model["medians"].values())):
            for system, by in model["medians"].items():
                one = by.get(streams)
                if one is None:
                    continue
                ours = model["medians"].get("slmops", {}).get(streams)
                to = f"×{ours['tokens_s'] / one['tokens_s']:.2f}" if ours and ours is not one else ""
                cells = [
                    streams,
                    system,
                    f"{one['tokens_s']:,.0f}",
                    to,
                    f"{one['whole_tokens_s']:,.0f}" if "whole_tokens_s" in one else "",
                ]
                if "first_p50" in one:
                    cells += [f"{ms(one['first_p50'])} / {ms(one['first_p95'])}", f"{ms(one['gap_p50'])} / {ms(one['gap_p95'])}",
                              f"{one['events']:.0f}", f"{one['peak_bytes'] / 1e6:,.0f} MB"]  # fmt: skip
                else:
                    cells += [""] * 4
                lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    about = found["machine"]
    lines.append(
        f"{about['cpu']}, cores {about['cores']}, {about['rounds']} round(s), medians; load {about['load_before']:.1f} before."
    )
    return "\n".join(lines)


def ms(seconds: float) -> str:
    """Milliseconds."""
    return f"{1000 * seconds:.3g} ms"


def cpu() -> str:
    """Its name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


class Talk(SilentProgress):
    """Says lines on standard error."""

    def log(self, text: str) -> None:
        say(text)


def say(text: str) -> None:
    """A line of talk."""
    print(text, file=sys.stderr, flush=True)


def worker(job: Sequence[str]) -> None:
    """Do a job."""
    if job[0] == "make":
        make(job[1], Path(job[2]), int(job[3]))
    elif job[0] == "convert":
        convert(Path(job[1]), Path(job[2]))
    else:
        prompts = json.loads(Path(job[2]).read_text("utf-8"))
        print(json.dumps(alone(Path(job[1]), prompts, *map(int, job[3:]))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short round of slmops alone")
    parser.add_argument("--large", action="store_true", help="also 0.6 B")
    parser.add_argument(
        "--model", action="append", default=[], metavar="NAME=FOLDER", help="a Hugging Face folder of yours"
    )
    parser.add_argument("--skip", action="append", default=[], metavar="WORD", help="not the servers whose name has it")
    parser.add_argument("--streams", type=int, nargs="+", default=list(STREAMS), metavar="N")
    parser.add_argument(
        "--alone",
        type=int,
        nargs="*",
        default=[1],
        metavar="N",
        help="streams at which the engine is run alone too (1)",
    )
    parser.add_argument("--tell", type=float, default=10.0, metavar="MS", help="of `slmops serve` (10)")
    parser.add_argument("--requests", type=int, default=0, metavar="N", help="of a load")
    parser.add_argument("--tokens", type=int, default=0, metavar="N", help="of an answer")
    parser.add_argument("--rounds", type=int, default=0, metavar="N")
    parser.add_argument("--cores", type=int, nargs="+", metavar="CORE", help="of the servers (all)")
    parser.add_argument("--client", type=int, nargs="+", metavar="CORE", help="of the clients (those of the servers)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=BUILD.parent / "serving.json")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker)
        return
    options.rounds = options.rounds or (1 if options.quick else 3)
    found = measure(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(table(found))
    say(f"all numbers: {options.out}")


if __name__ == "__main__":
    main()
