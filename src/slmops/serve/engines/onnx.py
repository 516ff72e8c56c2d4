"""Continuous batching in plain ONNX Runtime, over the folder that ONNX Runtime GenAI runs.

The graph's attention (`GroupQueryAttention`) takes the length of each row from the sum of that row of the attention mask, and
writes new keys and values in place where past and present are one buffer. So each layer has one buffer (rows, heads, context,
width) that is bound once: a prompt goes through the part of its row alone, without a copy, and all answers go on together, a
token each, whatever their lengths. Rows that are idle below the last busy one are computed too, after what they hold, and thrown away.

An adapter is a set of inputs of the graph (see `slmops.convert.onnx_adapters`), which are bound to one adapter's numbers in each pass: rows
go together with those of their adapter. For hidden states the graph is loaded anew with one more output (`graph.py`).

Law: a row's logits are the same bits beside any others as alone (held by a property test).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops.engines import read_json
from slmops.errors import MissingExtraError, ModelError
from slmops.serve import pages
from slmops.serve.engines.graph import with_hidden_states
from slmops.serve.scheduler import CHUNK, RequestError

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
        adapters: the runtime's files of low-rank adapters, by name.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        ModelError: the folder or an adapter cannot be loaded, or its graph has no such cache, or no such adapters.
    """

    packed = True

    def __init__(
        self, folder: Path, *, rows: int, context: int | None = None, threads: int = 1,
        adapters: Mapping[str, Path] | None = None,
    ) -> None:  # fmt: skip
        try:
            import numpy as np
            import onnxruntime  # noqa: F401  (which `_open` needs)
        except ImportError as error:
            raise MissingExtraError("ONNX Runtime", "runtime") from error
        settings = read_json(folder / "genai_config.json").get("model", {})
        try:
            decoder = settings["decoder"]
            self._file = folder / decoder["filename"]
            self._open(threads)
            ends = settings["eos_token_id"]
            self.end_ids = frozenset(ends if isinstance(ends, list) else [ends])
            whole = int(settings["context_length"])
        except Exception as error:
            raise ModelError(f"{folder} cannot be loaded: {error}", "convert the model again") from error
        self.rows, self.context_length = rows, min(context or whole, whole)
        self._np, self.folder = np, folder
        places = max(rows, 2) if adapters else rows  # see `_decode`
        self._lengths = [0] * places
        self._worn: list[str | None] = [None] * places
        given = {one.name: one for one in self._session.get_inputs()}
        made = {one.name: one for one in self._session.get_outputs()}
        logits = made["logits"]
        self.vocabulary = int(logits.shape[-1])
        self._ids = np.zeros(max(places, self.context_length), np.int64)
        wide = self._wide(self.context_length)
        self._mask = np.zeros(places * wide, np.int64)
        self._logits = np.zeros((places, self.vocabulary), TYPES[logits.type])
        self._last_only = logits.shape[1] == 1  # else the graph gives the logits of all tokens
        self._caches: dict[str, tuple[str, NDArray[Any]]] = {}
        for name, one in given.items():
            if name.startswith("past_key_values."):
                present = name.replace("past_key_values", "present", 1)
                if present not in made or one.type not in TYPES:
                    raise ModelError(f"{folder}: its graph has no {present} like {name}", "convert the model again")
                shape = (places, one.shape[1], self.context_length, decoder["head_size"])
                self._caches[name] = (present, pages.zeros(shape, TYPES[one.type]))
        if set(given) - set(self._caches) != {"input_ids", "attention_mask"}:
            odd = ", ".join(sorted(set(given) - set(self._caches) - {"input_ids", "attention_mask"}))
            raise ModelError(f"{folder}: its graph takes {odd or 'no attention_mask'}", "convert it with slmops")
        self._adapters = {name: self._adapter(file) for name, file in (adapters or {}).items()}
        self.adapters = frozenset(self._adapters)

    def _open(self, threads: int, hidden: str = "", graph: bytes = b"") -> None:
        """Load the graph, in place of the one that is there: with other threads, or another graph of the same folder."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.enable_mem_pattern = False
        options.log_severity_level = 3  # it would warn of each input of an adapter
        if graph:
            options.add_session_config_entry(
                "session.model_external_initializers_file_folder_path", str(self._file.parent)
            )
        self._session: Any = None
        self._bindings: dict[tuple[int, int, str | None], Any] = {}
        providers = ["CPUExecutionProvider"]
        self._session = onnxruntime.InferenceSession(graph or str(self._file), options, providers=providers)
        self._threads, self._hidden = threads, hidden

    def _adapter(self, file: Path) -> tuple[Any, dict[str, Any]]:
        """An adapter's file, which has to stay open, and its numbers by the graph's names of inputs."""
        import onnxruntime

        try:
            held = onnxruntime.AdapterFormat.read_adapter(str(file))
            found: dict[str, Any] = dict(held.get_parameters())
        except Exception as error:
            raise ModelError(f"{file} cannot be loaded: {error}", "give an .onnx_adapter file") from error
        there = {one.name: one.shape for one in self._session.get_overridable_initializers()}
        for name, value in found.items():
            shape = there.get(name)
            fits = shape is not None and all(
                not isinstance(a, int) or a in (0, b) for a, b in zip(shape, value.shape(), strict=True)
            )
            if not fits:
                raise ModelError(
                    f"{file}: the graph of {self.folder} does not take {name} as it is there",
                    "convert the base together with its adapters",
                )
        return held, found

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

    def wear(self, row: int, adapter: str | None) -> None:
        """See `Rows`."""
        self._worn[row] = adapter

    def use_threads(self, threads: int) -> None:
        """See `Rows`. Loads the model anew."""
        self._open(threads)

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
        self._pass(self._bind(row, 1, len(ids), total, logits, self._worn[row]))
        self._lengths[row] = total
        found: NDArray[np.float32] = logits[-1].astype(self._np.float32)
        return found

    def decode(self, tokens: Mapping[int, int]) -> dict[int, NDArray[np.float32]]:
        """See `Rows`."""
        for row in tokens:
            if self._lengths[row] >= self.context_length:
                raise ValueError(f"row {row} is full")
        groups: dict[str | None, dict[int, int]] = {}
        for row, token in tokens.items():
            groups.setdefault(self._worn[row], {})[row] = token
        found: dict[int, NDArray[np.float32]] = {}
        for adapter, group in groups.items():
            logits = self._decode(group, adapter).astype(self._np.float32, copy=len(groups) > 1)
            found |= {row: logits[row] for row in group}
        return found

    def _decode(self, tokens: Mapping[int, int], adapter: str | None) -> NDArray[Any]:
        """One pass with an adapter; the logits of all rows (rows, vocabulary), of which those in `tokens` count.

        The runtime multiplies a single row by numbers that are no part of the graph in another order than several: with an adapter
        two rows are computed at least.
        """
        count = max(max(tokens) + 1, 1 if adapter is None else 2)
        lengths = [min(length, self.context_length - 1) for length in self._lengths[:count]]
        wide = self._wide(max(lengths) + 1)
        mask = self._mask[: count * wide].reshape(count, wide)
        mask[:] = 0
        for row, length in enumerate(lengths):
            mask[row, 0] = length + 1
            self._ids[row] = tokens.get(row, 0)
        binding = self._bindings.get((count, wide, adapter))
        if binding is None:
            binding = self._bindings[count, wide, adapter] = self._bind(0, count, 1, wide, self._logits, adapter)
        self._pass(binding)
        for row, length in enumerate(lengths):
            # an idle row keeps what it held, less a last token that there was no room beside
            self._lengths[row] = length + 1 if row in tokens else length
        return self._logits

    def move(self, source: int, target: int) -> None:
        """See `Rows`."""
        length = self._lengths[source]
        for _, array in self._caches.values():
            array[target, :, :length] = array[source, :, :length]
        self._lengths[source], self._lengths[target] = 0, length
        self._worn[source], self._worn[target] = None, self._worn[source]

    def embed(self, ids: Sequence[int], adapter: str | None = None) -> Iterator[NDArray[np.float32] | None]:
        """See `Rows`. At the first time the model is loaded anew, with its last hidden states as one more output."""
        np = self._np
        if not self._hidden:
            try:
                made = with_hidden_states(self._file.read_bytes())
            except (ValueError, IndexError):
                made = None
            if made is None:
                raise RequestError("this model's graph does not show its hidden states", "convert it with slmops")
            try:
                self._open(self._threads, made[1], made[0])
            except Exception as error:
                self._open(self._threads)
                raise RequestError(
                    f"this model's hidden states cannot be had: {error}", "convert it with slmops"
                ) from error
        caches: dict[str, tuple[str, NDArray[Any]]] = {}
        for name, (present, array) in self._caches.items():
            caches[name] = present, np.zeros((1, array.shape[1], len(ids), array.shape[3]), array.dtype)
        width = next(one.shape[-1] for one in self._session.get_outputs() if one.name == self._hidden)
        whole = np.zeros(width, np.float64)
        for start in range(0, len(ids), CHUNK):
            part = ids[start : start + CHUNK]
            total = start + len(part)
            self._ids[: len(part)] = part
            self._mask[:total] = 0
            self._mask[0] = total
            binding = self._bind(0, 1, len(part), total, None, adapter, caches)
            states = np.empty((1, len(part), width), np.float32)
            binding.bind_output(self._hidden, "cpu", 0, np.float32, states.shape, states.ctypes.data)
            self._pass(binding)
            whole += states[0].sum(0, dtype=np.float64)
            if total < len(ids):
                yield None
        yield (whole / max(float(np.linalg.norm(whole)), 1e-30)).astype(np.float32)

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

    def _bind(
        self, row: int, count: int, new: int, wide: int, logits: NDArray[Any] | None, adapter: str | None,
        caches: Mapping[str, tuple[str, NDArray[Any]]] | None = None,
    ) -> Any:  # fmt: skip
        """Everything of a pass over `count` rows from `row` on, with `new` tokens each, at its place in memory."""
        binding = self._session.io_binding()
        int64 = self._np.int64
        binding.bind_input("input_ids", "cpu", 0, int64, (count, new), self._ids.ctypes.data)
        binding.bind_input("attention_mask", "cpu", 0, int64, (count, wide), self._mask.ctypes.data)
        for name, (present, array) in (caches or self._caches).items():
            place = array.ctypes.data + row * array.strides[0]
            shape = (count, *array.shape[1:])
            binding.bind_input(name, "cpu", 0, array.dtype.type, shape, place)
            binding.bind_output(present, "cpu", 0, array.dtype.type, shape, place)
        if adapter is not None:
            for name, value in self._adapters[adapter][1].items():
                binding.bind_ortvalue_input(name, value)
        if logits is not None:
            shape = (count, 1 if self._last_only else new, self.vocabulary)
            binding.bind_output("logits", "cpu", 0, logits.dtype.type, shape, logits.ctypes.data)
        return binding
