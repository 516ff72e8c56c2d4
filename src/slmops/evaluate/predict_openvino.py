"""Method `evaluate.predict_openvino`: `evaluate.predict` in OpenVINO, whose version counts in the key."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from slmops.core.method import Context, Declaration, Facts
from slmops.evaluate import predict

DECLARATION = Declaration(
    name="evaluate.predict_openvino",
    version=predict.DECLARATION.version,
    makes="predictions",
    takes=predict.DECLARATION.takes,
    extra="openvino",
    packages=("openvino", "tokenizers"),
)


class Params(predict.Params):
    """As those of `evaluate.predict`."""

    runtime: Literal["openvino"] = "openvino"


def run(params: Params, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Facts:
    """See `evaluate.predict`."""
    return predict.run(params, inputs, out, ctx)
