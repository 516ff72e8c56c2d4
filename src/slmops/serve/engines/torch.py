"""The reference: any decoder that transformers runs, in PyTorch, float32, on the CPU, one row after the other.

Each row has a cache of its own and goes through the model alone. So it is no faster for many answers than for one, and an answer is
the same bits beside any others as alone, by construction.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops.engines import read_json
from slmops.engines.plain_tokenizer import end_ids
from slmops.errors import MissingExtraError, ModelError
from slmops.serve.scheduler import CHUNK

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

STATES = ("linear_attention", "mamba", "conv", "recurrent", "hybrid")
"""In the names of layers that keep one state instead of keys and values: a beginning of it cannot be had back."""


class TorchRows:
    """A Hugging Face folder. See `slmops.serve.engines.Rows`. Not safe for use by two threads at once.

    Args:
        rows: answers at a time.
        context: tokens that a row holds at most, prompt and answer; None: as many as the model can.
        threads: CPU threads.
        adapters: folders in PEFT's form, by name.

    Raises:
        MissingExtraError: torch, transformers or peft is not installed.
        ModelError: the folder or an adapter cannot be loaded.
    """

    packed = False

    def __init__(
        self, folder: Path, *, rows: int, context: int | None = None, threads: int = 1,
        adapters: Mapping[str, Path] | None = None,
    ) -> None:  # fmt: skip
        try:
            import torch
            from transformers import AutoModelForCausalLM
        except ImportError as error:
            raise MissingExtraError("PyTorch with transformers", "train") from error
        self._torch: Any = torch
        torch.set_num_threads(threads)
        config = read_json(folder / "config.json")
        try:
            self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        except Exception as error:
            raise ModelError(f"{folder} cannot be loaded: {error}", "the folder is damaged, or too new") from error
        self._plain: Any = self._model
        self._wearing: str | None = None
        self._model.eval().requires_grad_(False)
        settings = self._model.config
        self.end_ids = end_ids(folder, config, None)
        whole = int(getattr(settings, "max_position_embeddings", 0) or 2048)
        self.rows, self.context_length = rows, min(context or whole, whole)
        self.vocabulary = int(settings.vocab_size)
        kinds = [str(kind) for kind in getattr(settings, "layer_types", None) or ()]
        self._state = any(mark in kind for kind in kinds for mark in STATES)
        self._lengths = [0] * rows
        self._worn: list[str | None] = [None] * rows
        self._caches: list[Any] = [None] * rows
        self.adapters = frozenset(adapters or ())
        for name, path in (adapters or {}).items():
            self._load(name, path)

    def _load(self, name: str, folder: Path) -> None:
        try:
            from peft import PeftModel
        except ImportError as error:
            raise MissingExtraError("peft", "train") from error
        try:
            if self._model is self._plain:
                self._model = PeftModel.from_pretrained(self._plain, str(folder), adapter_name=name)
                self._wearing = name
            else:
                self._model.load_adapter(str(folder), adapter_name=name)
        except Exception as error:
            raise ModelError(
                f"{folder} cannot be loaded: {error}", "give an adapter of this base, in PEFT's form"
            ) from error
        self._model.eval()

    @property
    def cache_bytes(self) -> int:
        """Keys and values of all rows when they are full."""
        settings = self._plain.config
        heads = int(settings.num_attention_heads)
        width = int(getattr(settings, "head_dim", None) or settings.hidden_size // heads)
        keys = int(getattr(settings, "num_key_value_heads", None) or heads)
        return int(self.rows * self.context_length * settings.num_hidden_layers * 2 * keys * width * 4)

    def length(self, row: int) -> int:
        """See `Rows`."""
        return self._lengths[row]

    def cut(self, row: int, length: int) -> None:
        """See `Rows`."""
        if not 0 <= length <= self._lengths[row]:
            raise ValueError(f"row {row} holds {self._lengths[row]} tokens, not {length}")
        if length == self._lengths[row]:
            return
        if length == 0 or self._state:
            self._caches[row], length = None, 0
        else:
            self._caches[row].crop(length - self._lengths[row])
        self._lengths[row] = length

    def wear(self, row: int, adapter: str | None) -> None:
        """See `Rows`."""
        self._worn[row] = adapter

    def feed(self, row: int, ids: Sequence[int]) -> NDArray[np.float32]:
        """See `Rows`."""
        if not ids or self._lengths[row] + len(ids) > self.context_length:
            raise ValueError(f"{len(ids)} tokens do not fit into row {row}, which holds {self._lengths[row]}")
        if self._caches[row] is None:
            self._caches[row] = self._cache()
        output = self._run(ids, self._caches[row], self._worn[row], logits_to_keep=1)
        self._lengths[row] += len(ids)
        found: NDArray[np.float32] = output.logits[0, -1].float().numpy()
        return found

    def decode(self, tokens: Mapping[int, int]) -> dict[int, NDArray[np.float32]]:
        """See `Rows`."""
        return {row: self.feed(row, [token]) for row, token in tokens.items()}

    def move(self, source: int, target: int) -> None:
        """See `Rows`."""
        self._caches[target], self._lengths[target] = self._caches[source], self._lengths[source]
        self._worn[target] = self._worn[source]
        self._caches[source], self._lengths[source], self._worn[source] = None, 0, None

    def embed(self, ids: Sequence[int], adapter: str | None = None) -> Iterator[NDArray[np.float32] | None]:
        """See `Rows`."""
        cache, whole = self._cache(), 0.0
        for start in range(0, len(ids), CHUNK):
            part = ids[start : start + CHUNK]
            # the model without its head is the base in transformers' words; adapters are inside its layers
            states = self._run(part, cache, adapter, headless=True).last_hidden_state
            whole = whole + states[0].double().sum(0)
            if start + CHUNK < len(ids):
                yield None
        found: Any = whole / max(float(self._torch.linalg.norm(whole)), 1e-30)
        yield found.float().numpy()

    def use_threads(self, threads: int) -> None:
        """See `Rows`."""
        self._torch.set_num_threads(threads)

    def close(self) -> None:
        """See `Rows`."""
        self._caches = [None] * self.rows
        self._model = self._plain = None

    def _cache(self) -> Any:
        """An empty cache: whole keys and values, so that a row can be cut anywhere; also where attention looks through a window."""
        from transformers import DynamicCache

        return DynamicCache(config=self._plain.config) if self._state else DynamicCache()

    def _run(self, ids: Sequence[int], cache: Any, adapter: str | None, headless: bool = False, **more: Any) -> Any:
        torch = self._torch
        if adapter is not None and adapter != self._wearing:
            self._model.set_adapter(adapter)
            self._wearing = adapter
        model = self._plain.base_model if headless else self._plain
        try:
            with torch.inference_mode():
                given = {"input_ids": torch.tensor([list(ids)]), "past_key_values": cache, "use_cache": True, **more}
                if adapter is not None or self._model is self._plain:
                    return model(**given)
                with self._model.disable_adapter():
                    return model(**given)
        except Exception as error:
            raise ModelError(f"the model failed: {error}", "serve it in another form") from error
