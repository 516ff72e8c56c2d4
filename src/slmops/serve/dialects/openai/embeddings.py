"""`/v1/embeddings`: vectors of length one, as numbers or as base64 of little-endian float32."""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Sequence
from typing import Any

from slmops.serve.dialects.openai.types import Embedding
from slmops.serve.scheduler import RequestError

MOST_INPUTS = 2048


def unit(vector: Sequence[float], dimensions: int | None) -> list[float]:
    """The first numbers of a vector (all: None), scaled to length one.

    Raises:
        RequestError: it has not so many.
    """
    if dimensions is not None and dimensions > len(vector):
        raise RequestError(f"the model's embeddings have {len(vector)} dimensions", "ask for no more")
    some = list(vector[:dimensions])
    length = math.sqrt(math.fsum(value * value for value in some))
    return [value / length for value in some] if length else some


def told(wanted: Embedding, vectors: Sequence[Sequence[float]], tokens: int) -> dict[str, Any]:
    """The response.

    Raises:
        RequestError: more dimensions are wanted than there are.
    """
    data = []
    for index, vector in enumerate(vectors):
        made: Any = unit(vector, wanted.dimensions)
        if wanted.encoding_format == "base64":
            made = base64.b64encode(struct.pack(f"<{len(made)}f", *made)).decode()
        data.append({"object": "embedding", "index": index, "embedding": made})
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": wanted.model, "usage": usage}
