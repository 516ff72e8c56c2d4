"""Method `compress.sensitivity`: how much each unit of a model's matrices suffers from few bits, and the best widths for a size.

For each unit (`core.widths`) and width the unit alone is rounded, each weight to nearest under the scales of least error that
the converter would find, and the next tokens of the answers in training texts are compared with the whole model's: the harm
is the mean Kullback-Leibler divergence. The widths are those with the least sum of harms whose file is at most `file_mb`
large; that rounding one unit does not change the harm of another is an assumption, that the sum is the least one is not.

Writes `widths.json` and `sensitivity.json` (harms and bytes by unit and width).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from slmops.compress import calibrate
from slmops.compress.grid import rounded
from slmops.core import widths as core
from slmops.core.method import Context, Declaration, Facts
from slmops.core.method import Params as BaseParams
from slmops.core.spec import Positive
from slmops.errors import CompressionError

if TYPE_CHECKING:
    import torch

DECLARATION = Declaration(
    name="compress.sensitivity",
    version="1",
    makes="widths",
    takes={"model": "model", "data": "dataset", "synthetic?": "dataset", "augmented?": "dataset"},
    extra="train",
    packages=("torch", "transformers", "safetensors"),
    threads=True,
)


class Params(BaseParams):
    """What to look at (`examples` of the files, as `input/file`), and the largest file, in MB of 10^6 bytes."""

    files: tuple[str, ...]
    file_mb: Annotated[float, Field(gt=0)]
    examples: Positive = 256
    block_size: Literal[16, 32, 64, 128] = 32


def run(params: Params, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Facts:
    """Measure and choose.

    Raises:
        CompressionError: no choice of widths is small enough, or the model has other layers than those that are known.
        DataError: there is no example to calibrate on.
        ModelError: the model cannot be loaded.
    """
    import torch

    with calibrate.opened(inputs, params.files, params.examples, ctx) as it, torch.no_grad():
        units = units_of(it)
        ctx.progress.start("rounding one unit at a time", len(units) * len(core.WIDTHS), "measurements")
        options = measured(it, units, params.block_size, ctx)
        ctx.progress.stop()
        matrices = {id(m.weight): m.weight for modules in units.values() for m in modules}
        tensors = {id(p): p for p in it.model.parameters()}
        rest = core.rest_bytes(len(it.blocks), sum(p.numel() for key, p in tensors.items() if key not in matrices))
        half = 2 * sum(p.numel() for p in tensors.values())
    bound = round(params.file_mb * 1e6)
    chosen = core.choose(options, bound - rest)
    if chosen is None:
        least = rest + sum(min(o.bytes for o in widths.values()) for widths in options.values())
        raise CompressionError(
            f"with {core.WIDTHS[0]} bits for each weight the file still has {least / 1e6:.3f} MB, more than {params.file_mb:g}",
            f"set convert.file_mb to {-(-least // 1000) / 1000:.3f} or more, or take a larger convert.block_size",
        )
    size = rest + sum(options[unit][bits].bytes for unit, bits in chosen.items())
    table = {u: {str(b): {"bytes": o.bytes, "harm": o.harm} for b, o in w.items()} for u, w in options.items()}
    (out / core.FILE).write_text(json.dumps(chosen, indent=2) + "\n", encoding="utf-8")
    (out / "sensitivity.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    for line in lines(options, chosen):
        ctx.progress.log(line)
    ctx.progress.log(f"at most {size / 1e6:.3f} MB, {1 - size / half:.1%} less than the weights take in fp16")
    counts = {str(bits): sum(1 for b in chosen.values() if b == bits) for bits in core.WIDTHS}
    return {"bytes_at_most": size, "units_by_bits": counts, "harm": sum(options[u][b].harm for u, b in chosen.items())}


def units_of(it: calibrate.Opened) -> dict[str, list[Any]]:
    """The modules of each unit, the table first and then the blocks' in order."""
    embedding, head = it.model.get_input_embeddings(), it.model.get_output_embeddings()
    tables = [embedding] if head is None or head.weight is embedding.weight else [embedding, head]
    units: dict[str, list[Any]] = {core.TABLE: tables}
    for number, block in enumerate(it.blocks):
        for layers in calibrate.staged(block):
            units[str(core.unit_of(f"layers.{number}.{next(iter(layers))}"))] = list(layers.values())
    return units


def measured(
    it: calibrate.Opened, units: Mapping[str, list[Any]], block_size: int, ctx: Context
) -> dict[str, dict[int, core.Option]]:
    """Bytes and harm of each width of each unit. The model is left as it was."""
    import torch

    wanted = list(answers(it))
    found: dict[str, dict[int, core.Option]] = {}
    for unit, modules in units.items():
        whole = [module.weight.data for module in modules]
        found[unit] = {}
        for bits in core.WIDTHS:
            for module, weight in zip(modules, whole, strict=True):
                module.weight.data = rounded(weight, torch.ones(weight.shape[1]), block_size, bits)
            harm = float(sum((w.exp() * (w - a)).sum() for w, a in zip(wanted, answers(it), strict=True)))
            size = sum(core.matrix_bytes(len(w), w.shape[1], bits, block_size) for w in whole)
            found[unit][bits] = core.Option(size, max(0.0, harm / max(1, sum(map(len, wanted)))))
            ctx.progress.advance()
        for module, weight in zip(modules, whole, strict=True):
            module.weight.data = weight
    return found


def answers(it: calibrate.Opened) -> Iterator[torch.Tensor]:
    """Log probabilities of the next tokens of answers, (positions, vocabulary) for each batch."""
    for batch, marks in zip(it.batches, it.marks, strict=True):
        yield calibrate.answer_logits(it.model, batch, marks).log_softmax(-1)


def lines(options: Mapping[str, Mapping[int, core.Option]], chosen: Mapping[str, int]) -> Iterator[str]:
    """A table of harms for people, a line for each unit; the width that was chosen has a star."""
    yield "harm of a width (nats per next token), * chosen"
    wide = max(len(unit) for unit in options)
    for unit, widths in options.items():
        cells = (
            f"{bits} bits {option.harm:.2e}{'*' if chosen[unit] == bits else ' '}" for bits, option in widths.items()
        )
        yield f"{unit:<{wide}}  {'  '.join(cells)}  {widths[chosen[unit]].bytes:>12,} bytes".rstrip()
