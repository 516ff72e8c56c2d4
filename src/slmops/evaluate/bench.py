"""How fast models run and what they hold, across formats and runtimes: `slmops bench`.

Every model runs in a fresh process per round; rounds take the models in rotating order, so that a slow minute of the machine
hits all of them. One answer at a time, to made-up prompts of given lengths, of exactly as many tokens as are asked for. Memory is
the peak of the process, and the same over an idle runtime that answered one prompt with a minimal model.

With batches, each model runs once with each number of answers at once, every time in processes of its own: so many different prompts of one
length go in together, and a token of each answer is made at a time. Batch 1 is the ordinary way, one answer after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from slmops.core.engine import KvCache
from slmops.core.runtimes import Named
from slmops.evaluate.measure import (
    describe_machine,
    fresh,
    load_average,
    minimal_prompt,
    rotate,
    sizes,
    write_baselines,
)


@dataclass(frozen=True)
class Variant:
    """A model as it is run; `of` is its name without the batch."""

    of: str
    folder: Path
    runtime: Named
    kv_cache: KvCache | None
    batch: int


Rounds = Sequence[Mapping[str, Any]]


def bench(
    models: Mapping[str, Path], prompt_tokens: Sequence[int], new_tokens: int, rounds: int, repeats: int, threads: int,
    on_done: Callable[[str], None] = lambda name: None, kv_caches: Sequence[KvCache] = (), batches: Sequence[int] = (),
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
        batches: each model runs once with each of these numbers of answers at once, which stands behind its name; none: with 1.

    Returns:
        `environment`, `settings`, and by name in `models`: `runtime`, `model_bytes`, `load_s`, `peak_bytes`,
        `over_idle_bytes` (medians of the rounds), `joules_per_token` (median, or None), `of` (the name without its batch), `batch`,
        and `prompts`: for each length `tokens`, `first_token_s`, `prompt_tokens_per_s`, `new_tokens_per_s`, `answers_per_s` with the
        least and the greatest round as `low` and `high`, each the median over the repeats of a round. The first token's time is that
        of all prompts of the batch; rates are of all its answers together. `speed_up`: new tokens per second over those of the same
        model with batch 1 in the same round; None where that was not run, or is what stands there.

    Raises:
        ModelError: a folder is no model, its runtime does not give several answers at once, a prompt does not fit its context, or its
            process failed.
    """
    import tempfile

    from slmops.engines import detect, refuse_at_once, refuse_cache

    for folder in models.values():
        runtime = detect(folder)
        if kv_caches:
            refuse_cache(folder, runtime)
        for batch in batches:
            refuse_at_once(folder, runtime, batch)
    variants = {
        f"{name}{f', cache {cache}' if cache else ''}{f', batch {batch}' if batches else ''}": Variant(
            f"{name}{f', cache {cache}' if cache else ''}", folder, detect(folder), cache, batch
        )
        for name, folder in models.items() for cache in kv_caches or (None,) for batch in batches or (1,)
    }  # fmt: skip
    environment = describe_machine()
    job = {
        "threads": threads, "prompt_tokens": list(prompt_tokens), "max_new_tokens": new_tokens, "warmup": 1, "repeats": repeats,
    }  # fmt: skip
    idle_job = {"threads": threads, "prompts": [minimal_prompt()], "max_new_tokens": 2, "warmup": 1}
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    with tempfile.TemporaryDirectory() as work:
        minimal = write_baselines(Path(work), sorted({variant.runtime for variant in variants.values()}))
        for order in rotate(list(variants), rounds):
            idle = {}
            for kind, folder in minimal.items():
                idle[kind] = fresh(idle_job, folder, kind, Path(work))["peak_bytes"]
                on_done(f"idle {kind}")
            for name in order:
                variant = variants[name]
                own = {"kv_cache": variant.kv_cache, "batch": variant.batch}
                result = fresh(job | own, variant.folder, variant.runtime, Path(work))
                results[name].append(result | {"idle_bytes": idle[variant.runtime]})
                on_done(name)
    environment["load_average"]["end"] = load_average()
    single = {variant.of: results[name] for name, variant in variants.items() if variant.batch == 1}
    return {
        "environment": environment,
        "settings": {"prompt_tokens": list(prompt_tokens), "new_tokens": new_tokens, "rounds": rounds, "repeats": repeats,
                     "threads": threads, "batches": list(batches)},
        "models": {
            name: {
                "runtime": variant.runtime, "folder": str(variant.folder), "model_bytes": sizes(variant.folder)["model_bytes"],
                "of": variant.of, "batch": variant.batch,
            } | summary(results[name], prompt_tokens, new_tokens, variant.batch, single.get(variant.of))
            for name, variant in variants.items()
        },
    }  # fmt: skip


def summary(
    rounds: Rounds, prompt_tokens: Sequence[int], new_tokens: int, batch: int = 1, single: Rounds | None = None
) -> dict[str, Any]:
    """One model's numbers from what its processes said.

    Args:
        batch: answers at once.
        single: what the processes of the same rounds said with one at a time.
    """
    answers = batch * sum(len(same) for same in rounds[0]["total_s"])
    joules = [one["joules"] / (answers * new_tokens) for one in rounds if one["joules"] is not None]
    prompts = []
    for place, length in enumerate(prompt_tokens):
        first = [median(one["first_token_s"][place]) for one in rounds]
        row: dict[str, Any] = {"tokens": length, "first_token_s": spread(first)}
        row["prompt_tokens_per_s"] = spread([batch * length / seconds for seconds in first])
        row["new_tokens_per_s"] = row["speed_up"] = None
        if new_tokens > 1:
            rates = [batch * (new_tokens - 1) / seconds for seconds in _decoding(rounds, place)]
            row["new_tokens_per_s"] = spread(rates)
            if single and batch > 1:
                alone = [(new_tokens - 1) / seconds for seconds in _decoding(single, place)]
                row["speed_up"] = spread([many / one for many, one in zip(rates, alone, strict=True)])
        row["answers_per_s"] = spread([batch / median(one["total_s"][place]) for one in rounds])
        prompts.append(row)
    return {
        "load_s": median(one["load_s"] for one in rounds),
        "peak_bytes": median(one["peak_bytes"] for one in rounds),
        "over_idle_bytes": median(max(0, one["peak_bytes"] - one["idle_bytes"]) for one in rounds),
        "joules_per_token": median(joules) if joules else None,
        "prompts": prompts,
    }


def _decoding(rounds: Rounds, place: int) -> list[float]:
    """Seconds from the first token to the last with prompts of the length at `place`, the median of each round."""
    return [
        median(total - first for total, first in zip(one["total_s"][place], one["first_token_s"][place], strict=True))
        for one in rounds
    ]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest of the rounds."""
    return {"value": median(values), "low": min(values), "high": max(values)}
