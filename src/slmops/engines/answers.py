"""What any model that answers messages gives back, near or far."""

from __future__ import annotations

from dataclasses import dataclass

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Answer:
    """What a model said. `finished` is False where the length limit cut it; `logprob` where the model knows it."""

    text: str
    finished: bool = True
    prompt_tokens: int = 0
    completion_tokens: int = 0
    logprob: float | None = None
