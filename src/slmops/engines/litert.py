"""LiteRT: the engine for a folder with `model.tflite`, on the processor, with the tokenizer and chat template of the folder.

The file has a signature `decode` for one token and some `prefill_LENGTH` for many (`slmops.convert.litert_tool`). Answers come one
prompt after the other; keys and values lie in buffers of the whole context that each call reads and writes, so a new token costs
one position and none is copied.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops.core.engine import Generation, Sampling
from slmops.engines import no_room, one_by_one, read_json
from slmops.engines.plain_tokenizer import PlainTokenizer, end_ids
from slmops.errors import MissingExtraError, ModelError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FILE = "model.tflite"
HIDDEN = -1e9
"""Added to scores of keys that a token does not see. Keys outside of a layer's window have -10,000 added in the model."""


SILENCE = threading.Lock()


def libraries() -> Any:
    """numpy, where LiteRT is installed too.

    Raises:
        MissingExtraError: it is not.
    """
    try:
        import ai_edge_litert.compiled_model  # noqa: F401
        import numpy
    except ImportError as error:
        raise MissingExtraError("LiteRT", "litert") from error
    _at_the_end()
    return numpy


@functools.cache
def _at_the_end() -> None:
    """At the end of a process LiteRT tells what it takes down."""
    atexit.register(_silence)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what LiteRT says of accelerators, which no setting of its own turns off, from standard error."""
    with SILENCE:
        kept = os.dup(2)
        try:
            _silence()
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _silence() -> None:
    """Standard error to nowhere."""
    sys.stderr.flush()
    place = os.open(os.devnull, os.O_WRONLY)
    os.dup2(place, 2)
    os.close(place)


def signature(length: int) -> str:
    """The name of the signature for so many tokens."""
    return "decode" if length == 1 else f"prefill_{length}"


class LiteRtEngine:
    """A folder with `model.tflite`. See `slmops.core.engine.Engine`. Not safe for use by two threads at once."""

    name = "litert"

    def __init__(self, folder: Path, *, threads: int = 1) -> None:
        np = libraries()
        config = read_json(folder / "config.json")
        self._np = np
        self._tokenizer = PlainTokenizer(folder, "litert")
        try:
            with quiet():
                self._open(folder / FILE, threads)
        except Exception as error:
            said = str(error).strip().splitlines()[-1:] or [type(error).__name__]
            raise ModelError(f"{folder} cannot be loaded: {said[0]}", "convert the model again") from error
        self.end_ids = end_ids(folder, config, self._tokenizer.id_of(self._tokenizer.marks.get("eos_token", "")))

    def _open(self, file: Path, threads: int) -> None:
        """Load the model, make its buffers, and run it once, so that a file that does not run is told of here."""
        from ai_edge_litert.compiled_model import CompiledModel
        from ai_edge_litert.hardware_accelerator import HardwareAccelerator
        from ai_edge_litert.options import CpuOptions, Options

        options = Options(hardware_accelerators=HardwareAccelerator.CPU, cpu_options=CpuOptions(num_threads=threads))
        self._model: Any = CompiledModel.from_file(str(file), options=options)
        signatures = self._model.get_signature_list()
        self.context_length = int(self._model.get_input_tensor_details("decode")["mask"]["shape"][-1])
        self._vocabulary = int(self._model.get_output_tensor_details("decode")["logits"]["shape"][-1])
        self._at = self._np.arange(self.context_length)
        lengths = sorted(int(name.removeprefix("prefill_")) for name in signatures if name.startswith("prefill_"))
        self._lengths = [1, *lengths]
        self._given = {length: self._buffers(length) for length in self._lengths}
        kept = [name for name in signatures["decode"]["inputs"] if name.startswith("kv_cache_")]
        self._cache = {name: self._model.create_input_buffer_by_name("decode", name) for name in kept}
        self._logits: Any = self._model.create_output_buffer_by_name("decode", "logits")
        for name in kept:
            shape = self._model.get_input_tensor_details("decode")[name]["shape"]
            self._cache[name].write(self._np.zeros(shape, self._np.float32))
        self._run([0], 0, 1)

    def _buffers(self, length: int) -> dict[str, Any]:
        name = signature(length)
        return {
            given: self._model.create_input_buffer_by_name(name, given) for given in ("tokens", "input_pos", "mask")
        }

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
        """An empty context: what an answer before has left is masked."""

    def feed(self, ids: Sequence[int], at: int) -> NDArray[np.float32]:
        """Put ids into the context from position `at`; the logits after the last of them, (vocabulary,)."""
        done = 0
        while done < len(ids) - 1:
            length = self._part(len(ids) - 1 - done, at + done)
            part = ids[done : min(done + length, len(ids) - 1)]
            self._run(part, at + done, length)
            done += len(part)
        self._run(ids[-1:], at + done, 1)
        found: NDArray[np.float32] = self._logits.read(self._vocabulary, self._np.float32)
        return found

    def _part(self, left: int, at: int) -> int:
        """The signature for the next tokens: the longest that is full, else the shortest that holds the rest. None goes beyond
        the end of the context, where its rows would be moved to."""
        fits = [length for length in self._lengths if at + length <= self.context_length]
        full = [length for length in fits if length <= left]
        rest = [length for length in fits if length > left]
        return rest[0] if rest and full[-1] * 2 <= left else full[-1]

    def _run(self, ids: Sequence[int], at: int, length: int) -> None:
        np, given = self._np, self._given[length]
        tokens = np.zeros((1, length), np.int32)
        tokens[0, : len(ids)] = ids
        positions = np.arange(at, at + length, dtype=np.int32)
        mask = np.where(self._at[None] > positions[:, None], np.float32(HIDDEN), np.float32(0.0))
        given["tokens"].write(tokens)
        given["input_pos"].write(positions)
        given["mask"].write(mask)
        kept = self._cache | ({"logits": self._logits} if length == 1 else {})
        try:
            self._model.run_by_name(signature(length), given | self._cache, kept)
        except Exception as error:
            raise ModelError(f"LiteRT failed: {error}", "shorten the prompt, or convert the model again") from error

    def logits(self, ids: Sequence[int], start: int = 0) -> NDArray[np.float32]:
        """Teacher-forced logits, float32 (len(ids) - start, vocabulary): the rows from position `start` on, one call for each."""
        if not 0 < len(ids) <= self.context_length:
            raise no_room(0, len(ids), self.context_length)
        rows = [self.feed(ids[: start + 1], 0)]
        rows += [self.feed(ids[at : at + 1], at) for at in range(start + 1, len(ids))]
        found: NDArray[np.float32] = self._np.stack(rows)
        return found

    def close(self) -> None:
        """Drop the model."""
        with quiet():
            self._given, self._cache, self._logits, self._model = {}, {}, None, None
