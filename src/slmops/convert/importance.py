"""How much each input of a model's matrices counts, for quantisers that weigh errors by it: mean squares over training examples.

It is what llama.cpp calls an importance matrix. Taken by torch, in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def mean_squares(
    source: Path, inputs: Mapping[str, Path], files: Sequence[str], count: int, threads: int
) -> dict[str, NDArray[np.float32]]:
    """By the name of a linear layer, the mean square of each of its inputs: float32 (inputs,).

    Args:
        source: a Hugging Face folder.
        files, count: see `engines.tokenizer.calibration`.

    Raises:
        DataError: there is no example.
        ModelError: the model cannot be loaded.
    """
    import torch

    from slmops.engines.tokenizer import calibration
    from slmops.engines.torch_engine import TorchEngine

    engine = TorchEngine(source, threads=threads)
    sums: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Any:
        def add(_layer: Any, args: tuple[torch.Tensor, ...]) -> None:
            squares = args[0].reshape(-1, args[0].shape[-1]).square().sum(0)
            sums[name] = sums[name] + squares if name in sums else squares

        return add

    linears = {n: m for n, m in engine.model.named_modules() if isinstance(m, torch.nn.Linear)}
    for name, layer in linears.items():
        layer.register_forward_pre_hook(hook(name))
    tokens = 0
    with torch.no_grad():
        for ids in calibration(engine.tokenizer, inputs, files, count, engine.context_length):
            engine.model(torch.tensor([ids]))
            tokens += len(ids)
    engine.close()
    return {name: (total / tokens).numpy() for name, total in sums.items()}
