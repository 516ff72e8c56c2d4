"""`data.join_prompts`: one set of prompts from the parts in which a teacher wrote them.

Promises what `data.generate` promises: the prompts are distinct from each other and from those the data set has, at most as many as
asked for. They are taken from the parts in turns, so that none counts more than another.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

from slmops.core.method import Context, Declaration, Facts, named_inputs
from slmops.core.method import Params as BaseParams
from slmops.core.spec import Generate, Task
from slmops.data.generate import Collected

DECLARATION = Declaration(
    name="data.join_prompts", version="1", makes="dataset", takes={"data": "dataset", "prompts*": "dataset"}
)


class Params(BaseParams):
    """As those of `data.generate`."""

    generate: Generate
    task: Task


def run(params: Params, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Facts:
    """Write prompts.jsonl and stats.json; the inputs `prompts.N` are read in the order of their numbers."""
    from slmops.store.rows import read_examples, write_json, write_rows

    known = [*read_examples(inputs["data"] / "gold.jsonl"), *read_examples(inputs["data"] / "pool.jsonl")]
    folders = named_inputs(inputs, "prompts")
    parts = [read_examples(folders[number] / "prompts.jsonl") for number in sorted(folders, key=int)]
    collected = Collected(params.generate, params.task, known)
    collected.take(example for turn in itertools.zip_longest(*parts) for example in turn if example is not None)
    stats = collected.stats()
    if stats["kept"] < params.generate.count:
        ctx.progress.log(f"{stats['kept']} of {params.generate.count} prompts: the parts hold no more that differ")
    write_rows(out / "prompts.jsonl", (example.to_json() for example in collected.kept))
    write_json(out / "stats.json", stats)
    return {key: stats[key] for key in ("asked", "kept", "stalled")} | {"parts": len(parts)}
