"""Method `evaluate.fidelity`: every form of the model against the one that it was made from, and which hop broke it.

Prompts are of the validation split, the same for all; see `slmops.engines.chain` for how models are compared and
`slmops.core.fidelity` for how hops are judged. Nothing is refused here: the report names a hop that broke the model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from slmops.core.fidelity import Link, judge
from slmops.core.method import Context, Declaration, Facts
from slmops.core.method import Params as BaseParams
from slmops.core.spec import Positive, Share, Task
from slmops.core.words import EXACT, ROUNDED

DECLARATION = Declaration(
    name="evaluate.fidelity",
    version="1",
    makes="fidelity",
    takes={"data": "dataset", "model*": "model", "base*": "model"},
    extra="runtime",
    packages=("onnxruntime-genai", "onnxruntime", "torch", "transformers"),
    runtimes=lambda params: [link["runtime"] for link in params["links"]],
)


class Params(BaseParams):
    """The chain, and what its hops must keep.

    `links`: of each a model is the input `model.NAME`; of one with an adapter also its base as `base.NAME`.
    `guided`: the task, which guided links are told in words.
    """

    links: Annotated[tuple[Link, ...], Field(min_length=2)]
    prompts: Positive = 32
    exact: Share = EXACT
    rounded: Share = ROUNDED
    guided: Task | None = None
    shots: Annotated[int, Field(ge=0)] = 8


def run(params: Params, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Facts:
    """Write fidelity.json: the hops as they stand in reports.

    Raises:
        ConversionError: there is no validation prompt, or none that fits.
        ModelError: a model cannot be loaded.
    """
    import tempfile

    from slmops.engines import chain, fidelity
    from slmops.evaluate.predict import questions

    examples = fidelity.choose(inputs["data"], params.prompts)
    told: dict[str, Any] = {}
    if params.guided is not None:
        asked, _ = questions(inputs["data"], examples, params.guided, params.shots, ctx.seed)
        told = {example.id: messages for example, messages in zip(examples, asked, strict=True)}
    ctx.progress.start("comparing", len(params.links), "models")
    with tempfile.TemporaryDirectory(dir=ctx.scratch if ctx.scratch.is_dir() else None) as work:
        met = chain.measure(
            params.links,
            lambda link: opened(link, inputs, ctx.threads),
            examples,
            lambda link, example: told[example.id] if link.guided else example.prompt_messages(),
            Path(work),
            lambda name: ctx.progress.advance(1, name),
        )
    ctx.progress.stop()
    hops = [judge(link, met[link.name], params.exact, params.rounded) for link in params.links if link.name in met]
    found = {"hops": [hop.model_dump(mode="json") for hop in hops]}
    (out / "fidelity.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    broken = [hop for hop in hops if hop.broke]
    for hop in broken:
        ctx.progress.log(f"broken: {hop.says}")
    return {"hops": len(hops), "broken": [hop.name for hop in broken]}


def opened(link: Link, inputs: Mapping[str, Path], threads: int) -> tuple[Any, Path]:
    """The engine of a link, and the folder with its tokenizer."""
    from slmops.engines import open_engine
    from slmops.engines.torch_engine import TorchEngine
    from slmops.store.lora import ADAPTER

    folder = inputs[f"model.{link.name}"]
    if link.adapter:
        base = inputs[f"base.{link.name}"]
        return TorchEngine(base, threads=threads, adapter=folder / ADAPTER), base
    return open_engine(folder, threads=threads, kind=link.runtime), folder
