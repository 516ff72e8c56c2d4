"""ONNX Runtime GenAI: the engine that the shipped model runs in, with that runtime's own tokenizer and chat template.

One generator is kept and rewound for greedy answers, since making one costs more than a token of a small model. Times
count from the call for a prompt to its tokens; turning text into ids and back is outside.

A folder that `convert.onnx_adapters` wrote has several adapters over one base: `use` switches between them while the model
stays loaded.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops.core.engine import Generation, Sampling
from slmops.engines import AT_ONCE, at_once, check_room, clean, no_room, read_json
from slmops.engines.adapters import adapter_file
from slmops.errors import MissingExtraError, ModelError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SEED_BITS = 0x7FFFFFFF


class GenaiEngine:
    """A folder in ONNX Runtime GenAI form. See `slmops.core.engine.Engine`. Not safe for use by two threads at once."""

    name = "onnx_genai"

    def __init__(self, folder: Path, *, threads: int = 1, adapter: str | None = None) -> None:
        try:
            import numpy
            import onnxruntime_genai as og
        except ImportError as error:
            raise MissingExtraError("ONNX Runtime GenAI", "runtime") from error
        settings = read_json(folder / "genai_config.json")
        self._folder = folder
        self._active: str | None = None
        if adapter is not None:
            adapter_file(folder, adapter)  # before the model is loaded
        options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        try:
            config = og.Config(str(folder))
            config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
            self._model: Any = og.Model(config)
            self._tokenizer: Any = og.Tokenizer(self._model)
        except Exception as error:
            raise ModelError(f"{folder} cannot be loaded: {error}", "convert the model again") from error
        self._og, self._np = og, numpy
        self.context_length = int(settings["model"]["context_length"])
        ends = settings["model"]["eos_token_id"]
        self.end_ids = frozenset(ends if isinstance(ends, list) else [ends])
        self._special = special_ids(folder / "tokenizer.json") | self.end_ids
        self._generator: Any = None
        self._endless, self._rows = False, 1
        self._length = 0
        self._adapters: Any = None
        self._loaded: set[str] = set()
        self.use(adapter)

    def use(self, adapter: str | None) -> None:
        """Answer with this adapter from now on; None: with the base alone.

        Raises:
            ModelError: the folder has no such adapter, or the runtime cannot load it.
        """
        if adapter is not None and adapter not in self._loaded:
            file = str(adapter_file(self._folder, adapter))
            try:
                self._adapters = self._adapters or self._og.Adapters(self._model)
                self._adapters.load(file, adapter)
            except Exception as error:
                raise ModelError(f"{file} cannot be loaded: {error}", "convert the model again") from error
            self._loaded.add(adapter)
        self._active, self._generator = adapter, None

    def _new(self, params: Any) -> Any:
        generator = self._og.Generator(self._model, params)
        if self._active is not None:
            generator.set_active_adapter(self._adapters, self._active)
        return generator

    def encode(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of the rendered prompt, ready for the answer."""
        try:
            text = self._tokenizer.apply_chat_template(json.dumps(clean(messages)), add_generation_prompt=True)
        except Exception as error:
            raise ModelError(f"the chat template failed: {error}", "check chat_template.jinja of the model") from error
        return [int(i) for i in self._tokenizer.encode(text)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids without special tokens."""
        plain = [i for i in ids if i not in self._special]
        return str(self._tokenizer.decode(plain)) if plain else ""

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, on_done: Callable[[int], None] | None = None
    ) -> list[Generation]:
        """One answer per prompt, one prompt after the other. With sampling, prompt i is seeded with `seed + i`."""
        check_room(prompts, self.context_length)
        answers = []
        for index, prompt in enumerate(prompts):
            answers.append(self._one(self._np.array(prompt, self._np.int32), sampling, index))
            if on_done:
                on_done(1)
        return answers

    def _one(self, prompt: NDArray[np.int32], sampling: Sampling, index: int) -> Generation:
        clock = time.perf_counter
        started = clock()
        room = min(sampling.max_new_tokens, self.context_length - len(prompt))
        if sampling.temperature == 0:
            generator = self._ready(len(prompt) + room, sampling.ignore_end)
        else:
            generator = self._sampler(len(prompt) + room, sampling, index)
        advance, done = generator.generate_next_token, generator.is_done
        generator.append_tokens(prompt)
        advance()
        first = clock() - started
        count = 1
        while count < room and not done():
            advance()
            count += 1
        total = clock() - started
        tokens = tuple(generator.get_sequence(0)[len(prompt) :].tolist())
        if len(tokens) < count:
            # The runtime leaves the end token out of the sequence.
            tokens = (*tokens, int(generator.get_next_tokens()[0]))
        return Generation(self.decode(tokens), tokens, tokens[-1] in self.end_ids, first, total)

    def at_once(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Generation]:
        """One answer of `new_tokens` tokens to each prompt, in one batch; see `slmops.core.engine.AtOnce`."""
        at_once.check(prompts, new_tokens, self.context_length, AT_ONCE[self.name])
        clock = time.perf_counter
        started = clock()
        length = len(prompts[0])
        generator = self._ready(length + new_tokens, endless=True, rows=len(prompts))
        try:
            generator.append_tokens(self._np.array(prompts, self._np.int32))
            generator.generate_next_token()
            first = clock() - started
            for _ in range(new_tokens - 1):
                generator.generate_next_token()
        except Exception as error:
            self._generator = None
            raise ModelError(f"ONNX Runtime GenAI failed: {error}", "give fewer prompts at once") from error
        total = clock() - started
        rows = [generator.get_sequence(row)[length:].tolist() for row in range(len(prompts))]
        return at_once.answers(self, rows, first, total)

    def _ready(self, length: int, endless: bool = False, rows: int = 1) -> Any:
        """The greedy generator at position 0, with room for `length` tokens; its cache grows by powers of two.

        Args:
            endless: it never picks an end token.
            rows: answers at once.
        """
        if self._generator is None or length > self._length or (endless, rows) != (self._endless, self._rows):
            self._generator, self._endless, self._rows = None, endless, rows
            self._length = min(self.context_length, max(64, 1 << (length - 1).bit_length()))
            params = self._og.GeneratorParams(self._model)
            params.set_search_options(
                max_length=self._length, do_sample=False, num_beams=1, min_length=self._length if endless else 0,
                batch_size=rows,
            )  # fmt: skip
            self._generator = self._new(params)
        else:
            self._generator.rewind_to(0)
        return self._generator

    def _sampler(self, length: int, sampling: Sampling, index: int) -> Any:
        params = self._og.GeneratorParams(self._model)
        params.set_search_options(
            max_length=length,
            do_sample=True,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            random_seed=(sampling.seed + index) & SEED_BITS,
        )
        return self._new(params)

    def logits(self, ids: Sequence[int], start: int = 0) -> NDArray[np.float32]:
        """Teacher-forced logits, float32 (len(ids) - start, vocabulary): the rows from position `start` on.

        The shipped graph computes logits of the last position only, so tokens after `start` go in one at a time.
        """
        import numpy as np

        if not 0 < len(ids) <= self.context_length:
            raise no_room(0, len(ids), self.context_length)
        params = self._og.GeneratorParams(self._model)
        params.set_search_options(max_length=len(ids) + (len(ids) < self.context_length))
        generator = self._new(params)
        rows = []
        array = np.array(ids, np.int32)
        for begin, end in [(0, start + 1), *((i, i + 1) for i in range(start + 1, len(ids)))]:
            generator.append_tokens(array[begin:end])
            rows.append(np.array(generator.get_logits()[0, -1], np.float32))
        stacked: NDArray[np.float32] = np.stack(rows)
        return stacked

    def close(self) -> None:
        """Drop the model. The runtime keeps part of its memory until the process ends."""
        self._generator = self._adapters = self._tokenizer = self._model = None


def special_ids(path: Path) -> frozenset[int]:
    """Ids of the special tokens in a tokenizer.json. Only that list is parsed: the rest is large once it is objects."""
    text = path.read_text(encoding="utf-8")
    key = '"added_tokens":'
    at = text.find(key)
    if at < 0:
        return frozenset()
    at += len(key)
    while text[at].isspace():
        at += 1
    added = json.JSONDecoder().raw_decode(text, at)[0]
    return frozenset(token["id"] for token in added if token.get("special"))
