"""Engines of the server: a decoder with rows, each of which holds one prompt and its answer.

Unlike `slmops.core.engine.Engine`, which answers a list of prompts, such an engine takes single steps, so that answers can
join and leave at any of them. One adapter a runtime.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, get_args

from slmops.errors import ModelError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Kind = Literal["onnx", "llama_cpp", "torch"]
KINDS: tuple[Kind, ...] = get_args(Kind)
RUNTIMES: dict[str, Kind] = {"onnx_genai": "onnx", "llama_cpp": "llama_cpp", "torch": "torch"}
"""What `slmops.engines.detect` calls a folder's runtime, and the engine for it."""


class Rows(Protocol):
    """A loaded model with a fixed number of rows.

    Law: the logits of a row depend on its own tokens, its adapter and on how they were fed, never on other rows; bit for bit, where
    the engine does not say otherwise.

    Attributes:
        packed: whether idle rows below a busy one are computed, so that it is worth to move rows down.
        adapters: names of those that a row can have.
        cache_bytes: keys and values of all rows when they are full.
    """

    rows: int
    context_length: int
    vocabulary: int
    end_ids: frozenset[int]
    packed: bool
    adapters: frozenset[str]

    @property
    def cache_bytes(self) -> int:
        """See above."""

    def length(self, row: int) -> int:
        """How many tokens a row holds."""

    def cut(self, row: int, length: int) -> None:
        """Forget the tokens of a row after its first `length`; of all where the model has no state of a beginning."""

    def wear(self, row: int, adapter: str | None) -> None:
        """Compute a row with this adapter from now on; None: the base alone. The row is empty, or had the same."""

    def feed(self, row: int, ids: Sequence[int]) -> NDArray[np.float32]:
        """Add tokens to a row; the logits after the last of them, (vocabulary,)."""

    def decode(self, tokens: Mapping[int, int]) -> dict[int, NDArray[np.float32]]:
        """Add one token to each of these rows, in one pass for each adapter; the logits of each, (vocabulary,), valid until the next
        call."""

    def move(self, source: int, target: int) -> None:
        """Copy what a row holds into another, its adapter too; the source is empty then."""

    def embed(self, ids: Sequence[int], adapter: str | None = None) -> Iterator[NDArray[np.float32] | None]:
        """The mean of the last hidden states over all tokens, (width,), of length 1; None before it after each part that was read.

        Raises:
            RequestError: the model cannot.
        """

    def use_threads(self, threads: int) -> None:
        """Compute with so many CPU threads from now on."""

    def close(self) -> None:
        """Free the model."""


def kind_of(model: Path, wanted: str | None = None) -> Kind:
    """The engine for a model's folder, or for a GGUF file.

    Args:
        wanted: the one that the user wants; None: the one that the folder is for.

    Raises:
        ModelError: no engine of the server runs it, or the wanted one does not.
    """
    from slmops.engines import detect

    found = "llama_cpp" if model.is_file() and model.suffix == ".gguf" else detect(model)
    if found not in RUNTIMES:
        raise ModelError(
            f"{model} is a model for {found}, which the server does not run",
            "serve the model in the form of ONNX Runtime GenAI, GGUF or Hugging Face",
        )
    kind = RUNTIMES[found]
    if wanted not in (None, kind):
        raise ModelError(f"{model} is a model for {kind}, not for {wanted}", f"use engine {kind}, or leave it out")
    return kind


def open_rows(
    model: Path, *, rows: int, context: int | None = None, threads: int = 1, engine: str | None = None,
    adapters: Mapping[str, Path] | None = None,
) -> Rows:  # fmt: skip
    """Load a model.

    Args:
        rows, context, threads: see `slmops.serve.engines.onnx.OnnxRows`.
        engine: see `kind_of`.
        adapters: files of adapters by name, see `slmops.serve.adapters`.

    Raises:
        MissingExtraError: the runtime is not installed.
        ModelError: it cannot be loaded.
    """
    kind = kind_of(model, engine)
    if kind == "llama_cpp":
        from slmops.serve.engines.llama_cpp import LlamaCppRows

        return LlamaCppRows(model, rows=rows, context=context, threads=threads, adapters=adapters)
    if kind == "torch":
        from slmops.serve.engines.torch import TorchRows

        return TorchRows(model, rows=rows, context=context, threads=threads, adapters=adapters)
    from slmops.serve.engines.onnx import OnnxRows

    return OnnxRows(model, rows=rows, context=context, threads=threads, adapters=adapters)
