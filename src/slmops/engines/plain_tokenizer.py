"""The tokenizer and chat template of a Hugging Face folder without transformers: what small runtimes need, in a tenth of its memory.

Law: ids are those of transformers' fast tokenizer of the folder. Conversions are checked for it (`fidelity`).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from slmops.engines import clean, read_json
from slmops.errors import MissingExtraError, ModelError

FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "generation_config.json",
)  # fmt: skip
"""What a converted folder takes over from a Hugging Face model, byte for byte."""


_known: WeakValueDictionary[bytes, Any] = WeakValueDictionary()
"""Tokenizers that are in use, by the digest of their file. Versions of a model mostly have the same, and what one remembers of words, some
megabytes, tokenizers 0.23.3 does not give back when it is no longer used."""


def _loaded(folder: Path, extra: str) -> Any:
    """The tokenizer of a folder, which whoever has the same file shares. It neither cuts nor pads."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingExtraError("tokenizers", extra) from error
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ModelError(f"{folder} has no tokenizer.json", "convert the model again")
    try:
        raw = file.read_bytes()
        digest = hashlib.sha256(raw).digest()
        found = _known.get(digest)
        if found is None:
            found = Tokenizer.from_buffer(raw)
            found.no_truncation()
            found.no_padding()
            _known[digest] = found
    except Exception as error:
        raise ModelError(f"{file} cannot be read: {error}", "convert the model again") from error
    return found


class PlainTokenizer:
    """`tokenizer.json` and the template of a folder.

    Args:
        extra: the pip extra that brings the package `tokenizers` to the runtime which asks.

    Raises:
        ModelError: a file is missing or damaged, or the template cannot be read.
        MissingExtraError: `tokenizers` is not installed.
    """

    def __init__(self, folder: Path, extra: str) -> None:
        self._tokenizer = _loaded(folder, extra)
        settings = read_json(folder / "tokenizer_config.json")
        self._folder = folder
        self.template = chat_template(folder)
        self._template = compile_template(self.template, folder)
        marks = {name: settings.get(name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
        self.marks = {name: _content(value) for name, value in marks.items() if value is not None}

    def encode(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """Token ids of the rendered prompt, ready for the answer.

        Args:
            messages: `role` and `content`, or what else the template reads, such as `tool_calls`.
            tools: functions that the answer may call, each an object as in the API of OpenAI.
        """
        if self._template is None:
            raise ModelError(f"{self._folder} has no chat template", "convert a model that has one")
        text = whole(render(self._template, messages, self.marks, tools))
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids without special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    @property
    def size(self) -> int:
        """Tokens that it knows, added ones included: ids are below."""
        return int(self._tokenizer.get_vocab_size())

    def ids(self, text: str, *, marked: bool = True) -> list[int]:
        """Token ids of a text without the chat template.

        Args:
            marked: with the mark of a beginning, and of an end, where the tokenizer puts them.
        """
        return list(self._tokenizer.encode(whole(text), add_special_tokens=marked).ids)

    def token(self, id: int) -> str:
        """The text of one token, special ones included; a part of a character shows as its replacement."""
        return str(self._tokenizer.decode([id], skip_special_tokens=False))

    def spellings(self) -> list[str | None]:
        """All tokens as the vocabulary spells them, by id."""
        return [self._tokenizer.id_to_token(id) for id in range(self.size)]

    def id_of(self, token: str) -> int | None:
        """The id of a token."""
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def special(self, id: int) -> bool:
        """Whether a token is no text: `decode` leaves it out."""
        added = self._tokenizer.get_added_tokens_decoder().get(id)
        return bool(added is not None and added.special)


def whole(text: str) -> str:
    """A text that can be encoded: halves of a character that JSON escaped one by one are joined, one alone is the replacement."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def chat_template(folder: Path) -> str:
    """The chat template of a folder, in Jinja; "" if it has none."""
    place = folder / "chat_template.jinja"
    settings = read_json(folder / "tokenizer_config.json")
    text = place.read_text(encoding="utf-8") if place.is_file() else settings.get("chat_template")
    return text if isinstance(text, str) else ""


def end_ids(folder: Path, config: dict[str, Any], fallback: int | None) -> frozenset[int]:
    """Ids that end an answer: of generation_config.json, else config.json, else `fallback`, the tokenizer's.

    Raises:
        ModelError: there is none.
    """
    path = folder / "generation_config.json"
    found = read_json(path).get("eos_token_id") if path.is_file() else None
    if found is None:
        found = config.get("eos_token_id")
    if found is None:
        found = fallback
    if found is None:
        raise ModelError(f"{folder} names no end token", "set eos_token_id in generation_config.json")
    return frozenset(found if isinstance(found, list) else [found])


def _content(token: Any) -> str:
    """A token's text: settings write it plainly, or with its flags."""
    return str(token["content"] if isinstance(token, dict) else token)


def render(
    template: Any, messages: Sequence[dict[str, Any]], marks: dict[str, str], tools: Sequence[dict[str, Any]] = ()
) -> str:
    """The text of a prompt, ready for the answer.

    Raises:
        ModelError: the template refuses the messages.
    """
    try:
        given = {"tools": list(tools) or None, "documents": None}
        return str(template.render(messages=clean(messages), **given, add_generation_prompt=True, **marks))
    except Exception as error:
        raise ModelError(f"the chat template failed: {error}", "check chat_template.jinja of the model") from error


def compile_template(text: str, folder: Path) -> Any:
    """The chat template of a model, None if there is none."""
    if not text:
        return None
    from jinja2 import TemplateSyntaxError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what a model says, for those who train: here it is its body."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            """See jinja2."""
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = time.strftime
    environment.filters["tojson"] = _json
    try:
        return environment.from_string(text)
    except TemplateSyntaxError as error:
        raise ModelError(
            f"the chat template of {folder} cannot be read: {error}", "mend chat_template.jinja"
        ) from error


def _refuse(message: str) -> None:
    raise ValueError(message)


def _json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """As transformers writes JSON in a template; jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
