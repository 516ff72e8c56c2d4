"""Method `compress.gptq`: weights rounded to 4 bits one column after the other, each error made up for by the columns to come.

GPTQ (arXiv 2210.17323), for each linear layer of the decoder's blocks, in the order in which the model computes them, so
that a layer is calibrated on what the rounded layers before it give. The texts are training examples of the project. With
H = mean of x x^T over the inputs x of a layer and U the upper Cholesky factor of (H + damping)^-1, a column w is rounded to
q, and (w - q) / U_ii times row i of U is taken from the columns that are left. Columns go by falling H_ii; a group's scale is
fixed before, as the one of least squared error weighted by H_ii.

The result is a plain model folder whose weights lie on the grid of `convert`'s plain rule: in each group of `block_size` inputs the
weight that was largest becomes exactly -8 times the scale. So a converter that rounds by that rule, or by any that does not
move weights already on its grid, finds the same integers and scales again, in ONNX as in GGUF's Q4_0. The table of embeddings
and the output matrix are left to the converter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from slmops.core.method import Context, Declaration, Facts
from slmops.core.method import Params as BaseParams
from slmops.core.spec import Positive
from slmops.errors import CompressionError

if TYPE_CHECKING:
    import torch

DECLARATION = Declaration(
    name="compress.gptq",
    version="1",
    makes="model",
    takes={"model": "model", "data": "dataset", "synthetic?": "dataset", "augmented?": "dataset"},
    extra="train",
    packages=("torch", "transformers", "safetensors"),
    threads=True,
)

STAGES = (
    ("q_proj", "k_proj", "v_proj", "qkv_proj"), ("o_proj",), ("gate_proj", "up_proj", "gate_up_proj"), ("down_proj",),
)  # fmt: skip
"""Layers of a block by the order in which it computes them; those of one stage have the same input."""

LOWEST, HIGHEST = -8, 7
SHRINK = tuple(round(1 - 0.02 * i, 2) for i in range(16))
"""Scales that are tried, as shares of the one at which the largest weight of a group is exact."""

BATCH_TOKENS = 4096
COLUMNS = 128
"""Columns that are rounded before their errors reach the rest of a matrix: only for speed."""


class Params(BaseParams):
    """What to calibrate on: `examples` of the files, as `input/file`, those with the smallest ids."""

    files: tuple[str, ...]
    examples: Positive = 256
    block_size: Literal[16, 32, 64, 128] = 32
    damping: Annotated[float, Field(gt=0, lt=1)] = 0.01


def run(params: Params, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Facts:
    """Write the model folder with rounded weights.

    Raises:
        CompressionError: the model has other layers than those that are known, or the calibration gives no finite numbers.
        DataError: there is no example to calibrate on.
        ModelError: the model cannot be loaded.
    """
    import shutil

    import torch
    from transformers.utils import logging

    from slmops.engines.tokenizer import TOKENIZER_FILES, calibration
    from slmops.engines.torch_engine import TorchEngine

    logging.disable_progress_bar()
    source = inputs["model"]
    engine = TorchEngine(source, threads=ctx.threads)
    batches = batched(calibration(engine.tokenizer, inputs, params.files, params.examples, engine.context_length))
    blocks = blocks_of(engine.model)
    ctx.progress.start("rounding", len(blocks), "blocks")
    before = after = 0.0
    with torch.no_grad():
        hidden, settings = first_inputs(engine.model, blocks, batches)
        for number, block in enumerate(blocks):
            for layers in staged(block):
                found = hessian(block, next(iter(layers.values())), hidden, settings[number])
                for name, layer in layers.items():
                    rounded, plain = round_layer(layer.weight.data, found, params.block_size, params.damping)
                    if not torch.isfinite(rounded).all():
                        raise CompressionError(
                            f"rounding layer {number}.{name} gives no finite numbers", "raise the damping"
                        )
                    before += loss(layer.weight.data, plain, found)
                    after += loss(layer.weight.data, rounded, found)
                    layer.weight.data.copy_(rounded)
            hidden = [_call(block, h, kwargs) for h, kwargs in zip(hidden, settings[number], strict=True)]
            ctx.progress.advance()
    ctx.progress.stop()
    engine.model.save_pretrained(out)
    for name in (*TOKENIZER_FILES, "training.json"):
        if (source / name).exists():
            shutil.copyfile(source / name, out / name)
    tokens = sum(batch.numel() for batch in batches)
    engine.close()
    ctx.progress.log(
        f"rounded to 4 bits on {tokens:,} tokens of training examples"
        + (f": squared error of the layers' outputs {after / before:.2f} times that of rounding to nearest" if before else "")
    )  # fmt: skip
    return {"tokens": tokens, "error_to_nearest": round(after / before, 6) if before else None, "blocks": len(blocks)}


def batched(texts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Token ids in batches of equal length: int64 (examples, tokens) each."""
    import torch

    rows: dict[int, list[Sequence[int]]] = {}
    for ids in texts:
        rows.setdefault(len(ids), []).append(ids)
    batches = []
    for length, same in sorted(rows.items()):
        size = max(1, BATCH_TOKENS // length)
        batches += [torch.tensor(same[i : i + size]) for i in range(0, len(same), size)]
    return batches


def blocks_of(model: Any) -> list[Any]:
    """The decoder's blocks in order.

    Raises:
        CompressionError: there are none where they are looked for, or one has linear layers of other names.
    """
    import torch

    blocks = list(getattr(getattr(model, "model", None), "layers", ()))
    known = {name for stage in STAGES for name in stage}
    for block in blocks:
        names = {
            name.rpartition(".")[2] for name, module in block.named_modules() if isinstance(module, torch.nn.Linear)
        }
        if not names or names - known:
            odd = ", ".join(sorted(names - known)) or "none"
            raise CompressionError(
                f"a block has linear layers that are not known: {odd}", "leave compress.quantization out"
            )
    if not blocks:
        raise CompressionError(
            f"{type(model).__name__} has no decoder blocks that are known", "leave compress.quantization out"
        )
    return blocks


def staged(block: Any) -> Iterator[dict[str, Any]]:
    """The linear layers of a block, stage by stage."""
    modules = dict(block.named_modules())
    for stage in STAGES:
        found = {name: module for name, module in modules.items() if name.rpartition(".")[2] in stage}
        if found:
            yield found


def first_inputs(
    model: Any, blocks: Sequence[Any], batches: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], list[list[dict[str, Any]]]]:
    """What the first block gets for each batch, and by block and batch what each gets besides (masks, positions)."""
    hidden: list[torch.Tensor] = []
    settings: list[list[dict[str, Any]]] = [[] for _ in blocks]

    def keep(number: int) -> Any:
        def hook(_block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            first = args[0] if args else kwargs["hidden_states"]
            if number == 0:
                hidden.append(first)
            settings[number].append({k: v for k, v in kwargs.items() if k not in ("hidden_states", "past_key_values")})

        return hook

    handles = [block.register_forward_pre_hook(keep(n), with_kwargs=True) for n, block in enumerate(blocks)]
    try:
        for batch in batches:
            model.model(input_ids=batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return hidden, settings


def _call(block: Any, hidden: torch.Tensor, kwargs: Mapping[str, Any]) -> torch.Tensor:
    """A block's output, (examples, tokens, hidden)."""
    result: torch.Tensor | tuple[torch.Tensor, ...] = block(hidden, **kwargs)
    return result[0] if isinstance(result, tuple) else result


def hessian(
    block: Any, layer: Any, hidden: Sequence[torch.Tensor], settings: Sequence[Mapping[str, Any]]
) -> torch.Tensor:
    """Mean of x x^T over the inputs x of a layer: float32 (inputs, inputs)."""
    import torch

    total = torch.zeros(layer.in_features, layer.in_features)
    count = 0

    def hook(_layer: Any, args: tuple[torch.Tensor, ...]) -> None:
        nonlocal count
        flat = args[0].reshape(-1, args[0].shape[-1]).float()
        total.addmm_(flat.T, flat)
        count += len(flat)

    handle = layer.register_forward_pre_hook(hook)
    try:
        for h, kwargs in zip(hidden, settings, strict=True):
            _call(block, h, kwargs)
    finally:
        handle.remove()
    return total / max(1, count)


def scales_of(weight: torch.Tensor, importance: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A scale for each group, as float16 would keep it, and where the weight that fixes it is.

    Args:
        weight: float32 (outputs, inputs).
        importance: float32 (inputs,), weights of the squared errors.

    Returns:
        float32 (outputs, inputs) scale of each weight, and bool (outputs, inputs): the largest weight of each group.
    """
    import torch

    rows, inputs = weight.shape
    padding = -inputs % block_size
    groups = torch.nn.functional.pad(weight, (0, padding)).reshape(rows, -1, block_size)
    weights = torch.nn.functional.pad(importance, (0, padding)).reshape(1, -1, block_size)
    place = groups.abs().argmax(2, keepdim=True)
    exact = groups.gather(2, place) / LOWEST
    best, least = exact.half().float(), torch.full_like(exact, float("inf"))
    for share in SHRINK:
        scale = (exact * share).half().float()
        error = ((_nearest(groups, scale) * scale - groups).square() * weights).sum(2, keepdim=True)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    largest = torch.zeros_like(groups, dtype=torch.bool).scatter_(2, place, True)
    wide = best.expand(-1, -1, block_size)
    return wide.reshape(rows, -1)[:, :inputs].contiguous(), largest.reshape(rows, -1)[:, :inputs].contiguous()


def _nearest(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The integer of least distance, from -8 to 7; 0 where the scale is 0."""
    import torch

    return torch.where(scale == 0, torch.zeros_like(weight), weight / scale).round_().clamp_(LOWEST, HIGHEST)


def round_layer(
    weight: torch.Tensor, found: torch.Tensor, block_size: int, damping: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix on the grid, once by GPTQ and once by the same scales to nearest.

    Args:
        weight: (outputs, inputs).
        found: `hessian` of its inputs.
        damping: share of the mean of its diagonal that is added to it.

    Returns:
        float32 (outputs, inputs) both.
    """
    import torch

    work = weight.float().clone()
    diagonal = found.diagonal()
    scale, largest = scales_of(work, diagonal, block_size)
    plain = torch.where(largest, LOWEST, _nearest(work, scale)) * scale
    order = diagonal.argsort(descending=True, stable=True)
    damped = found[order][:, order].clone()
    damped.diagonal().add_(damping * diagonal.mean().clamp(min=1e-12))
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    work, scale, largest = work[:, order], scale[:, order], largest[:, order]
    done = torch.empty_like(work)
    for start in range(0, work.shape[1], COLUMNS):
        end = min(start + COLUMNS, work.shape[1])
        errors = torch.empty(work.shape[0], end - start)
        for i in range(start, end):
            column = work[:, i]
            steps = torch.where(largest[:, i], LOWEST, _nearest(column, scale[:, i]))
            done[:, i] = steps * scale[:, i]
            errors[:, i - start] = (column - done[:, i]) / upper[i, i]
            work[:, i:end] -= errors[:, i - start, None] * upper[i, None, i:end]
        work[:, end:] -= errors @ upper[start:end, end:]
    back = torch.empty_like(done)
    back[:, order] = done
    return back, plain


def loss(weight: torch.Tensor, rounded: torch.Tensor, found: torch.Tensor) -> float:
    """Mean squared error of a layer's outputs, summed over the outputs."""
    gap = weight.float() - rounded
    return float(((gap @ found) * gap).sum())
