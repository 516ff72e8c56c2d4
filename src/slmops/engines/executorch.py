"""ExecuTorch: the engine for a folder with `model.pte`, on the processor, with the tokenizer and chat template of the folder.

Answers come one prompt after the other. Keys and values are a state of the program, as long as `convert.executorch` made it, so a new
token costs one position. A program gives the logits of the last token that it is fed: those of a text come token by token.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops.core.engine import Generation, Sampling
from slmops.engines import no_room, one_by_one, read_json
from slmops.engines.plain_tokenizer import PlainTokenizer, end_ids
from slmops.errors import MissingExtraError, ModelError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FILE = "model.pte"


def library() -> Any:
    """The runtime, with its operations for language models and for rounded tables.

    Its own door, `portable_lib`, brings everything that writes programs too: seconds and hundreds of megabytes.
    """
    try:
        import executorch.extension
        import torch
        from executorch.extension.pybindings import _C
    except ImportError as error:
        raise MissingExtraError("ExecuTorch", "executorch") from error
    load: Any = torch.ops.load_library
    root = Path(executorch.extension.__path__[0]).parent
    for pattern in ("extension/llm/custom_ops/*custom_ops_aot_lib.*", "kernels/quantized/*quantized_ops_aot_lib.*"):
        for file in root.glob(pattern):
            load(file)
    return _C


@contextmanager
def _silent() -> Iterator[None]:
    """Without what native code writes to the standard error."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


class ExecutorchEngine:
    """A folder with `model.pte`. See `slmops.core.engine.Engine`. Not safe for use by two threads at once."""

    name = "executorch"

    def __init__(self, folder: Path, *, threads: int = 1) -> None:
        runtime = library()
        import torch

        self._torch = torch
        config = read_json(folder / "config.json")
        self._tokenizer = PlainTokenizer(folder, "executorch")
        try:
            with _silent():  # it says that this is no phone
                if runtime._threadpool_get_thread_count() != threads:  # one pool for all programs of a process
                    runtime._unsafe_reset_threadpool(threads)
            self._program: Any = runtime._load_for_executorch(str(folder / FILE))
            self.context_length = int(self._program.run_method("get_max_context_len", [])[0])
            self.feed([0], 0)
        except Exception as error:
            said = str(error).strip().splitlines()[-1:] or [type(error).__name__]
            raise ModelError(f"{folder} cannot be loaded: {said[0]}", "convert the model again") from error
        self.end_ids = end_ids(folder, config, self._tokenizer.id_of(self._tokenizer.marks.get("eos_token", "")))

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

    def start(self, length: int) -> None:
        """An empty context: what is before the first position counts for nothing."""

    def feed(self, ids: Sequence[int], at: int) -> NDArray[np.float32]:
        """Put ids into the context from position `at`; the logits after the last of them, (vocabulary,)."""
        given = (self._torch.tensor([list(ids)]), self._torch.tensor([at]))
        try:
            found = self._program.run_method("forward", given)
        except Exception as error:
            raise ModelError(f"ExecuTorch failed: {error}", "shorten the prompt, or convert the model again") from error
        row: NDArray[np.float32] = found[0][0].numpy()
        return row

    def logits(self, ids: Sequence[int], start: int = 0) -> NDArray[np.float32]:
        """Teacher-forced logits, float32 (len(ids) - start, vocabulary): the rows from position `start` on."""
        import numpy as np

        if not 0 < len(ids) <= self.context_length:
            raise no_room(0, len(ids), self.context_length)
        rows = [self.feed(ids[: start + 1], 0)]
        rows += [self.feed(ids[at : at + 1], at) for at in range(start + 1, len(ids))]
        return np.stack(rows).astype(np.float32)

    def close(self) -> None:
        """Drop the program."""
        self._program = None
