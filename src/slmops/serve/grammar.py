"""What an answer may say: grammars, and for each next token whether it may come. By llguidance.

Law: an answer that ends by itself, neither cut for length nor at a stop string, is a sentence of its grammar. What a grammar cannot
hold to is refused before the first token.

A grammar is a text, in the Lark of llguidance or made from a JSON schema. The model's process reads grammars on a thread, so that a large
one holds up no answer. Which tokens may come next is mostly known in a few microseconds, less than another thread takes to wake; where it
took longer, it is worked out beside the pass of the model.
"""

from __future__ import annotations

import json
import queue
import re
import threading
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops.engines.gguf_tokenizer import GgufTokenizer, tokenizer_place
from slmops.errors import MissingExtraError, SlmopsError
from slmops.serve.scheduler import GrammarError
from slmops.serve.schemas import check

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SPACING = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?", "lenient": False}
"""JSON on one line, with at most the spaces that `json.dumps` writes: a small model could write white space for ever."""
OBJECT = {"type": "object"}
VALUES = ("const", "enum", "default", "examples")
"""Keys of a schema that hold values, not schemas."""
_YEAR = r"(?:[0-9]{3}[1-9]|[0-9]{2}[1-9][0-9]|[0-9][1-9][0-9]{2}|[1-9][0-9]{3})"
_LEAP = r"(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DATE = (
    rf"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    rf"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP}-02-29)"
)
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,9})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
FORMATS = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}T{_TIME}$"}
"""Of these, llguidance lets through days that are not in the calendar, and RFC 3339 seconds and years that programs do not read."""
LIMITS = {"max_grammar_size": 50_000, "initial_lexer_fuel": 500_000}
"""So large a grammar takes seconds to read at most; no larger one is."""
FAILED = "the grammar cannot be followed"
UNREADABLE = "the grammar cannot be read"
SLOW_S = 0.0002
"""After a mask that took longer, the next one is worked out on the other thread."""


def of_schema(schema: Mapping[str, Any] | bool) -> str:
    """The grammar of JSON that a schema describes, on one line, properties in the order in which it names them."""
    return f"start: {json_rule(schema)}"


def json_rule(schema: Mapping[str, Any] | bool) -> str:
    """A schema as a part of a rule in Lark.

    Raises:
        GrammarError: it is no schema.
    """
    check(schema)
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    return f"%json {json.dumps({**_readable(schema), 'x-guidance': SPACING})}"


