"""Whether `convert.file_mb` leaves room for a base, asked before it is trained.

A student from scratch is looked at when its project file is read (`flow/checks.py`); of a base only its folder tells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from slmops.core import widths
from slmops.errors import Problem
from slmops.flow import memory
from slmops.flow.state import State, Status
from slmops.train.shape import Shape

SHRINKS = ("compress.depth", "compress.width")
"""Methods that leave fewer weights in the blocks, nobody knows yet how many."""


def _narrowed(status: Status, by_id: Mapping[str, Status]) -> bool:
    """Whether a step that has not run yet takes weights out of a model on its way to this one."""
    while status.output is None:
        if status.step.method in SHRINKS:
            return True
        before = status.step.inputs.get("model") or status.step.inputs.get("base")  # a recovery trains from a base
        if before is None:
            return False
        status = by_id[before]
    return False


def require(state: State, survey: Sequence[Status]) -> None:
    """Refuse a size that the blocks of a base exceed with the fewest bits for each weight.

    Raises:
        SpecError: with the line of `convert.file_mb`, and the least that can do.
    """
    by_id = {status.step.id: status for status in survey}
    for status in survey:
        step = status.step
        if status.state != "run" or step.method != "compress.sensitivity":
            continue
        made = by_id[step.inputs["model"]]
        if _narrowed(made, by_id):
            continue
        while made.output is None and made.step.method.startswith("compress."):
            made = by_id[made.step.inputs["model"]]
        folder = memory.folder_of(state, made.step.id, survey)
        shape = Shape.of_folder(folder) if folder else memory.shape_of(state, made.step, survey)
        if shape is None:
            continue
        block = step.params["block_size"]
        linears = shape.linears.values()
        least = shape.layers * sum(
            widths.matrix_bytes(out, inputs, min(widths.WIDTHS), block) for inputs, out in linears
        )
        least += widths.rest_bytes(shape.layers, 0)
        wanted = step.params["file_mb"]
        if wanted * 1e6 < least:
            said = f"({wanted:g}) is less than the model's blocks take with {min(widths.WIDTHS)} bits for each weight"
            hint = f"give more than {-(-least // 1000) / 1000:.3f}, or a smaller student.base"
            raise state.project.wrong([Problem(said, hint, path="convert.file_mb")])
