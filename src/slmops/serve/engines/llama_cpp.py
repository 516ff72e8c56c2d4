"""Continuous batching in llama.cpp, over a GGUF file.

Each row is a sequence with keys and values of its own (no unified cache), so that a row costs what it holds, whatever the others
hold. All answers get their next token in one `llama_decode`. The runtime computes sequences together only where their numbers follow
one another: rows that are idle below the last busy one get a token that is taken back, as long as the model can take one back.
The runtime writes its whole cache when it makes it. So that begins small, and grows with the longest row: keys and values are
then carried over.

Law: with quantised weights a row's logits are the same bits beside any others as alone (held by a property test), with one thread or while
a row holds less than 512 tokens: from there on the runtime shares a single row's attention out among threads, and several rows' not.
With weights of float32 or float16 it sums in another order for more rows. Where bits differ, they are the last ones, and, rarely, a token.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops.engines import find_gguf
from slmops.engines.gguf_file import GgufFile, cache_type, complaint
from slmops.errors import ModelError
from slmops.serve.scheduler import CHUNK, RequestError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SMALLEST = 512
"""Tokens of each row that there is room for at first."""
PADDING = 256
"""The runtime rounds a row's room up to a multiple of this."""
EMBED = 64
"""Tokens that are read at once for an embedding: the runtime computes logits for each of them, which take room."""


