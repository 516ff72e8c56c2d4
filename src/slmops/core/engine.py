"""What runs a model: the protocol that labelling, evaluation, fidelity checks and chat all use.

Token ids are plain lists of ints. An engine encodes with the tokenizer and chat template that ship in its own folder,
so that what is judged is what is delivered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

KvCache = Literal["f32", "f16", "q8_0", "q4_0"]
"""How a runtime holds the keys and values of what it has read. q8_0 and q4_0: blocks of 32 numbers with one float16 scale."""
KV_CACHES: tuple[KvCache, ...] = get_args(KvCache)


@dataclass(frozen=True)
class Sampling:
    """How tokens are picked. `temperature` 0 is greedy; `top_p` 1 and `top_k` 0 switch those filters off.

    `ignore_end` goes on to `max_new_tokens`, for measuring. Remote endpoints and samples do not know it.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    ignore_end: bool = False


@dataclass(frozen=True)
class Generation:
    """One answer.

    Attributes:
        text: the decoded answer without the end token, stripped of nothing else.
        tokens: the new token ids, the end token included if it came.
        finished: True if the end token came, False if `max_new_tokens` (or the context) cut the answer.
        first_token_s: seconds from the call to the first new token.
        total_s: seconds from the call to the last token.
        logprob: sum of the log probabilities of the new tokens, where the engine knows it.
    """

    text: str
    tokens: tuple[int, ...]
    finished: bool
    first_token_s: float = 0.0
    total_s: float = 0.0
    logprob: float | None = None


class Engine(Protocol):
    """A loaded model. Close it when done."""

    name: str
    context_length: int

    def encode(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a prompt rendered by the chat template, ready for the answer (generation prompt included)."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; special tokens are left out."""

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, on_done: Callable[[int], None] | None = None
    ) -> list[Generation]:
        """One answer per prompt, in order. Greedy answers do not depend on which prompts come together.

        Args:
            on_done: called with the number of prompts just finished, for progress.

        Raises:
            ModelError: a prompt leaves no room in the context; its index is in the message.
        """

    def logits(self, ids: Sequence[int], start: int = 0) -> Any:
        """Teacher-forced float32 numpy array (len(ids) - start, vocabulary): the row of position i predicts token i + 1."""

    def close(self) -> None:
        """Free the model."""


class AtOnce(Protocol):
    """What an engine can do besides, if its runtime decodes several answers together (`engines.refuse_at_once` says which do)."""

    def at_once(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Generation]:
        """One greedy answer of exactly `new_tokens` tokens to each prompt, end tokens passed over, a token of all of them at a time.

        For measuring speed: a runtime may round differently in company, so near ties between tokens may fall otherwise than in
        `Engine.generate`. The seconds of each answer are those of all.

        Args:
            prompts: token ids, all prompts of the same length.

        Raises:
            ModelError: the prompts differ in length, or they leave no room for the answers; nothing has run then.
        """
