"""Method `evaluate.predict_mlx`: `evaluate.predict` in MLX, whose version counts in the key."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from slmops.core.method import Context, Declaration, Facts
from slmops.evaluate import predict

DECLARATION = Declaration(
    name="evaluate.predict_mlx",
    version=predict.DECLARATION.version,
    makes="predictions",
    takes=predict.DECLARATION.takes,
    extra="mlx",
    packages=("mlx", "mlx-lm", "tokenizers"),
)


class Params(predict.Params):
    """As those of `evaluate.predict`."""

    runtime: Literal["mlx"] = "mlx"


def run(params: Params, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Facts:
    """See `evaluate.predict`."""
    return predict.run(params, inputs, out, ctx)
