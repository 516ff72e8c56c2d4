"""A float32 GGUF file to fewer bits, by llama.cpp's own library: the same types, and the same mixture of them, as its own tool.

k-quants need rows of a multiple of 256 weights; llama.cpp rounds other matrices to a type of its choice, mostly a larger one, and
does not say so. `types` tells what became of each.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops.convert import gguf_names
from slmops.errors import ConversionError, MissingExtraError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def quantize(
    source: Path, target: Path, kind: str, threads: int, importance: Mapping[str, NDArray[np.float32]]
) -> None:
    """Write `target` with matrices of a type.

    Args:
        source: a GGUF file in float32.
        kind: of llama.cpp's file types, such as q4_0 or q4_k_m.
        importance: by the name of a tensor in GGUF, a weight for each of its inputs: float32 (inputs,). {}: all count alike.

    Raises:
        ConversionError: llama.cpp refuses.
        MissingExtraError: llama.cpp is not installed.
    """
    try:
        import llama_cpp
    except ImportError as error:
        raise MissingExtraError("llama.cpp", "llamacpp") from error
    from slmops.engines.gguf_file import complaint, listen

    lib: Any = llama_cpp
    listen(lib)
    params = lib.llama_model_quantize_default_params()
    params.ftype = getattr(lib, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    params.nthread = threads
    known = {name: values.astype("float32") for name, values in importance.items()}
    table = (lib.llama_model_imatrix_data * (len(known) + 1))()  # the last one stays empty: there it ends
    for entry, (name, values) in zip(table, known.items(), strict=False):
        entry.name, entry.size = name.encode(), len(values)
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if known:
        params.imatrix = ctypes.cast(table, ctypes.POINTER(lib.llama_model_imatrix_data))
    if lib.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)):
        target.unlink(missing_ok=True)
        raise ConversionError(f"llama.cpp cannot write {kind}: {complaint()}", "take another type, such as q8_0")


def types(file: Path) -> dict[str, int]:
    """How many matrices of a GGUF file are of each type."""
    reader = gguf_names.library().GGUFReader(file)
    return dict(Counter(tensor.tensor_type.name.lower() for tensor in reader.tensors if len(tensor.shape) > 1))
