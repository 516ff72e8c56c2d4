"""Method `compress.awq`: inputs that carry much are made larger before rounding, and as much smaller in the layer before.

AWQ (arXiv 2306.00978). The columns of the matrices that share an input are multiplied by s, and the input divided by it: in
the weights of the norm before (queries, keys and values; gate and up), in the rows of the values' matrix (the attention's
output matrix) or in those of `up` (down). In exact arithmetic the model computes what it did; in float32 it does up to
rounding. s is mean |x| per input to the power of a, scaled so that its least and largest value multiply to 1, and a is the one
of `POWERS` after which the rounded matrices' outputs have the least squared error on training texts. Heads that share their
values share s.

Where `round` is set, each matrix of the blocks is then rounded to the grid of `compress.grid`, each weight alone, under the
scales of least error weighted by the mean square of its input. Otherwise the folded model is written in full, for another
method to round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slmops.compress import calibrate
from slmops.compress.grid import rounded
from slmops.core.method import Context, Declaration, Facts
from slmops.core.method import Params as BaseParams
from slmops.core.spec import Positive

if TYPE_CHECKING:
    import torch

DECLARATION = Declaration(
    name="compress.awq",
    version="1",
    makes="model",
    takes={"model": "model", "data": "dataset", "synthetic?": "dataset", "augmented?": "dataset", "widths?": "widths"},
    extra="train",
    packages=("torch", "transformers", "safetensors"),
    threads=True,
)

POWERS = tuple(round(i / 20, 2) for i in range(20))


class Params(BaseParams):
    """What to calibrate on (`examples` of the files, as `input/file`), and whether to round after folding."""

    files: tuple[str, ...]
    examples: Positive = 256
    block_size: Literal[16, 32, 64, 128] = 32
    round: bool = True


def run(params: Params, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Facts:
    """Write the model folder, folded and, if that is asked for, rounded.

    Raises:
        CompressionError: the model has other layers than those that are known.
        DataError: there is no example to calibrate on.
        ModelError: the model cannot be loaded.
    """
    import torch

    before = after = 0.0
    widths = calibrate.read_widths(inputs)
    with calibrate.opened(inputs, params.files, params.examples, ctx) as it, torch.no_grad():
        ctx.progress.start("scaling", len(it.blocks), "blocks")
        hidden, settings = calibrate.first_inputs(it.model, it.blocks, it.batches)
        for number, block in enumerate(it.blocks):
            following = [calibrate.call(block, h, kwargs) for h, kwargs in zip(hidden, settings[number], strict=True)]
            weigh = []
            for layers in calibrate.staged(block):
                name, layer = next(iter(layers.items()))
                bits = calibrate.width_of(widths, number, name)
                size, found = seen(block, layer, hidden, settings[number])
                factors, plain, best = search(
                    [one.weight for one in layers.values()], shared(name, size, it.model.config), found, params.block_size, bits
                )  # fmt: skip
                fold(block, name, layers, factors, it.model.config)
                before, after = before + plain, after + best
                weigh.append((layers.values(), found.diagonal() / factors.square(), bits))
            for ones, importance, bits in weigh if params.round else ():
                for one in ones:
                    one.weight.copy_(rounded(one.weight, importance, params.block_size, bits))
            hidden = following
            ctx.progress.advance()
        ctx.progress.stop()
        calibrate.save(it.model, inputs["model"], out)
        tokens, blocks = it.tokens, len(it.blocks)
    ctx.progress.log(
        f"scaled the inputs of layers by {tokens:,} tokens of training examples"
        + (f": squared error of the layers' outputs {after / before:.2f} times that without" if before else "")
    )
    return {"tokens": tokens, "error_to_nearest": round(after / before, 6) if before else None, "blocks": blocks}


def seen(
    block: Any, layer: Any, hidden: Sequence[torch.Tensor], settings: Sequence[Mapping[str, Any]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a layer's inputs x, the mean of |x| (inputs,) and the mean of x x^T (inputs, inputs)."""
    import torch

    total = torch.zeros(layer.in_features)
    count = 0

    def hook(_layer: Any, args: tuple[torch.Tensor, ...]) -> None:
        nonlocal count
        flat = args[0].reshape(-1, args[0].shape[-1]).float()
        total.add_(flat.abs().sum(0))
        count += len(flat)

    handle = layer.register_forward_pre_hook(hook)
    try:
        found = calibrate.moments(block, layer, hidden, settings)
    finally:
        handle.remove()
    return total / max(1, count), found


