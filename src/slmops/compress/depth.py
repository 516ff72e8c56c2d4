"""Method `compress.depth`: a model without the blocks that change least.

Block influence (ShortGPT, arXiv 2403.03853): 1 minus the mean cosine similarity of what goes into a block and what comes
out of it, over the tokens of training examples of the project. The block of least influence goes, and what is left is
measured again before the next one is chosen: two blocks may each be of little use beside the other, yet not both, which
influences that are measured once cannot tell. It costs a pass over the texts for each block.

The result is a plain model folder with fewer blocks, numbered anew; each keeps its kind of attention (`layer_types`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops.core import pruning
from slmops.core.method import Context, Declaration, Facts
from slmops.core.method import Params as BaseParams
from slmops.core.spec import Positive
from slmops.errors import CompressionError

if TYPE_CHECKING:
    import torch

DECLARATION = Declaration(
    name="compress.depth",
    version="1",
    makes="model",
    takes={"model": "model", "data": "dataset", "synthetic?": "dataset", "augmented?": "dataset"},
    extra="train",
    packages=("torch", "transformers", "safetensors"),
    threads=True,
)

BLOCK = re.compile(r"^model\.layers\.(\d+)\.")


class Params(BaseParams):
    """How many blocks go; what is looked at: `examples` of the files, as `input/file`, those with the smallest ids."""

    files: tuple[str, ...]
    examples: Positive = 256
    layers: Positive = 1


def run(params: Params, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Facts:
    """Write the model folder with fewer blocks.

    Raises:
        CompressionError: there are no more blocks than are to go, or they are not known.
        DataError: there is no example to look at.
        ModelError: the model cannot be loaded.
    """
    from slmops.compress import folder
    from slmops.compress.calibrate import opened
    from slmops.core.spec import Prune
    from slmops.engines import read_json

    source = inputs["model"]
    config = read_json(source / "config.json")
    refusal = pruning.refusal(config, Prune(layers=params.layers))
    if refusal:
        raise CompressionError(*refusal)
    with opened(inputs, params.files, params.examples, ctx) as it:
        kinds = getattr(it.model.config, "layer_types", None)
        kept, gone, first = chosen(it.model, it.blocks, it.batches, params.layers, ctx)
    places = {old: new for new, old in enumerate(kept)}

    def change(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor] | None:
        found = BLOCK.match(name)
        if found is None:
            return name, tensor
        new = places.get(int(found[1]))
        return None if new is None else (f"model.layers.{new}.{name[found.end() :]}", tensor)

    before, after = folder.rewrite(source, out, change)
    folder.complete(source, out, pruning.shorter(config, kept, kinds), after)
    ctx.progress.log(
        f"{len(gone)} of {len(first)} blocks taken out (number, from 0: {', '.join(map(str, gone))}): {after / 1e6:.2f} M parameters "
        f"instead of {before / 1e6:.2f} M; influence of each block before: {', '.join(f'{value:.3f}' for value in first)}"
    )
    return {
        "removed": gone, "influence": [round(value, 6) for value in first], "parameters": after, "parameters_before": before,
    }  # fmt: skip


def chosen(
    model: Any, blocks: Sequence[Any], batches: Sequence[torch.Tensor], count: int, ctx: Context
) -> tuple[list[int], list[int], list[float]]:
    """Which blocks stay, in their order; which go, the least first; and the influence of each before any is gone."""
    import torch

    from slmops.compress.calibrate import first_inputs

    kept, gone, first = list(range(len(blocks))), list[int](), list[float]()
    ctx.progress.start("measuring blocks", count, "passes")
    with torch.no_grad():
        hidden, settings = first_inputs(model, blocks, batches)
        while len(gone) < count:
            found = influences([blocks[i] for i in kept], hidden, [settings[i] for i in kept])
            first = first or found
            least = min(range(len(kept)), key=found.__getitem__)
            gone.append(kept.pop(least))
            ctx.progress.advance()
    ctx.progress.stop()
    return kept, gone, first


def influences(
    blocks: Sequence[Any], hidden: Sequence[torch.Tensor], settings: Sequence[Sequence[Mapping[str, Any]]]
) -> list[float]:
    """The influence of each block of a chain.

    Args:
        hidden: what the first one gets, (examples, tokens, hidden) for each batch.
        settings: by block and batch, what each gets besides.
    """
    import torch

    from slmops.compress.calibrate import call

    found = []
    for block, own in zip(blocks, settings, strict=True):
        same, tokens, after = 0.0, 0, []
        for into, kwargs in zip(hidden, own, strict=True):
            out = call(block, into, kwargs)
            same += float(torch.cosine_similarity(into.double(), out.double(), dim=-1).sum())
            tokens += out.shape[0] * out.shape[1]
            after.append(out)
        found.append(1 - same / tokens)
        hidden = after
    return found
