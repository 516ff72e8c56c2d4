"""Continuous batching in plain ONNX Runtime, over the folder that ONNX Runtime GenAI runs.

The graph's attention (`GroupQueryAttention`) takes the length of each row from the sum of that row of the attention mask, and
writes new keys and values in place where past and present are one buffer. So each layer has one buffer (rows, heads, context,
width) that is bound once: a prompt goes through the part of its row alone, without a copy, and all answers go on together, a
token each, whatever their lengths. Rows that are idle below the last busy one are computed too, after what they hold, and thrown away.

Law: a row's logits are the same bits beside any others as alone (held by a property test).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops.engines import read_json
from slmops.errors import MissingExtraError, ModelError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BUCKET = 64
"""The mask is as wide as the longest row, rounded up to a multiple of this: few bindings, little to sum."""
TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16"}


class OnnxRows:
    """A folder in ONNX Runtime GenAI's form. See `slmops.serve.engines.Rows`. Not safe for use by two threads at once.

    Args:
        rows: answers at a time.
        context: tokens that a row holds at most, prompt and answer; None: as many as the model can.
        threads: CPU threads.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        ModelError: the folder cannot be loaded, or its graph has no such cache.
    """

    def __init__(self, folder: Path, *, rows: int, context: int | None = None, threads: int = 1) -> None:
        try:
            import numpy as np
            import onnxruntime
        except ImportError as error:
            raise MissingExtraError("ONNX Runtime", "runtime") from error
        settings = read_json(folder / "genai_config.json").get("model", {})
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.enable_mem_pattern = False
        try:
            decoder = settings["decoder"]
            self._session: Any = onnxruntime.InferenceSession(
                str(folder / decoder["filename"]), options, providers=["CPUExecutionProvider"]
            )
            ends = settings["eos_token_id"]
            self.end_ids = frozenset(ends if isinstance(ends, list) else [ends])
            whole = int(settings["context_length"])
        except Exception as error:
            raise ModelError(f"{folder} cannot be loaded: {error}", "convert the model again") from error
        self.rows, self.context_length = rows, min(context or whole, whole)
        self._np, self.folder = np, folder
        self._lengths = [0] * rows
        self._bindings: dict[tuple[int, int], Any] = {}
        given = {one.name: one for one in self._session.get_inputs()}
        made = {one.name: one for one in self._session.get_outputs()}
        logits = made["logits"]
        self.vocabulary = int(logits.shape[-1])
        self._ids = np.zeros(max(rows, self.context_length), np.int64)
        wide = self._wide(self.context_length)
        self._mask = np.zeros(rows * wide, np.int64)
        self._logits = np.zeros((rows, self.vocabulary), TYPES[logits.type])
        self._last_only = logits.shape[1] == 1  # else the graph gives the logits of all tokens
        self._caches: dict[str, tuple[str, NDArray[Any]]] = {}
        for name, one in given.items():
            if name.startswith("past_key_values."):
                present = name.replace("past_key_values", "present", 1)
                if present not in made or one.type not in TYPES:
                    raise ModelError(f"{folder}: its graph has no {present} like {name}", "convert the model again")
                shape = (rows, one.shape[1], self.context_length, decoder["head_size"])
                self._caches[name] = (present, np.zeros(shape, TYPES[one.type]))
        if set(given) - set(self._caches) != {"input_ids", "attention_mask"}:
            odd = ", ".join(sorted(set(given) - set(self._caches) - {"input_ids", "attention_mask"}))
            raise ModelError(f"{folder}: its graph takes {odd or 'no attention_mask'}", "convert it with slmops")

    @property
    def cache_bytes(self) -> int:
        """Keys and values of all rows when they are full. What no row has used is not resident."""
        return sum(array.nbytes for _, array in self._caches.values())

    def length(self, row: int) -> int:
        """See `Rows`."""
        return self._lengths[row]

    def cut(self, row: int, length: int) -> None:
        """See `Rows`."""
        if not 0 <= length <= self._lengths[row]:
            raise ValueError(f"row {row} holds {self._lengths[row]} tokens, not {length}")
        self._lengths[row] = length

    def feed(self, row: int, ids: Sequence[int]) -> NDArray[np.float32]:
        """See `Rows`."""
        begin = self._lengths[row]
        total = begin + len(ids)
        if not ids or total > self.context_length:
            raise ValueError(f"{len(ids)} tokens do not fit into row {row}, which holds {begin}")
        self._ids[: len(ids)] = ids
        # the mask is exactly as wide as the tokens: so the runtime knows that they begin an empty row, or go on in one
        self._mask[:total] = 0
        self._mask[0] = total
        kept = 1 if self._last_only else len(ids)
        logits = self._np.empty((kept, self.vocabulary), self._logits.dtype)
        self._pass(self._bind(row, 1, len(ids), total, logits))
        self._lengths[row] = total
        found: NDArray[np.float32] = logits[-1].astype(self._np.float32)
        return found

    def decode(self, tokens: Mapping[int, int]) -> dict[int, NDArray[np.float32]]:
        """See `Rows`."""
        count = max(tokens) + 1
        for row in tokens:
            if self._lengths[row] >= self.context_length:
                raise ValueError(f"row {row} is full")
        lengths = [min(length, self.context_length - 1) for length in self._lengths[:count]]
        wide = self._wide(max(lengths) + 1)
        mask = self._mask[: count * wide].reshape(count, wide)
        mask[:] = 0
        for row, length in enumerate(lengths):
            mask[row, 0] = length + 1
            self._ids[row] = tokens.get(row, 0)
        binding = self._bindings.get((count, wide))
        if binding is None:
            binding = self._bindings[count, wide] = self._bind(0, count, 1, wide, self._logits)
        self._pass(binding)
        for row, length in enumerate(lengths):
            # an idle row keeps what it held, less a last token that there was no room beside
            self._lengths[row] = length + 1 if row in tokens else length
        logits = self._logits.astype(self._np.float32, copy=False)
        return {row: logits[row] for row in tokens}

    def move(self, source: int, target: int) -> None:
        """See `Rows`."""
        length = self._lengths[source]
        for _, array in self._caches.values():
            array[target, :, :length] = array[source, :, :length]
        self._lengths[source], self._lengths[target] = 0, length

    def close(self) -> None:
        """See `Rows`."""
        self._bindings.clear()
        self._caches.clear()
        self._session = None

    def _wide(self, tokens: int) -> int:
        return min(-(-tokens // BUCKET) * BUCKET, max(self.context_length, 1))

    def _pass(self, binding: Any) -> None:
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise ModelError(f"the model failed: {error}", "convert it again") from error

    def _bind(self, row: int, count: int, new: int, wide: int, logits: NDArray[Any]) -> Any:
        """Everything of a pass over `count` rows from `row` on, with `new` tokens each, at its place in memory."""
        binding = self._session.io_binding()
        int64 = self._np.int64
        binding.bind_input("input_ids", "cpu", 0, int64, (count, new), self._ids.ctypes.data)
        binding.bind_input("attention_mask", "cpu", 0, int64, (count, wide), self._mask.ctypes.data)
        for name, (present, array) in self._caches.items():
            place = array.ctypes.data + row * array.strides[0]
            shape = (count, *array.shape[1:])
            binding.bind_input(name, "cpu", 0, array.dtype.type, shape, place)
            binding.bind_output(present, "cpu", 0, array.dtype.type, shape, place)
        shape = (count, 1 if self._last_only else new, self.vocabulary)
        binding.bind_output("logits", "cpu", 0, logits.dtype.type, shape, logits.ctypes.data)
        return binding
