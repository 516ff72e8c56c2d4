"""Teachers seen alike: a remote endpoint or a model folder, both answer lists of messages.

Local answers are kept in the step's scratch folder part by part, remote ones in the shared store of paid answers, so
that a killed step goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

from slmops.core.digest import digest_json
from slmops.core.engine import Engine, Generation, Sampling
from slmops.core.method import Context
from slmops.core.spec import Endpoint
from slmops.engines.answers import Answer, Messages
from slmops.errors import ModelError, UsageError
from slmops.store.files import read_json, write_atomic

PART = 2048
"""Prompts that a local teacher answers between two saves."""


class Teacher(Protocol):
    """Answers prompts. `remote` teachers are told the task in words; close a teacher when done."""

    name: str
    remote: bool

    def answers(
        self, prompts: Sequence[Messages], sampling: Sampling, samples: int = 1, first: int = 0
    ) -> list[list[Answer | None]]:
        """`samples` answers for each prompt, in order; None where there is none.

        Args:
            first: number of the first sample; another number asks anew, the same one gives the same answer again.

        Raises:
            EndpointError, BudgetError: answers that came are kept; asking again asks only for the rest.
            ModelError: a local model fails.
        """

    def facts(self) -> dict[str, Any]:
        """What was asked and spent so far."""

    def close(self) -> None:
        """Free the model or the connection."""


class EngineTeacher:
    """A local model. Answers do not depend on where a killed step was cut.

    Args:
        scratch: where finished parts are kept, or None to keep nothing.
    """

    remote = False

    def __init__(self, engine: Engine, ctx: Context, *, scratch: Path | None = None) -> None:
        self.engine, self.name = engine, f"the teacher ({engine.name})"
        self._ctx, self._scratch = ctx, scratch
        self._asked = self._too_long = self._reused = 0

    def answers(
        self, prompts: Sequence[Messages], sampling: Sampling, samples: int = 1, first: int = 0
    ) -> list[list[Answer | None]]:
        """See `Teacher.answers`. A prompt that fills the context has no answer."""
        encoded = [self.engine.encode(messages) for messages in prompts]
        fits = [index for index, ids in enumerate(encoded) if len(ids) < self.engine.context_length]
        self._asked += samples * len(encoded)
        self._too_long += samples * (len(encoded) - len(fits))
        out: list[list[Answer | None]] = [[None] * samples for _ in prompts]
        self._ctx.progress.start(f"asking {self.name}", samples * len(fits), "answers")
        for sample in range(samples):
            generations = self.generate([encoded[index] for index in fits], sampling, first + sample)
            for index, g in zip(fits, generations, strict=True):
                out[index][sample] = Answer(g.text, g.finished, len(encoded[index]), len(g.tokens), g.logprob)
        self._ctx.progress.stop()
        return out

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, sample: int) -> list[Generation]:
        """One continuation per prompt (token ids), part by part; each part has a seed of its own."""
        done: list[Generation] = []
        for start in range(0, len(prompts), PART):
            part = [list(ids) for ids in prompts[start : start + PART]]
            own = replace(sampling, seed=part_seed(sampling.seed, sample, start))
            done.extend(self._part(part, own))
        return done

    def _part(self, part: list[list[int]], sampling: Sampling) -> list[Generation]:
        file = None
        if self._scratch is not None:
            key = digest_json([self.engine.name, part, asdict(sampling)])[7:39]
            file = self._scratch / f"answers-{key}.json"
            rows = read_json(file)
            if isinstance(rows, list) and len(rows) == len(part):
                self._reused += len(rows)
                self._ctx.progress.advance(len(rows))
                return [Generation(**{**row, "tokens": tuple(row["tokens"])}) for row in rows]
        generations = self.engine.generate(part, sampling, self._ctx.progress.advance)
        if len(generations) != len(part):
            raise ModelError(f"{self.name} gave {len(generations)} answers to {len(part)} prompts")
        if file is not None:
            write_atomic(file, json.dumps([asdict(g) for g in generations]).encode())
        return generations

    def facts(self) -> dict[str, Any]:
        """Prompts asked and prompts that did not fit the context."""
        return {"asked": self._asked, "too_long": self._too_long}

    def close(self) -> None:
        """Free the model."""
        self.engine.close()


def part_seed(seed: int, *path: int) -> int:
    """A seed below 2^31 for one part of the work, the same on every machine."""
    text = ":".join(str(number) for number in (seed, *path))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def open_teacher(inputs: Mapping[str, Path], endpoint: Endpoint | None, ctx: Context) -> Teacher:
    """The teacher of a step: the model folder `inputs["teacher"]`, or else the endpoint.

    Raises:
        UsageError: there is neither, or the endpoint's settings or key are missing.
        ModelError, MissingExtraError: the folder cannot be opened.
    """
    if "teacher" in inputs:
        from slmops.engines import open_engine

        return EngineTeacher(open_engine(inputs["teacher"], threads=ctx.threads), ctx, scratch=ctx.scratch)
    if endpoint is None:
        raise UsageError("this step needs a teacher", "add `teacher:` to the project file")
    from slmops.engines.endpoint import EndpointTeacher

    return EndpointTeacher(endpoint, ctx)