class LlamaCppRows:
    """A GGUF file. See `slmops.serve.engines.Rows`. Not safe for use by two threads at once.

    Args:
        model: the file, or its folder.
        rows: answers at a time.
        context: tokens that a row holds at most, prompt and answer; None: as many as the model can.
        threads: CPU threads.
        adapters: GGUF files of low-rank adapters, by name.

    Raises:
        MissingExtraError: llama.cpp is not installed.
        ModelError: the model or an adapter cannot be loaded, or it is no decoder.
    """

    def __init__(
        self, model: Path, *, rows: int, context: int | None = None, threads: int = 1,
        adapters: Mapping[str, Path] | None = None,
    ) -> None:  # fmt: skip
        file = model if model.is_file() else find_gguf(model) or model / "model.gguf"
        self._file = GgufFile(file)
        import numpy as np

        self._np, self._lib, self._threads = np, self._file.lib, threads
        lib = self._lib
        self._adapters: dict[str, Any] = {}
        self._context: Any = None
        self._embedder: Any = None
        self._embeds = 0
        if lib.llama_model_has_encoder(self._file.model) or not lib.llama_model_has_decoder(self._file.model):
            self.close()
            raise ModelError(f"{file} is no decoder", "serve a model that writes text")
        self.rows, self.vocabulary, self.end_ids = rows, self._file.size, self._file.end_ids
        self.context_length = min(context or self._file.context_length, self._file.context_length)
        state = lib.llama_model_is_recurrent(self._file.model) or lib.llama_model_is_hybrid(self._file.model)
        self.packed = not state
        self.adapters = frozenset(adapters or ())
        for name, path in (adapters or {}).items():
            self._adapters[name] = lib.llama_adapter_lora_init(self._file.model, str(path).encode())
            if not self._adapters[name]:
                del self._adapters[name]
                self.close()
                raise ModelError(
                    f"{path} cannot be loaded: {complaint()}", "give the GGUF file of an adapter of this base"
                )
        self._lengths = [0] * rows
        self._worn: list[str | None] = [None] * rows
        self._active: dict[int, str | None] = {}
        self._batch = _Batch(lib, np, max(CHUNK, rows))
        self._room = self._padded(min(SMALLEST, self.context_length + 1))
        self._context = self._new(self._room, rows)

    @property
    def cache_bytes(self) -> int:
        """Keys and values of all rows when they are full."""
        lib, model, about = self._lib, self._file.model, self._file.about
        heads, kind = lib.llama_model_n_head(model), self._file.kind
        whole = lib.llama_model_n_embd(model) // max(1, heads)
        width = sum(int(about(f"{kind}.attention.{part}_length") or whole) for part in ("key", "value"))
        each = lib.llama_model_n_layer(model) * lib.llama_model_n_head_kv(model) * width * (4 if self._file.full else 2)
        return int(self.rows * self._padded(self.context_length + 1) * each)

    def length(self, row: int) -> int:
        """See `Rows`."""
        return self._lengths[row]

    def cut(self, row: int, length: int) -> None:
        """See `Rows`."""
        if not 0 <= length <= self._lengths[row]:
            raise ValueError(f"row {row} holds {self._lengths[row]} tokens, not {length}")
        if length == self._lengths[row]:
            return
        memory = self._lib.llama_get_memory(self._context)
        if not self._lib.llama_memory_seq_rm(memory, row, length, -1):
            self._lib.llama_memory_seq_rm(memory, row, -1, -1)
            length = 0
        self._lengths[row] = length

    def wear(self, row: int, adapter: str | None) -> None:
        """See `Rows`."""
        self._worn[row] = adapter

    def feed(self, row: int, ids: Sequence[int]) -> NDArray[np.float32]:
        """See `Rows`."""
        begin = self._lengths[row]
        if not ids or begin + len(ids) > self.context_length:
            raise ValueError(f"{len(ids)} tokens do not fit into row {row}, which holds {begin}")
        self._make_room(begin + len(ids))
        self._switch(self._context, self._worn[row])
        for start in range(0, len(ids), CHUNK):
            part = ids[start : start + CHUNK]
            last = start + len(part) == len(ids)
            self._batch.one(row, part, begin + start, last)
            self._run(self._context)
            self._lengths[row] += len(part)
        found: NDArray[np.float32] = self._logits(1)[0].copy()
        return found

    def decode(self, tokens: Mapping[int, int]) -> dict[int, NDArray[np.float32]]:
        """See `Rows`."""
        for row in tokens:
            if self._lengths[row] >= self.context_length:
                raise ValueError(f"row {row} is full")
        self._make_room(max(self._lengths[: max(tokens) + 1]) + 1)
        groups: dict[str | None, dict[int, int]] = {}
        for row in sorted(tokens):
            groups.setdefault(self._worn[row], {})[row] = tokens[row]
        found: dict[int, NDArray[np.float32]] = {}
        for adapter, group in groups.items():
            self._switch(self._context, adapter)
            first, last = min(group), max(group)
            taken = range(first, last + 1) if self.packed else sorted(group)
            self._batch.several(taken, group, self._lengths)
            self._run(self._context)
            logits = self._logits(len(group))
            found |= zip(sorted(group), logits if len(groups) == 1 else logits.copy(), strict=True)
            for row in taken:
                if row in group:
                    self._lengths[row] += 1
                else:
                    memory = self._lib.llama_get_memory(self._context)
                    self._lib.llama_memory_seq_rm(memory, row, self._lengths[row], -1)
        return found

    def move(self, source: int, target: int) -> None:
        """See `Rows`."""
        held, memory = self._state(source), self._lib.llama_get_memory(self._context)
        for row in (source, target):
            self._lib.llama_memory_seq_rm(memory, row, -1, -1)
        self._put(target, held)
        self._lengths[source], self._lengths[target] = 0, self._lengths[source]
        self._worn[source], self._worn[target] = None, self._worn[source]

    def embed(self, ids: Sequence[int], adapter: str | None = None) -> Iterator[NDArray[np.float32] | None]:
        """See `Rows`."""
        lib, np = self._lib, self._np
        room = self._padded(len(ids))
        if self._embedder is None or self._embeds < room:
            if self._embedder is not None:
                lib.llama_free(self._embedder)
                self._active.pop(self._embedder, None)
            self._embedder, self._embeds = self._new(room, 1, embeds=True), room
        lib.llama_memory_clear(lib.llama_get_memory(self._embedder), False)
        width = int(lib.llama_model_n_embd_out(self._file.model))
        whole = np.zeros(width, np.float64)
        for start in range(0, len(ids), EMBED):
            part = ids[start : start + EMBED]
            self._switch(self._embedder, adapter)
            self._batch.one(0, part, start, None)
            self._run(self._embedder)
            held = lib.llama_get_embeddings(self._embedder)
            if not held:
                raise RequestError("this model gives no hidden states", "serve a model that does")
            whole += np.ctypeslib.as_array(held, (len(part), width)).sum(0, dtype=np.float64)
            if start + EMBED < len(ids):
                yield None
        yield (whole / max(float(np.linalg.norm(whole)), 1e-30)).astype(np.float32)

    def use_threads(self, threads: int) -> None:
        """See `Rows`."""
        self._threads = threads
        for context in (self._context, self._embedder):
            if context is not None:
                self._lib.llama_set_n_threads(context, threads, threads)

    def close(self) -> None:
        """See `Rows`."""
        for context in (self._context, self._embedder):
            if context is not None:
                self._lib.llama_free(context)
        for adapter in self._adapters.values():
            self._lib.llama_adapter_lora_free(adapter)
        self._context = self._embedder = None
        self._adapters = {}
        self._file.close()

    def _padded(self, tokens: int) -> int:
        return -(-tokens // PADDING) * PADDING

    def _new(self, room: int, rows: int, embeds: bool = False) -> Any:
        lib = self._lib
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max = room * rows, rows
        params.n_batch = params.n_ubatch = EMBED if embeds else max(CHUNK, rows)
        params.n_outputs_max = EMBED if embeds else rows
        params.n_threads = params.n_threads_batch = self._threads
        params.kv_unified, params.no_perf, params.embeddings = False, True, embeds
        if embeds:
            params.pooling_type = lib.LLAMA_POOLING_TYPE_NONE
        if self._file.full:
            cache_type(lib, params, "f32")
        context = lib.llama_init_from_model(self._file.model, params)
        if not context:
            raise ModelError(f"the model cannot be run: {complaint()}", "ask for fewer rows or a shorter context")
        if lib.llama_get_memory(context) is None:
            lib.llama_free(context)
            raise ModelError("the model has no keys and values: it is no decoder", "serve a model that writes text")
        self._active[context] = None
        return context

    def _make_room(self, tokens: int) -> None:
        """Another context with longer rows, with what the rows hold, where one has no room for so many tokens."""
        if tokens <= self._room:
            return
        lib = self._lib
        room = min(max(self._padded(tokens), 2 * self._room), self._padded(self.context_length + 1))
        kept = {row: self._state(row) for row, length in enumerate(self._lengths) if length}
        lib.llama_free(self._context)
        self._context = None
        self._context, self._room = self._new(room, self.rows), room
        for row, held in kept.items():
            self._put(row, held)

    def _state(self, row: int) -> Any:
        """What a row holds, as the runtime writes it."""
        data = (ctypes.c_uint8 * self._lib.llama_state_seq_get_size(self._context, row))()
        self._lib.llama_state_seq_get_data(self._context, data, len(data), row)
        return data

    def _put(self, row: int, held: Any) -> None:
        if not self._lib.llama_state_seq_set_data(self._context, held, len(held), row):
            raise ModelError(f"keys and values cannot be carried over: {complaint()}", "serve with --context")

    def _switch(self, context: Any, adapter: str | None) -> None:
        """Compute with this adapter from now on."""
        if self._active.get(context) == adapter:
            return
        lib = self._lib
        handles = (lib.llama_adapter_lora_p_ctypes * 1)(*([] if adapter is None else [self._adapters[adapter]]))
        if lib.llama_set_adapters_lora(context, handles, 0 if adapter is None else 1, (ctypes.c_float * 1)(1.0)):
            raise ModelError(f"adapter {adapter} cannot be switched on: {complaint()}", "convert it again")
        self._active[context] = adapter

    def _run(self, context: Any) -> None:
        if self._lib.llama_decode(context, self._batch.struct):
            raise ModelError(
                f"llama.cpp failed: {complaint()}", "convert the model again, or serve with a shorter context"
            )

    def _logits(self, count: int) -> NDArray[np.float32]:
        """Logits (count, vocabulary) of the batch that has just run; they are valid until the next."""
        found: NDArray[np.float32] = self._np.ctypeslib.as_array(
            self._lib.llama_get_logits(self._context), (count, self.vocabulary)
        )
        return found


class _Batch:
    """The runtime's batch over arrays of our own, which are written as a whole."""

    def __init__(self, lib: Any, np: Any, room: int) -> None:
        self._token, self._pos, self._count, self._row = (np.zeros(room, np.int32) for _ in range(4))
        self._wanted = np.zeros(room, np.int8)
        self._count[:] = 1
        start = self._row.ctypes.data
        kind = ctypes.POINTER(ctypes.c_int32)
        places = [ctypes.cast(start + 4 * i, kind) for i in range(room)]
        self._rows = (kind * room)(*places)
        self.struct = lib.llama_batch()
        self.struct.token = self._token.ctypes.data_as(kind)
        self.struct.embd = None
        self.struct.pos = self._pos.ctypes.data_as(kind)
        self.struct.n_seq_id = self._count.ctypes.data_as(kind)
        self.struct.seq_id = ctypes.cast(self._rows, ctypes.POINTER(kind))
        self.struct.logits = self._wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))
        self._np = np

    def one(self, row: int, ids: Sequence[int], at: int, last: bool | None) -> None:
        """Tokens of one row from a position on. `last`: whether the result after the last of them is wanted; None: after each."""
        count = len(ids)
        self._token[:count] = ids
        self._pos[:count] = self._np.arange(at, at + count)
        self._row[:count] = row
        self._wanted[:count] = last is None
        if last:
            self._wanted[count - 1] = 1
        self.struct.n_tokens = count

    def several(self, rows: Sequence[int], tokens: Mapping[int, int], lengths: Sequence[int]) -> None:
        """A token for each of these rows, with a result where `tokens` has one."""
        count = len(rows)
        self._row[:count] = rows
        for i, row in enumerate(rows):
            self._token[i], self._pos[i], self._wanted[i] = tokens.get(row, 0), lengths[row], row in tokens
        self.struct.n_tokens = count
