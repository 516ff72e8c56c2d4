"""How fast models run and what they hold, across formats and runtimes: `slmops bench`.

Every model runs in a fresh process per round; rounds take the models in rotating order, so that a slow minute of the machine
hits all of them. One answer at a time, to made-up prompts of given lengths, of exactly as many tokens as are asked for. Memory is
the peak of the process, and the same over an idle runtime that answered one prompt with a minimal model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from slmops.core.engine import KvCache
from slmops.evaluate.measure import (
    describe_machine,
    fresh,
    load_average,
    minimal_prompt,
    rotate,
    sizes,
    write_baselines,
)


def bench(
    models: Mapping[str, Path], prompt_tokens: Sequence[int], new_tokens: int, rounds: int, repeats: int, threads: int,
    on_done: Callable[[str], None] = lambda name: None, kv_caches: Sequence[KvCache] = (),
) -> dict[str, Any]:  # fmt: skip
    """Measure models against each other.

    Args:
        models: name to folder.
        prompt_tokens: lengths of prompts.
        new_tokens: of each answer.
        rounds: fresh processes of each model.
        repeats: answers to each prompt in each process.
        on_done: called with the name of what has just run.
        kv_caches: each model runs once with each of these caches of keys and values, which stand behind its name; none: as its
            runtime does by default. Only llama.cpp has a choice.

    Returns:
        `environment`, `settings`, and by name in `models`: `runtime`, `model_bytes`, `load_s`, `peak_bytes`,
        `over_idle_bytes` (medians of the rounds), `joules_per_token` (median, or None), and `prompts`: for each length
        `tokens`, `first_token_s`, `prompt_tokens_per_s`, `new_tokens_per_s` with the least and the greatest round as `low` and
        `high`, each the median over the repeats of a round.

    Raises:
        ModelError: a folder is no model, a prompt does not fit its context, or its process failed.
    """
    import tempfile

    from slmops.engines import detect, refuse_cache

    caches: dict[str, KvCache | None] = dict.fromkeys(models)
    if kv_caches:
        for folder in models.values():
            refuse_cache(folder, detect(folder))
        caches = {f"{name}, cache {kind}": kind for name in models for kind in kv_caches}
        models = {f"{name}, cache {kind}": folder for name, folder in models.items() for kind in kv_caches}
    runtimes = {name: detect(folder) for name, folder in models.items()}
    environment = describe_machine()
    job = {
        "threads": threads, "prompt_tokens": list(prompt_tokens), "max_new_tokens": new_tokens, "warmup": 1, "repeats": repeats,
    }  # fmt: skip
    idle_job = {"threads": threads, "prompts": [minimal_prompt()], "max_new_tokens": 2, "warmup": 1}
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in models}
    with tempfile.TemporaryDirectory() as work:
        minimal = write_baselines(Path(work), sorted(set(runtimes.values())))
        for order in rotate(list(models), rounds):
            idle = {}
            for runtime, folder in minimal.items():
                idle[runtime] = fresh(idle_job, folder, runtime, Path(work))["peak_bytes"]
                on_done(f"idle {runtime}")
            for name in order:
                own = {"kv_cache": caches[name]} if caches[name] else {}
                result = fresh(job | own, models[name], runtimes[name], Path(work))
                results[name].append(result | {"idle_bytes": idle[runtimes[name]]})
                on_done(name)
    environment["load_average"]["end"] = load_average()
    return {
        "environment": environment,
        "settings": {"prompt_tokens": list(prompt_tokens), "new_tokens": new_tokens, "rounds": rounds, "repeats": repeats,
                     "threads": threads},
        "models": {
            name: {"runtime": runtimes[name], "folder": str(models[name]), "model_bytes": sizes(models[name])["model_bytes"]}
            | summary(results[name], prompt_tokens, new_tokens)
            for name in models
        },
    }  # fmt: skip


def summary(rounds: Sequence[Mapping[str, Any]], prompt_tokens: Sequence[int], new_tokens: int) -> dict[str, Any]:
    """One model's numbers from what its processes said."""
    answers = sum(len(same) for same in rounds[0]["total_s"])
    joules = [one["joules"] / (answers * new_tokens) for one in rounds if one["joules"] is not None]
    prompts = []
    for place, length in enumerate(prompt_tokens):
        first = [median(one["first_token_s"][place]) for one in rounds]
        rest = [
            median(t - f for t, f in zip(one["total_s"][place], one["first_token_s"][place], strict=True))
            for one in rounds
        ]
        row: dict[str, Any] = {"tokens": length, "first_token_s": spread(first)}
        row["prompt_tokens_per_s"] = spread([length / seconds for seconds in first])
        row["new_tokens_per_s"] = spread([(new_tokens - 1) / seconds for seconds in rest]) if new_tokens > 1 else None
        prompts.append(row)
    return {
        "load_s": median(one["load_s"] for one in rounds),
        "peak_bytes": median(one["peak_bytes"] for one in rounds),
        "over_idle_bytes": median(max(0, one["peak_bytes"] - one["idle_bytes"]) for one in rounds),
        "joules_per_token": median(joules) if joules else None,
        "prompts": prompts,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest of the rounds."""
    return {"value": median(values), "low": min(values), "high": max(values)}
