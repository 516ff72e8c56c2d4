"""Ollama's `options`: what each means here, and which cannot be had.

Three kinds: those that change an answer and are followed; hints about the machine (threads, layers on a GPU, mapping), which the server
decides and which change no answer: accepted; and those that would change an answer in a way that is not there: refused by name, unless they
are set to what they do anyway. Where nothing is said, values are Ollama's, but for `repeat_penalty`, which is off: here it looks at all
of prompt and answer, and not only at the last 64 tokens.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError, field_validator, model_validator

from slmops.serve.dialects.body import Body, StopText
from slmops.serve.sampling import Picking
from slmops.serve.scheduler import RequestError, check_length

HINTS = (
    "numa", "num_batch", "num_gpu", "main_gpu", "low_vram", "f16_kv", "use_mmap", "use_mlock", "num_thread", "num_keep",
)  # fmt: skip
"""Accepted, and without effect: who serves decides them. `num_keep` is about prompts that are cut, which none is."""


class Options(Body):
    """What is followed. Unknown names are errors."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    temperature: Annotated[float, Field(ge=0)] = 0.8
    top_k: int = 40
    top_p: Annotated[float, Field(ge=0, le=1)] = 0.9
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repeat_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = -1
    num_predict: Annotated[int, Field(ge=-2)] = -1
    num_ctx: Annotated[int, Field(ge=1)] | None = None
    stop: Annotated[list[StopText], Field(max_length=16)] = Field(default_factory=list)

    repeat_last_n: Annotated[int, Field(ge=-1)] | None = None
    penalize_newline: bool = True
    typical_p: Literal[1] = 1
    tfs_z: Literal[1] = 1
    mirostat: Literal[0] = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    logits_all: Literal[False] = False
    vocab_only: Literal[False] = False
    embedding_only: Literal[False] = False

    @field_validator("stop", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("typical_p", "tfs_z", "mirostat", mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        try:
            return int(float(value)) if float(value) == int(float(value)) else value
        except (TypeError, ValueError, OverflowError):
            return value

    @field_validator("logits_all", "vocab_only", "embedding_only", mode="before")
    @classmethod
    def _word(cls, value: Any) -> Any:
        return False if value == "false" else value

    @model_validator(mode="after")
    def _penalties_see_all(self) -> Options:
        penal = self.repeat_penalty != 1 or self.presence_penalty or self.frequency_penalty
        if penal and self.repeat_last_n not in (None, -1, 0):
            raise ValueError("repeat_last_n is -1 here: a penalty looks at all tokens")
        if penal and not self.penalize_newline:
            raise ValueError("penalize_newline is true here: a penalty is for all tokens")
        return self

    def picking(self, logprobs: int | None) -> Picking:
        """How tokens are picked."""
        off = self.repeat_last_n == 0
        return Picking(
            temperature=self.temperature,
            top_k=max(0, self.top_k),
            top_p=max(self.top_p, 1e-9),  # 0 leaves the most likely token alone
            min_p=self.min_p,
            repetition_penalty=1.0 if off else self.repeat_penalty,
            frequency_penalty=0.0 if off else self.frequency_penalty,
            presence_penalty=0.0 if off else self.presence_penalty,
            seed=None if self.seed < 0 else self.seed,
            logprobs=logprobs,
        )

    def most(self, prompt: list[int]) -> int | None:
        """New tokens at most for a prompt; None: as many as the model has room for.

        Raises:
            RequestError: `num_ctx` has no room for the prompt and an answer.
        """
        most = self.num_predict if self.num_predict > 0 else None
        if self.num_ctx is None:
            return most
        check_length(prompt, self.num_ctx)
        room = self.num_ctx - len(prompt)
        return room if most is None else min(most, room)


def options_of(*given: Mapping[str, Any]) -> Options:
    """Options of several places, the later ones first.

    Raises:
        RequestError: one is not known, cannot be had, or has a wrong value.
    """
    merged = {name: value for one in given for name, value in one.items() if value is not None}
    followed = {name: value for name, value in merged.items() if name not in HINTS}
    try:
        return Options.model_validate(followed)
    except ValidationError as failure:
        first = failure.errors(include_url=False, include_input=False)[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        if first["type"] == "extra_forbidden":
            close = difflib.get_close_matches(name, [*Options.model_fields, *HINTS], n=1)
            raise RequestError(
                f"the option {name} is not known", f"did you mean {close[0]}?" if close else ""
            ) from failure
        if first["type"] == "literal_error":
            asis = Options.model_fields[name].default
            raise RequestError(
                f"the option {name} is not served", f"leave it out, or at {str(asis).lower()}"
            ) from failure
        said = first["msg"].removeprefix("Value error, ")
        raise RequestError(f"the option {name}: {said}" if name else said) from failure


def normal(given: Mapping[str, Any]) -> dict[str, Any]:
    """Checked options as plain values, hints left out.

    Raises:
        RequestError: see `options_of`.
    """
    return options_of(given).model_dump(exclude_unset=True)


def lines(parameters: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Options as lines of a Modelfile, by name: name and value, one for each text of a list."""
    rows: list[tuple[str, str]] = []
    for name, value in sorted(parameters.items()):
        for one in value if isinstance(value, list) else [value]:
            rows.append((name, str(one).lower() if isinstance(one, bool) else str(one)))
    return rows