def _readable(schema: Any) -> Any:
    """A schema with dates and times as patterns."""
    if isinstance(schema, list):
        return [_readable(one) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    found = {key: value if key in VALUES else _readable(value) for key, value in schema.items()}
    form = found.get("format")
    if isinstance(form, str) and form in FORMATS and "pattern" not in found:
        del found["format"]
        found["pattern"] = FORMATS[form]
    return found


def literal(text: str) -> str:
    """A text as a part of a rule in Lark."""
    return json.dumps(text, ensure_ascii=False)


class Limit:
    """What one answer may say, token by token: `mask`, `take`, and again. `begin` before other work makes `mask` quick.

    Attributes:
        why: what was wrong, if the grammar turned out too hard to follow; then nothing else holds.

    Args:
        vocabulary: tokens of the model's logits.
        size: tokens that the matcher knows, as many or more.
        work: goes to the other thread.
    """

    def __init__(self, matcher: Any, vocabulary: int, size: int, work: queue.SimpleQueue[Any]) -> None:
        import numpy as np

        self._matcher, self._vocabulary, self._work = matcher, vocabulary, work
        self._bits = np.zeros((size + 31) // 32 * 4, np.uint8)
        self._place = (self._bits.ctypes.data, self._bits.nbytes)
        self._done: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._mask: NDArray[np.bool_] | None = None
        self._begun = self._slow = False
        self.why = ""

    @property
    def ended(self) -> bool:
        """Whether nothing can follow but the end."""
        return bool(self._matcher.is_stopped())

    def begin(self) -> None:
        """Have the next mask worked out on the other thread, where that pays."""
        if self._slow and self._mask is None and not self._begun:
            self._begun = True
            self._work.put(self)

    def run(self) -> None:
        """Work out the next mask, on the thread that calls."""
        import numpy as np

        begin = time.perf_counter()
        try:
            self._matcher.unsafe_compute_mask_ptr(*self._place)
            if self._matcher.is_error():
                self.why = self._matcher.get_error() or FAILED
        except Exception as error:  # on the other thread, or the model would wait for it for ever
            self.why = str(error) or FAILED
        bits = np.unpackbits(self._bits, bitorder="little", count=self._vocabulary)
        self._mask = bits.view(np.bool_)
        self._slow = time.perf_counter() - begin > SLOW_S
        if self._begun:
            self._done.put(None)

    def mask(self) -> NDArray[np.bool_]:
        """(vocabulary,) which tokens may come next."""
        if self._begun:
            self._done.get()
            self._begun = False
        elif self._mask is None:
            self.run()
        assert self._mask is not None
        return self._mask

    def take(self, token: int) -> None:
        """The token that was picked, one of those that might come."""
        self._mask = None
        if not self._matcher.consume_token(token) and not self.why:
            self.why = self._matcher.get_error() or FAILED


class Grammars:
    """Grammars over the tokens of one model. Its threads are there from the first grammar on.

    Args:
        model: its folder, or a GGUF file.
        vocabulary: tokens of the model's logits.
        end_ids: tokens that end an answer.
    """

    def __init__(self, model: Path, vocabulary: int, end_ids: Collection[int]) -> None:
        self._model, self._vocabulary, self._ends = model, vocabulary, sorted(end_ids)
        self._tokens: Any = None
        self._size = self._vocabulary
        self._work: queue.SimpleQueue[Limit] = queue.SimpleQueue()

    def limit(self, grammar: str) -> Limit:
        """A grammar at its beginning, with its first mask worked out.

        Raises:
            GrammarError: it cannot be read, or asks for what cannot be held to.
            MissingExtraError: llguidance is not installed.
        """
        try:
            from llguidance import LLMatcher, LLParserLimits
        except ImportError as error:
            raise MissingExtraError("llguidance", "serve") from error
        if self._tokens is None:
            self._tokens = self._read_tokens()
            threading.Thread(target=self._follow, daemon=True).start()
        matcher = LLMatcher(self._tokens, grammar, log_level=0, limits=LLParserLimits(**LIMITS))
        if matcher.is_error():
            raise GrammarError(_first_line(matcher.get_error()), "leave that out, or say it in another way")
        limit = Limit(matcher, self._vocabulary, self._size, self._work)
        limit.mask()
        if limit.why:
            raise GrammarError(_first_line(limit.why), "make it simpler")
        return limit

    def _read_tokens(self) -> Any:
        from llguidance import LLTokenizer, TokenizerWrapper

        try:
            place = tokenizer_place(self._model)
            if place.is_file():
                wrapper = TokenizerWrapper(_Own(GgufTokenizer(place), self._ends[0]))
                return LLTokenizer(wrapper, n_vocab=self._vocabulary, eos_token=self._ends)
            told = json.loads((place / "tokenizer.json").read_text(encoding="utf-8"))
            told["truncation"] = told["padding"] = None
            most = max([token["id"] for token in told["added_tokens"]] + list(told["model"]["vocab"].values()))
            self._size = max(self._vocabulary, most + 1)
            return LLTokenizer(json.dumps(told), n_vocab=self._size, eos_token=self._ends)
        except Exception as error:
            raise GrammarError(
                f"the tokenizer of this model cannot be held to a grammar: {_first_line(str(error))}", ""
            ) from error

    def _follow(self) -> None:
        while True:
            self._work.get().run()


class _Own:
    """The tokenizer of a GGUF file, as llguidance wants one."""

    def __init__(self, tokenizer: GgufTokenizer, end: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = end, None
        self.tokens = tokenizer.texts()
        self.special_token_ids = [id for id in range(tokenizer.size) if tokenizer.special(id)]

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.ids(text.decode("utf-8"), marked=False)


class Reading:
    """Commands to a model's process, whose grammars are read on a thread on the way. What has none goes straight through; a cancelled
    request whose grammar is not read yet is cancelled after it."""

    def __init__(self, grammars: Grammars, through: Callable[[dict[str, Any] | None], None]) -> None:
        self._grammars, self._through = grammars, through
        self._queue: queue.SimpleQueue[dict[str, Any]] | None = None
        self._open: set[int] = set()
        self._lock = threading.Lock()

    def put(self, command: dict[str, Any] | None) -> None:
        """Take a command; None is the end."""
        asked = command.get("ask") if command else None
        with self._lock:
            wait = bool(asked and asked.get("grammar")) or (command or {}).get("cancel") in self._open
            if wait and asked:
                self._open.add(asked["id"])
        if not wait or command is None:
            self._through(command)
            return
        if self._queue is None:
            self._queue = queue.SimpleQueue()
            threading.Thread(target=self._follow, args=(self._queue,), daemon=True).start()
        self._queue.put(command)

    def _follow(self, commands: queue.SimpleQueue[dict[str, Any]]) -> None:
        while True:
            command = commands.get()
            asked = command.get("ask")
            if asked is not None:
                try:
                    asked["limit"] = self._grammars.limit(asked["grammar"])
                except SlmopsError as error:
                    asked["refused"] = error
                except BaseException as error:  # also a panic of llguidance: nobody may wait for ever
                    said = f"the grammar cannot be read: {_first_line(str(error))}"
                    asked["refused"] = GrammarError(said, "make it simpler")
            self._through(command)
            if asked is not None:
                with self._lock:
                    self._open.discard(asked["id"])


def _first_line(text: str) -> str:
    """What of an error of llguidance says something to people: not the grammar, nor the state of its parser, nor where its code stopped."""
    if text.startswith("panic: "):
        return UNREADABLE
    lines = [re.sub(r"^at \d+\(\d+\): ", "", line.strip()) for line in text.split("<state>")[0].splitlines()]
    said = [line for line in lines if line.strip(" ^") and not re.match(r"\d+ \|", line)]
    return " ".join(said)[:400] or UNREADABLE
