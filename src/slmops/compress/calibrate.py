"""What the methods share that round by what training texts make of a model: the texts, its blocks in turn, what layers see.

A method opens the model with `opened`, goes through `blocks` with the hidden states of all texts, and ends with `save`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops.core import widths as core
from slmops.core.method import Context
from slmops.errors import CompressionError

if TYPE_CHECKING:
    import torch

BATCH_TOKENS = 4096
HINT = "take it out of `compress`"


@dataclass(frozen=True)
class Text:
    """Token ids, and the position from which on the next token is part of the answer."""

    ids: list[int]
    start: int


@dataclass
class Opened:
    """A model and its texts.

    Attributes:
        model: the transformers model, float32.
        blocks: its decoder's blocks in order.
        batches: int64 (examples, tokens) each.
        marks: for each batch, bool (examples, tokens): where the next token is part of an answer.
        held: numbers of the batches whose texts are kept for looking at what was learned from the others.
    """

    model: Any
    blocks: list[Any]
    batches: list[torch.Tensor]
    marks: list[torch.Tensor]
    held: range

    @property
    def tokens(self) -> int:
        """In all texts."""
        return sum(batch.numel() for batch in self.batches)


@contextlib.contextmanager
def opened(
    inputs: Mapping[str, Path], files: Sequence[str], examples: int, ctx: Context, hold: int = 0
) -> Iterator[Opened]:  # fmt: skip
    """The model `inputs["model"]` with `examples` texts of the files, one in `hold` of which is held out (0: none).

    Raises:
        CompressionError: the model has other layers than those that are known.
        DataError: there is no example to calibrate on.
        ModelError: the model cannot be loaded.
    """
    from transformers.utils import logging

    from slmops.engines.tokenizer import calibration_texts
    from slmops.engines.torch_engine import TorchEngine

    logging.disable_progress_bar()
    engine = TorchEngine(inputs["model"], threads=ctx.threads)
    try:
        engine.model.requires_grad_(False)
        texts = calibration_texts(engine.tokenizer, inputs, files, examples, engine.context_length)
        learned = len(texts) - (len(texts) // hold if hold else 0)
        batches, marks = batched([Text(*text) for text in texts[:learned]])
        held, theirs = batched([Text(*text) for text in texts[learned:]])
        known = range(len(batches), len(batches) + len(held))
        yield Opened(engine.model, blocks_of(engine.model), batches + held, marks + theirs, known)
    finally:
        engine.close()


def save(model: Any, source: Path, out: Path) -> None:
    """Write the model with the tokenizer of the folder that it came from."""
    import shutil

    from slmops.engines.tokenizer import TOKENIZER_FILES

    model.save_pretrained(out)
    for name in (*TOKENIZER_FILES, "training.json"):
        if (source / name).exists():
            shutil.copyfile(source / name, out / name)


def read_widths(inputs: Mapping[str, Path]) -> dict[str, int]:
    """The widths that an earlier step chose, by unit; {}: there is no such step, and all matrices get 4 bits."""
    from slmops.engines import read_json

    return dict(read_json(inputs["widths"] / core.FILE)) if "widths" in inputs else {}


def width_of(widths: Mapping[str, int], block: int, layer: str) -> int:
    """Bits of a layer of a block, by its name in the block."""
    return widths.get(core.unit_of(f"layers.{block}.{layer}") or "", 4)


def batched(texts: Sequence[Text]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Token ids in batches of equal length, int64 (examples, tokens) each, and the marks of each; see `Opened`."""
    import torch

    rows: dict[int, list[Text]] = {}
    for text in texts:
        rows.setdefault(len(text.ids), []).append(text)
    batches, marks = [], []
    for length, same in sorted(rows.items()):
        size = max(1, BATCH_TOKENS // length)
        for i in range(0, len(same), size):
            part = same[i : i + size]
            batches.append(torch.tensor([text.ids for text in part]))
            starts = torch.tensor([[text.start] for text in part])
            marks.append(torch.arange(length)[None, :] >= starts)
    return batches, marks


def blocks_of(model: Any) -> list[Any]:
    """The decoder's blocks in order.

    Raises:
        CompressionError: there are none where they are looked for, or one has linear layers of other names.
    """
    import torch

    blocks = list(getattr(getattr(model, "model", None), "layers", ()))
    known = {name for names in core.ROLES.values() for name in names}
    for block in blocks:
        names = {
            name.rpartition(".")[2] for name, module in block.named_modules() if isinstance(module, torch.nn.Linear)
        }
        if not names or names - known:
            odd = ", ".join(sorted(names - known)) or "none"
            raise CompressionError(f"a block has linear layers that are not known: {odd}", HINT)
    if not blocks:
        raise CompressionError(f"{type(model).__name__} has no decoder blocks that are known", HINT)
    return blocks


def walk(
    it: Opened, ctx: Context, label: str, units: Iterable[Sequence[str]] = tuple(core.ROLES.values())
) -> Iterator[tuple[str, Any, torch.Tensor]]:
    """Linear layers in the order in which the model computes them, each with the `moments` of its inputs.

    What is done to a layer's weight before the next one is asked for is seen by those after it. To be used without gradients.

    Args:
        units: names of layers with the same input, unit by unit; others are left out.

    Yields:
        Name of the layer in the model, the layer, and its moments; layers of one unit share theirs.
    """
    wanted = tuple(units)
    ctx.progress.start(label, len(it.blocks), "blocks")
    hidden, settings = first_inputs(it.model, it.blocks, it.batches)
    for number, block in enumerate(it.blocks):
        for layers in staged(block, wanted):
            found = moments(block, next(iter(layers.values())), hidden, settings[number])
            for name, layer in layers.items():
                yield f"model.layers.{number}.{name}", layer, found
        hidden = [call(block, h, kwargs) for h, kwargs in zip(hidden, settings[number], strict=True)]
        ctx.progress.advance()
    ctx.progress.stop()


def staged(block: Any, units: Iterable[Sequence[str]] = tuple(core.ROLES.values())) -> Iterator[dict[str, Any]]:
    """The linear layers of a block by name, unit by unit in the order in which it computes them."""
    modules = dict(block.named_modules())
    for names in units:
        found = {name: module for name, module in modules.items() if name.rpartition(".")[2] in names}
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


def call(
    block: Any, hidden: torch.Tensor, kwargs: Mapping[str, Any], weights: Mapping[str, torch.Tensor] | None = None
) -> torch.Tensor:
    """A block's output, (examples, tokens, hidden), with some of its parameters replaced."""
    import torch

    result = torch.func.functional_call(block, dict(weights), (hidden,), dict(kwargs)) if weights else block(hidden, **kwargs)  # fmt: skip
    made: torch.Tensor = result[0] if isinstance(result, tuple) else result
    return made


def answer_logits(model: Any, batch: torch.Tensor, marks: torch.Tensor) -> torch.Tensor:
    """Logits where a batch is marked, (positions, vocabulary)."""
    length = batch.shape[1]
    first = int(marks.any(0).int().argmax()) if marks.any() else length - 1
    result = model(input_ids=batch, use_cache=False, logits_to_keep=length - first)
    logits: torch.Tensor = result.logits[marks[:, first:]]
    return logits


def moments(
    block: Any, layer: Any, hidden: Sequence[torch.Tensor], settings: Sequence[Mapping[str, Any]]
) -> torch.Tensor:
    """Mean of x x^T over the inputs x of a layer: float32 (inputs, inputs). What the block computes after that layer is left out."""
    import torch

    total = torch.zeros(layer.in_features, layer.in_features)
    count = 0

    def hook(_layer: Any, args: tuple[torch.Tensor, ...]) -> None:
        nonlocal count
        flat = args[0].reshape(-1, args[0].shape[-1]).float()
        total.addmm_(flat.T, flat)
        count += len(flat)
        raise _Enough

    handle = layer.register_forward_pre_hook(hook)
    try:
        for h, kwargs in zip(hidden, settings, strict=True):
            with contextlib.suppress(_Enough):
                call(block, h, kwargs)
    finally:
        handle.remove()
    return total / max(1, count)


class _Enough(Exception):
    """A layer's inputs have been seen."""


def loss(weight: torch.Tensor, rounded: torch.Tensor, found: torch.Tensor) -> float:
    """Mean squared error of a layer's outputs, summed over the outputs; `found`: `moments` of its inputs."""
    gap = weight.float() - rounded
    return float(((gap @ found) * gap).sum())
