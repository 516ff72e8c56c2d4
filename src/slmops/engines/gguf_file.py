"""A GGUF file in llama.cpp: its weights, or its vocabulary alone, which is read in a moment and takes little memory.

What every user of such a file needs: what the metadata says, how long its context is, and text to tokens and back.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slmops.errors import MissingExtraError, ModelError

ALL_F32 = "0"
"""`general.file_type` of a file whose matrices are float32."""
ERROR = 4
"""The runtime's level of log lines that are kept for messages."""
_log: dict[str, Any] = {"lines": []}
"""The runtime's last complaints, and its callback: the runtime keeps a bare pointer to that, so it must stay alive."""


class GgufFile:
    """A GGUF file, loaded.

    Args:
        weights: False: the vocabulary and the metadata alone.

    Raises:
        MissingExtraError: llama.cpp is not installed.
        ModelError: the file cannot be loaded.
    """

    def __init__(self, file: Path, *, weights: bool = True) -> None:
        try:
            import llama_cpp
            import numpy  # noqa: F401  (which llama_cpp needs)
        except ImportError as error:
            raise MissingExtraError("llama.cpp", "llamacpp") from error
        self.lib: Any = llama_cpp
        listen(llama_cpp)
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers, params.vocab_only = 0, not weights
        self.model: Any = llama_cpp.llama_model_load_from_file(str(file).encode(), params)
        if not self.model:
            raise ModelError(f"{file} cannot be loaded: {complaint()}", "convert the model again")
        self.vocab: Any = llama_cpp.llama_model_get_vocab(self.model)
        self.size = int(llama_cpp.llama_vocab_n_tokens(self.vocab))
        self.kind = self.about("general.architecture")

    @property
    def full(self) -> bool:
        """Whether its matrices are float32."""
        return self.about("general.file_type") == ALL_F32

    @property
    def context_length(self) -> int:
        """Tokens that the model takes at most."""
        length = int(self.about(f"{self.kind}.context_length") or 2048)
        first = self.about(f"{self.kind}.rope.scaling.original_context_length")
        if self.kind == "phi3" and first:  # with more room the runtime takes other positions for short texts too
            length = min(length, int(first))
        return length

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        return frozenset(i for i in range(self.size) if self.lib.llama_vocab_is_eog(self.vocab, i))

    @property
    def template(self) -> str:
        """The chat template, "" if there is none."""
        return self.about("tokenizer.chat_template", 1 << 20)

    @property
    def marks(self) -> dict[str, str]:
        """What templates call the marks of a beginning and an end."""
        lib = self.lib
        return {
            "bos_token": self._mark(lib.llama_vocab_bos(self.vocab)),
            "eos_token": self._mark(lib.llama_vocab_eos(self.vocab)),
        }

    def _mark(self, token: int) -> str:
        return self.pieces([token], special=True).decode("utf-8", "replace") if 0 <= token < self.size else ""

    def about(self, key: str, room: int = 256) -> str:
        """A value of the file's metadata, "" if it has none."""
        buffer = ctypes.create_string_buffer(room)
        length = self.lib.llama_model_meta_val_str(self.model, key.encode(), buffer, room)
        return buffer.value.decode("utf-8") if length >= 0 else ""

    def tokenize(self, text: str, *, marked: bool = False) -> list[int]:
        """Token ids of a text, marks such as `<|end|>` included.

        Args:
            marked: with the mark of a beginning before it, and of an end, where the model has them so.
        """
        data = text.encode("utf-8")
        room = len(data) + 8
        buffer = (ctypes.c_int32 * room)()
        count = self.lib.llama_tokenize(self.vocab, data, len(data), buffer, room, marked, True)
        return list(buffer[:count])

    def pieces(self, ids: Sequence[int], *, special: bool = False) -> bytes:
        """The text of ids; special tokens show only where they are asked for."""
        whole = b""
        for token in ids:
            room = 64
            while True:
                buffer = ctypes.create_string_buffer(room)
                length = self.lib.llama_token_to_piece(self.vocab, token, buffer, room, 0, special)
                if length >= 0:
                    break
                room = -length
            whole += buffer.raw[:length]
        return whole

    def spelling(self, token: int) -> str:
        """What a token is, as the file spells it."""
        text: str = self.lib.llama_vocab_get_text(self.vocab, token).decode("utf-8", "replace")
        return text

    def special(self, token: int) -> bool:
        """Whether a token is no text: `pieces` shows it only where that is asked for."""
        lib = self.lib
        marks = lib.LLAMA_TOKEN_ATTR_CONTROL | lib.LLAMA_TOKEN_ATTR_UNKNOWN
        return 0 <= token < self.size and bool(lib.llama_vocab_get_attr(self.vocab, token) & marks)

    def close(self) -> None:
        """Free it."""
        if self.model:
            self.lib.llama_model_free(self.model)
        self.model = None


def cache_type(lib: Any, params: Any, kind: str) -> None:
    """Hold keys and values in this type: float32 without flash attention, which takes float16 on the way; blocks only with it."""
    params.type_k = params.type_v = getattr(lib, f"GGML_TYPE_{kind.upper()}")
    if kind not in ("f32", "f16"):
        params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
    elif kind == "f32":
        params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED


def listen(lib: Any) -> None:
    """Take the runtime's log, which it would print, and keep its last errors."""
    if "callback" in _log:
        return

    def hear(level: int, text: bytes, _: Any) -> None:
        if level == ERROR:
            _log["lines"] = [*_log["lines"][-3:], text.decode("utf-8", "replace").strip()]

    _log["callback"] = lib.llama_log_callback(hear)
    lib.llama_log_set(_log["callback"], ctypes.c_void_p(0))
    lib.llama_backend_init()


def complaint() -> str:
    """The runtime's last error lines, and forget them."""
    lines, _log["lines"] = _log["lines"], []
    return " ".join(lines) or "it does not say why"
