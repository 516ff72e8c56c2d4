"""MLX: the engine for a folder that `convert.mlx` or mlx-lm itself wrote, with the tokenizer and chat template of the folder.

Answers come one prompt after the other. MLX runs on the GPU of a Mac; without a GPU on one thread of the processor, whatever `threads`
says. There half precision is computed by software, a hundred times slower, so weights of 16 bits are widened to float32
when they are loaded (rounded matrices stay rounded): answers are those of the stored weights, the memory is not that of a Mac. MLX's
compiler is switched off there too: it would call a C++ compiler at run time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops.core import runtimes
from slmops.core.engine import Generation, Sampling
from slmops.engines import at_once, no_room, one_by_one, read_json
from slmops.engines.plain_tokenizer import PlainTokenizer, end_ids
from slmops.errors import MissingExtraError, ModelError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CHUNK = 512
"""Tokens that go through the model at once."""


def library() -> tuple[Any, Any]:
    """`mlx.core` and `mlx_lm.utils`, with MLX's compiler off where there is no GPU.

    Raises:
        MissingExtraError: one of them is not installed.
    """
    try:
        import mlx.core

        with _limits_kept():
            import mlx_lm.utils
    except ImportError as error:
        raise MissingExtraError("MLX", "mlx") from error
    if on_cpu(mlx.core):
        mlx.core.disable_compile()
    return mlx.core, mlx_lm.utils


@contextlib.contextmanager
def _limits_kept() -> Iterator[None]:
    """mlx-lm sets how many files the process may open when it is imported: not in ours."""
    try:
        import resource
    except ImportError:
        yield
        return
    change = resource.setrlimit
    resource.setrlimit = lambda *_: None
    try:
        yield
    finally:
        resource.setrlimit = change


def on_cpu(mx: Any) -> bool:
    """Whether MLX has no GPU here."""
    return bool(mx.default_device() == mx.cpu)


class MlxEngine:
    """A folder in mlx-lm's form. See `slmops.core.engine.Engine`. Not safe for use by two threads at once."""

    name = "mlx"

    def __init__(self, folder: Path, *, threads: int = 1) -> None:
        mx, utils = library()
        from mlx_lm.models.cache import make_prompt_cache

        self._mx, self._make_cache = mx, make_prompt_cache
        config = read_json(folder / "config.json")
        self._tokenizer = PlainTokenizer(folder, "mlx")
        try:
            self._model: Any = utils.load_model(folder)[0]
            if on_cpu(mx):
                self._model.set_dtype(mx.float32)
                mx.eval(self._model.parameters())
            self.context_length = runtimes.context({"max_position_embeddings": 2048} | config)
        except Exception as error:
            raise ModelError(f"{folder} cannot be loaded: {error}", "convert the model again") from error
        self.end_ids = end_ids(folder, config, self._tokenizer.id_of(self._tokenizer.marks.get("eos_token", "")))
        self._cache: Any = None

    def encode(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of the rendered prompt, ready for the answer."""
        return self._tokenizer.encode(messages)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids without special tokens."""
        return self._tokenizer.decode(ids)

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, on_done: Callable[[int], None] | None = None
    ) -> list[Generation]:
        """One answer per prompt, one prompt after the other. With sampling, prompt i is seeded with `seed + i`."""
        return one_by_one.generate(self, prompts, sampling, on_done)

    def at_once(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Generation]:
        """One answer of `new_tokens` tokens to each prompt, in one batch; see `slmops.core.engine.AtOnce`."""
        return at_once.generate(self, prompts, new_tokens)

    def start(self, length: int) -> None:
        """An empty context; it grows by itself."""
        self.start_rows(1, length)

    def start_rows(self, rows: int, length: int) -> None:
        """Empty contexts; they become as many as the first ids have rows, and grow by themselves."""
        self._cache = self._make_cache(self._model)

    def feed(self, ids: Sequence[int], at: int) -> NDArray[np.float32]:
        """Put ids into the context; the logits after the last of them, (vocabulary,)."""
        row: NDArray[np.float32] = self.feed_rows([ids], at)[0]
        return row

    def feed_rows(self, ids: Sequence[Sequence[int]], at: int) -> NDArray[np.float32]:
        """Put ids (rows, tokens) into the contexts; the logits after the last of each row, (rows, vocabulary)."""
        mx = self._mx
        given = mx.array([list(row) for row in ids])
        last, size = given.shape[1] - 1, max(1, CHUNK // len(ids))
        for begin in range(0, last, size):  # values of these positions are not asked for, and so not computed
            self._model(given[:, begin : min(begin + size, last)], cache=self._cache)
            mx.eval([cache.state for cache in self._cache])
        return self._rows(self._model(given[:, last:], cache=self._cache)[:, -1])

    def logits(self, ids: Sequence[int], start: int = 0) -> NDArray[np.float32]:
        """Teacher-forced logits, float32 (len(ids) - start, vocabulary): the rows from position `start` on."""
        if not 0 < len(ids) <= self.context_length:
            raise no_room(0, len(ids), self.context_length)
        return self._rows(self._model(self._mx.array([list(ids)]))[0, start:])

    def _rows(self, logits: Any) -> NDArray[np.float32]:
        import numpy as np

        try:
            return np.array(logits.astype(self._mx.float32))
        except Exception as error:
            raise ModelError(f"MLX failed: {error}", "shorten the prompt, or convert the model again") from error

    def close(self) -> None:
        """Drop the model, and give back what MLX keeps for later use."""
        self._model = self._cache = None
        self._mx.clear_cache()
