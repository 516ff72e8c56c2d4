"""llama.cpp: the engine for a folder with a GGUF file, with the tokenizer and chat template that the file holds.

Answers come one prompt after the other, or at once, in sequences with a context each, which llama.cpp advises where they share no long
beginning. The context grows by powers of two up to the model's. A file of float32 is computed
in float32: keys and values too, and without flash attention, which takes float16 on the way. Any other file is run as the
runtime does by default. `kv_cache` says otherwise: keys and values in that type, in 8 or 4 bits with flash attention, without which
llama.cpp does not quantise values. `use` switches between the adapters that `convert.gguf_lora` wrote while the base stays loaded.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops.core.engine import Generation, KvCache, Sampling
from slmops.engines import at_once, find_gguf, no_room, one_by_one
from slmops.engines.adapters import adapter_file
from slmops.engines.gguf_file import GgufFile, cache_type, complaint
from slmops.engines.plain_tokenizer import compile_template, render
from slmops.errors import ModelError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

KV_BLOCK = 32
"""Numbers that share a scale in a quantised cache."""
CHUNK = 512
"""Tokens that go through the model at once."""
SMALLEST = 256


class LlamaCppEngine:
    """A folder with a GGUF file. See `slmops.core.engine.Engine`. Not safe for use by two threads at once."""

    name = "llama_cpp"

    def __init__(
        self, folder: Path, *, threads: int = 1, adapter: str | None = None, kv_cache: KvCache | None = None
    ) -> None:
        if adapter is not None:
            adapter_file(folder, adapter)  # before the model is loaded
        self._file = GgufFile(find_gguf(folder) or folder / "model.gguf")
        import numpy

        self._lib: Any = self._file.lib
        self._np, self._threads, self._folder, self._kv_cache = numpy, threads, folder, kv_cache
        self._model: Any = self._file.model
        self._size = self._file.size
        self._context: Any = None
        self._batch: Any = None
        self._length, self._rows = 0, 1
        self._active: str | None = None
        self._adapters: dict[str, Any] = {}
        self.context_length, self.end_ids = self._file.context_length, self._file.end_ids
        self._check_cache(self._file.kind)
        self._template, self._marks = compile_template(self._file.template, folder), self._file.marks
        self._batch = self._lib.llama_batch_init(CHUNK, 0, 1)
        self.use(adapter)

    def _check_cache(self, kind: str) -> None:
        """Refuse a cache in blocks that do not fit the heads: llama.cpp says so only when the first prompt comes."""
        if self._kv_cache in (None, "f32", "f16"):
            return
        heads = int(self._file.about(f"{kind}.attention.head_count") or 1)
        whole = int(self._file.about(f"{kind}.embedding_length") or 0) // heads
        sizes = {int(self._file.about(f"{kind}.attention.{part}_length") or whole) for part in ("key", "value")}
        odd = next((size for size in sizes if size % KV_BLOCK), None)
        if odd is not None:
            raise ModelError(
                f"{self._folder}: heads of size {odd} do not fit a cache in {self._kv_cache}, which has blocks of {KV_BLOCK}",
                "use f16",
            )

    def token_texts(self) -> list[str]:
        """What each token id stands for, as the file spells it."""
        return [self._file.spelling(i) for i in range(self._size)]

    def use(self, adapter: str | None) -> None:
        """Answer with this adapter from now on; None: with the base alone.

        Raises:
            ModelError: the folder has no such adapter, or the runtime cannot load it.
        """
        if adapter is not None and adapter not in self._adapters:
            file = adapter_file(self._folder, adapter)
            loaded = self._lib.llama_adapter_lora_init(self._model, str(file).encode())
            if not loaded:
                raise ModelError(f"{file} cannot be loaded: {complaint()}", "convert the model again")
            self._adapters[adapter] = loaded
        self._active = adapter
        self._apply()

    def _apply(self) -> None:
        """Set the adapter in the context, if there is one yet."""
        if self._context is None:
            return
        active = [] if self._active is None else [self._adapters[self._active]]
        handles = (self._lib.llama_adapter_lora_p_ctypes * 1)(*active)
        scales = (ctypes.c_float * 1)(1.0)
        if self._lib.llama_set_adapters_lora(self._context, handles, len(active), scales):
            raise ModelError(f"adapter {self._active} cannot be switched on: {complaint()}", "convert the model again")

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, marks such as `<|end|>` included; nothing is put before it."""
        return self._file.tokenize(text)

    def encode(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of the rendered prompt, ready for the answer."""
        if self._template is None:
            raise ModelError(f"{self._folder} has no chat template", "convert a model that has one")
        return self.tokenize(render(self._template, messages, self._marks))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids without special tokens."""
        return self._file.pieces(ids).decode("utf-8", "replace")

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, on_done: Callable[[int], None] | None = None
    ) -> list[Generation]:
        """One answer per prompt, one prompt after the other. With sampling, prompt i is seeded with `seed + i`."""
        return one_by_one.generate(self, prompts, sampling, on_done)

    def at_once(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Generation]:
        """One answer of `new_tokens` tokens to each prompt, a sequence of its own; see `slmops.core.engine.AtOnce`."""
        return at_once.generate(self, prompts, new_tokens)

    def start(self, length: int) -> None:
        """An empty context with room for `length` tokens."""
        self.start_rows(1, length)

    def start_rows(self, rows: int, length: int) -> None:
        """Empty contexts for `rows` sequences, each with room for `length` tokens."""
        lib = self._lib
        if self._context is None or length > self._length or rows != self._rows:
            if self._context is not None:
                lib.llama_free(self._context)
            self._length, self._rows = min(self.context_length, max(SMALLEST, 1 << (length - 1).bit_length())), rows
            params = lib.llama_context_default_params()
            params.n_ctx, params.n_seq_max, params.n_batch, params.n_ubatch = rows * self._length, rows, CHUNK, CHUNK
            params.n_threads = params.n_threads_batch = self._threads
            params.no_perf = True
            if self._kv_cache is not None or self._file.full:
                cache_type(lib, params, self._kv_cache or "f32")
            self._context = lib.llama_init_from_model(self._model, params)
            if not self._context:
                self._context = None
                raise ModelError(f"{self._folder} cannot be run: {complaint()}", "ask for a shorter context")
            self._apply()
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)

    def feed(self, ids: Sequence[int], at: int) -> NDArray[np.float32]:
        """Put ids into the context from position `at`; the logits after the last of them, (vocabulary,)."""
        row: NDArray[np.float32] = self._feed(ids, at, 1)[-1]
        return row

    def feed_rows(self, ids: Sequence[Sequence[int]], at: int) -> NDArray[np.float32]:
        """Put ids (rows, tokens) into the contexts from position `at`; the logits after the last of each row, (rows, vocabulary)."""
        last, size, batch = len(ids[0]) - 1, max(1, CHUNK // len(ids)), self._batch
        for start in range(0, last + 1, size):
            steps = range(start, min(start + size, last + 1))
            batch.n_tokens = len(ids) * len(steps)
            places = ((row, step) for row in range(len(ids)) for step in steps)
            for i, (row, step) in enumerate(places):
                batch.token[i], batch.pos[i] = ids[row][step], at + step
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
                batch.logits[i] = step == last
            self._decode(batch)
        ends = range(len(steps) - 1, batch.n_tokens, len(steps))
        found: NDArray[np.float32] = self._np.stack([self._row(i) for i in ends])
        return found

    def _decode(self, batch: Any) -> None:
        if self._lib.llama_decode(self._context, batch):
            raise ModelError(f"llama.cpp failed: {complaint()}", "shorten the prompt, or convert the model again")

    def _row(self, i: int) -> NDArray[np.float32]:
        """Logits (vocabulary,) of place `i` of the batch that has just run; they are valid until the next."""
        row: NDArray[np.float32] = self._np.ctypeslib.as_array(
            self._lib.llama_get_logits_ith(self._context, i), (self._size,)
        )
        return row

    def _feed(self, ids: Sequence[int], at: int, rows: int) -> NDArray[np.float32]:
        """Put ids into the context from position `at`; the logits of the last `rows` of them, (rows, vocabulary)."""
        found = []
        for start in range(0, len(ids), CHUNK):
            part = ids[start : start + CHUNK]
            batch = self._batch
            batch.n_tokens = len(part)
            for i, token in enumerate(part):
                batch.token[i], batch.pos[i] = token, at + start + i
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                batch.logits[i] = start + i >= len(ids) - rows
            self._decode(batch)
            found += [self._row(i).copy() for i in range(len(part)) if batch.logits[i]]
        stacked: NDArray[np.float32] = self._np.stack(found)
        return stacked

    def logits(self, ids: Sequence[int], start: int = 0) -> NDArray[np.float32]:
        """Teacher-forced logits, float32 (len(ids) - start, vocabulary): the rows from position `start` on."""
        if not 0 < len(ids) <= self.context_length:
            raise no_room(0, len(ids), self.context_length)
        self.start(len(ids))
        return self._feed(ids, 0, len(ids) - start)

    def close(self) -> None:
        """Free the context, the adapters and the model."""
        lib = self._lib
        if self._context is not None:
            lib.llama_free(self._context)
        for adapter in self._adapters.values():
            lib.llama_adapter_lora_free(adapter)
        if self._batch is not None:
            lib.llama_batch_free(self._batch)
        self._file.close()
        self._context = self._batch = self._model = None
        self._adapters = {}
