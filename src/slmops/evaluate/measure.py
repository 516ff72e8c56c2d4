"""Method `evaluate.measure`: how long each variant takes per answer and how much memory it holds.

Every variant runs in a fresh process per round; rounds take the variants in rotating order, so that a slow minute of
the machine hits all of them. Timings are of single answers, one prompt at a time, after warm-up, on prompts that all
variants share. Memory is the peak resident size of the process. Beside it stands the baseline: the peak of a fresh
process with the same runtime that opened a minimal model and answered one prompt, since a runtime maps most of its
code only when a session is made; the peak after importing alone is kept too. Nothing is interpreted here.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from slmops.core.engine import KvCache
from slmops.core.method import Context, Declaration, Facts
from slmops.core.method import Params as BaseParams
from slmops.core.runtimes import Named
from slmops.errors import DataError, ModelError, UsageError
from slmops.evaluate.inputs import MODEL_FILES

DECLARATION = Declaration(
    name="evaluate.measure",
    version="2",
    makes="measurement",
    takes={"model*": "model", "data": "dataset"},
    extra="runtime",
    packages=("onnxruntime-genai", "onnxruntime", "torch", "transformers"),
    runtimes=lambda params: params["variants"].values(),
    threads=True,
    reproducible=False,
)

BASIS = (
    "peak resident size of a fresh process that opened a minimal one-layer model in the same runtime "
    "and answered one prompt"
)
PACKAGES = (
    "onnxruntime-genai",
    "onnxruntime",
    "llama-cpp-python",
    "mlx",
    "openvino",
    "ai-edge-litert",
    "executorch",
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
)
NOT_LOADED = ("fidelity.json", "training.json", "README.md")
TIMEOUT_S = 3600.0


class Params(BaseParams):
    """`variants` says which runtime each input `model.<variant>` is measured in; `threads` 0 takes the step's; `kv_cache`: how
    llama.cpp holds keys and values."""

    variants: dict[str, Named]
    prompts: Annotated[int, Field(ge=1)] = 50
    rounds: Annotated[int, Field(ge=1)] = 3
    threads: Annotated[int, Field(ge=0)] = 0
    max_new_tokens: Annotated[int, Field(ge=1)] = 64
    warmup: Annotated[int, Field(ge=0)] = 5
    split: Literal["test", "validation"] = "test"
    kv_cache: KvCache | None = None


def run(params: Params, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Facts:
    """Measure every variant on prompts of `inputs["data"]`: of the test data, where nothing is chosen by what is found."""
    import tempfile

    from slmops.engines import detect

    folders = {name: inputs.get(f"model.{name}") for name in params.variants}
    for name, folder in folders.items():
        if folder is None:
            raise UsageError(f"there is no input model.{name} to measure", "give every variant a model")
        if detect(folder) != params.variants[name]:
            raise ModelError(f"{name} is not a model for {params.variants[name]}", "measure it in its own runtime")
    if not folders:
        raise UsageError("there is nothing to measure", "name at least one variant")
    ids, prompts = choose(inputs["data"], params.prompts, params.split)
    job = {
        "threads": params.threads or ctx.threads,
        "max_new_tokens": params.max_new_tokens,
        "warmup": params.warmup,
        "prompts": prompts,
    }
    environment = describe_machine()
    runtimes = sorted(set(params.variants.values()))
    ctx.progress.start("measuring", params.rounds * (len(folders) + len(runtimes)), "processes")
    orders = rotate(list(folders), params.rounds)
    baselines: dict[str, dict[str, list[int]]] = {r: {"import_bytes": [], "idle_bytes": []} for r in runtimes}
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in folders}
    with tempfile.TemporaryDirectory(dir=ctx.scratch if ctx.scratch.is_dir() else None) as work:
        minimal = write_baselines(Path(work), runtimes)
        for order in orders:
            for runtime in runtimes:
                idle = {**job, "prompts": [minimal_prompt()], "max_new_tokens": 2, "warmup": 1}
                result = fresh(idle, minimal[runtime], runtime, Path(work))
                baselines[runtime]["import_bytes"].append(result["import_bytes"])
                baselines[runtime]["idle_bytes"].append(result["peak_bytes"])
                ctx.progress.advance(1, f"idle {runtime}")
            for name in order:
                folder = folders[name]
                assert folder is not None
                own = {"kv_cache": params.kv_cache} if params.variants[name] == "llama_cpp" else {}
                result = fresh(job | own, folder, params.variants[name], Path(work))
                result["baseline_bytes"] = baselines[params.variants[name]]["idle_bytes"][-1]
                results[name].append(result)
                ctx.progress.advance(1, name)
    ctx.progress.stop()
    kept = [i for i in range(len(ids)) if all(r["tokens"][i] is not None for rs in results.values() for r in rs)]
    if not kept:
        raise DataError("no test prompt fits the context of every variant", "train with a longer context")
    environment["load_average"]["end"] = load_average()
    measurement = {
        "format": 1,
        "threads": job["threads"],
        "max_new_tokens": params.max_new_tokens,
        "warmup": params.warmup,
        "environment": environment,
        "prompt_ids": [ids[i] for i in kept],
        "left_out": [ids[i] for i in range(len(ids)) if i not in set(kept)],
        "order": orders,
        "baseline": {"basis": BASIS, **baselines},
        "variants": {
            name: {"runtime": params.variants[name], **summarise(results[name], kept), **sizes(folder)}
            for name, folder in folders.items()
            if folder is not None
        },
    }
    (out / "measurement.json").write_text(json.dumps(measurement, indent=1) + "\n", encoding="utf-8")
    return {"variants": sorted(folders), "prompts": len(kept), "rounds": params.rounds, "threads": job["threads"]}


def choose(
    data: Path, count: int, split: Literal["test", "validation"] = "test"
) -> tuple[list[str], list[list[dict[str, str]]]]:
    """Ids and messages of `count` prompts of a split, those with the smallest ids."""
    from slmops.evaluate.predict import read_split

    examples = sorted(read_split(data, split, count), key=lambda e: e.id)
    return [e.id for e in examples], [e.prompt_messages() for e in examples]


def rotate(names: Sequence[str], rounds: int) -> list[list[str]]:
    """The order of every round: each starts one further on, so that over as many rounds as names, all start once."""
    return [[*names[r % len(names) :], *names[: r % len(names)]] for r in range(rounds)]


def write_baselines(work: Path, runtimes: Sequence[str]) -> dict[str, Path]:
    """A minimal model for each runtime."""
    from slmops.engines.minimal import write_minimal

    folders = {}
    for runtime in runtimes:
        folders[runtime] = work / f"minimal-{runtime}"
        folders[runtime].mkdir()
        write_minimal(folders[runtime], runtime)  # type: ignore[arg-type]
    return folders


def minimal_prompt() -> list[dict[str, str]]:
    """The one prompt that an idle runtime answers."""
    from slmops.engines.minimal import PROMPT

    return PROMPT


def fresh(job: Mapping[str, Any], folder: Path, runtime: str, work: Path) -> dict[str, Any]:
    """Run a job in a fresh process.

    Raises:
        ModelError: the process failed; its last words are in the message.
    """
    import subprocess

    order, result = work / "job.json", work / "result.json"
    order.write_text(json.dumps({**job, "folder": str(folder), "runtime": runtime}), encoding="utf-8")
    result.unlink(missing_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(job["threads"]), "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, "-m", "slmops.engines.worker", str(order), str(result)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise ModelError(f"{folder} gave no answers within {TIMEOUT_S:.0f} s", "measure fewer prompts") from error
    if done.returncode or not result.is_file():
        words = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["it said nothing"]
        raise ModelError(f"the process that measures {folder} ended with {done.returncode}: {words[0]}", "run it again")
    answer: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    if "error" in answer:
        raise ModelError(answer["error"], answer["hint"])
    return answer


def summarise(rounds: Sequence[Mapping[str, Any]], kept: Sequence[int]) -> dict[str, Any]:
    """Rounds cut to the kept prompts, and per prompt the median over the rounds."""
    import statistics

    cut = []
    for one in rounds:
        lists = {key: [one[key][i] for i in kept] for key in ("first_token_s", "total_s", "tokens")}
        scalars = {key: one[key] for key in ("peak_bytes", "baseline_bytes", "import_bytes", "load_s")}
        cut.append({**lists, **scalars})
    medians = {
        key: [statistics.median(r[key][i] for r in cut) for i in range(len(kept))]
        for key in ("first_token_s", "total_s")
    }
    lengths = {"tokens": cut[0]["tokens"], "prompt_tokens": [rounds[0]["prompt_tokens"][i] for i in kept]}
    return {"rounds": cut, **medians, **lengths}


def sizes(folder: Path) -> dict[str, Any]:
    """Bytes of every file that the runtime loads, and of weights and graph alone."""
    files = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in NOT_LOADED
    }
    model = sum(size for name, size in files.items() if name.endswith(MODEL_FILES))
    return {"files": files, "model_bytes": model}


def describe_machine() -> dict[str, Any]:
    """What the numbers depend on: processor, cores, system, versions, load."""
    import platform

    return {
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := installed(name))},
        "load_average": {"start": load_average()},
    }


def processor() -> str:
    """The processor's name."""
    import platform

    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def installed(name: str) -> str:
    """The version of an installed distribution, or an empty text."""
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def load_average() -> list[float]:
    """Load averages over 1, 5 and 15 minutes; an empty list where the system has none."""
    return [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else []
