"""From a decoder in torch to a program for ExecuTorch, with XNNPACK for what it has operations for. A room below conversion, since the
smallest model (`minimal`) is written so too.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


def lowered(decoder: Any, context: int, said: Mapping[str, Any]) -> Any:
    """The program of a decoder, which takes 1 to `context` tokens at a time."""
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes import MemoryPlanningPass
    from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass

    given = (torch.zeros(1, min(8, context), dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    several = torch.export.Dim("tokens", min=1, max=context)
    exported = torch.export.export(decoder, given, dynamic_shapes=({1: several}, {}), strict=False)
    edge = to_edge_transform_and_lower(
        exported,
        partitioner=[XnnpackPartitioner()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
        constant_methods=dict(said),
    )
    return edge.to_executorch(
        ExecutorchBackendConfig(
            memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
            sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
        )
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Without what torch, torchao and ExecuTorch say of their insides while they export."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
