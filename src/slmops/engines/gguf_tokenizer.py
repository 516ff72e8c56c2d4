"""The tokenizer and chat template that a GGUF file holds, for a file that has no `tokenizer.json` beside it. No weights are loaded.

Law: ids and texts are those of llama.cpp.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from slmops.engines.gguf_file import GgufFile
from slmops.engines.plain_tokenizer import PlainTokenizer, compile_template


class GgufTokenizer(PlainTokenizer):
    """The vocabulary of a GGUF file, in use as that of a folder is.

    Raises:
        MissingExtraError: llama.cpp is not installed.
        ModelError: the file or its template cannot be read.
    """

    def __init__(self, file: Path) -> None:
        held = GgufFile(file, weights=False)
        self._tokenizer: Any = _Vocabulary(held)
        self._folder = file
        self.template = held.template
        self._template = compile_template(self.template, file)
        self.marks = held.marks

    def special(self, id: int) -> bool:
        """See `PlainTokenizer`."""
        return bool(self._tokenizer.special(id))

    def texts(self) -> list[bytes]:
        """What each token adds to a text, special ones included."""
        found: list[bytes] = self._tokenizer.texts()
        return found


class _Vocabulary:
    """What `PlainTokenizer` wants of a `tokenizers.Tokenizer`."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self._known: dict[str, int | None] = {}
        weakref.finalize(self, file.close).atexit = False  # with the last use

    def encode(self, text: str, add_special_tokens: bool) -> Any:
        return SimpleNamespace(ids=self._file.tokenize(text, marked=add_special_tokens))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return self._file.pieces(ids, special=not skip_special_tokens).decode("utf-8", "replace")

    def get_vocab_size(self) -> int:
        return self._file.size

    def id_to_token(self, id: int) -> str:
        return self._file.spelling(id)

    def token_to_id(self, token: str) -> int | None:
        if token not in self._known:
            ids = range(self._file.size)
            self._known[token] = next((id for id in ids if self._file.spelling(id) == token), None)
        return self._known[token]

    def special(self, id: int) -> bool:
        return self._file.special(id)

    def texts(self) -> list[bytes]:
        return [self._file.pieces([id], special=True) for id in range(self._file.size)]


def tokenizer_of(model: Path, extra: str) -> PlainTokenizer:
    """The tokenizer of a model's folder, or of a GGUF file that has none beside it.

    Raises:
        ModelError, MissingExtraError: see the two.
    """
    place = tokenizer_place(model)
    return GgufTokenizer(place) if place.is_file() else PlainTokenizer(place, extra)


def tokenizer_place(model: Path) -> Path:
    """The folder whose `tokenizer.json` is that of a model, or the GGUF file which holds it where there is none beside."""
    from slmops.engines import find_gguf, gguf_parts

    if model.is_file():
        alone = find_gguf(model.parent)  # else a tokenizer there may be another one's
        return model.parent if alone and model in gguf_parts(alone) and _has(model.parent) else model
    return model if _has(model) else find_gguf(model) or model


def _has(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file()