def shared(name: str, size: torch.Tensor, config: Any) -> torch.Tensor:
    """The sizes of a layer's inputs, equal where a fold cannot tell them apart: heads that read the same values."""
    if not name.endswith("o_proj"):
        return size
    heads, groups = heads_of(config)
    return size.reshape(groups, heads // groups, -1).mean(1, keepdim=True).expand(-1, heads // groups, -1).reshape(-1)


def heads_of(config: Any) -> tuple[int, int]:
    """Attention heads, and groups of keys and values."""
    heads = config.num_attention_heads
    return heads, getattr(config, "num_key_value_heads", None) or heads


def search(
    weights: Sequence[torch.Tensor], size: torch.Tensor, found: torch.Tensor, block_size: int, bits: int
) -> tuple[torch.Tensor, float, float]:
    """The factors of the inputs, and the squared error of the outputs without and with them.

    Args:
        weights: matrices (outputs, inputs) of one input.
        size: mean |x| of each input.
        found: mean x x^T.
    """
    best, plain, least = size.new_ones(len(size)), 0.0, float("inf")
    for power in POWERS:
        factors = size.clamp(min=1e-4) ** power
        factors = factors / (factors.max() * factors.min()).sqrt()
        importance = found.diagonal() / factors.square()
        error = sum(
            calibrate.loss(weight, rounded(weight * factors, importance, block_size, bits) / factors, found)
            for weight in weights
        )
        if power == 0:
            plain = error
        if error < least:
            best, least = factors, error
    return best, plain, least


def fold(block: Any, name: str, layers: Mapping[str, Any], factors: torch.Tensor, config: Any) -> None:
    """Multiply the columns of the layers by the factors, and divide what makes their input by them.

    Args:
        name: of one of the layers, in the block.
    """
    modules = dict(block.named_modules())
    kind = name.rpartition(".")[2]
    for layer in layers.values():
        layer.weight.mul_(factors)
    if kind == "down_proj":
        maker, rows = _part(modules, name, "up_proj", "gate_up_proj", len(factors))
        _divide(maker, rows, factors)
    elif kind == "o_proj":
        heads, groups = heads_of(config)
        each = factors.reshape(groups, heads // groups, -1)[:, 0].reshape(-1)
        maker, rows = _part(modules, name, "v_proj", "qkv_proj", len(each))
        _divide(maker, rows, each)
    else:
        norms = ("input_layernorm",) if kind in ("q_proj", "qkv_proj") else (
            "pre_feedforward_layernorm", "post_attention_layernorm",
        )  # fmt: skip
        norm = next(modules[name] for name in norms if name in modules)
        one = 1.0 if str(config.model_type).startswith("gemma") else 0.0
        norm.weight.copy_((norm.weight + one) / factors - one)


def _part(modules: Mapping[str, Any], name: str, own: str, joined: str, count: int) -> tuple[Any, slice]:
    """The layer that makes an input, and which of its outputs do: all of `own`, or the last `count` of `joined`."""
    here = name.rpartition(".")[0]
    if f"{here}.{own}" in modules:
        return modules[f"{here}.{own}"], slice(None)
    return modules[f"{here}.{joined}"], slice(-count, None)


def _divide(layer: Any, rows: slice, factors: torch.Tensor) -> None:
    layer.weight[rows] /= factors[:, None]
    if layer.bias is not None:
        layer.bias[rows] /= factors
