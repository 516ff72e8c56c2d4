"""Method `evaluate.predict_endpoint`: a remote teacher answers the test split, told the task as when it labels.

Answers are cached by content like all paid answers, so that a restart never pays twice. A prompt without an answer is a
wrong answer, empty and unfinished.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field

from slmops.core.engine import Sampling
from slmops.core.method import Context, Declaration, Facts
from slmops.core.method import Params as BaseParams
from slmops.core.spec import ENDPOINT_NEUTRAL, Endpoint, NonNegative, Task

DECLARATION = Declaration(
    name="evaluate.predict_endpoint",
    version="1",
    makes="predictions",
    takes={"data": "dataset"},
    neutral=ENDPOINT_NEUTRAL,
)


class Params(BaseParams):
    """`max_examples` as in `evaluate.predict`; `guided`, `shots`: see there."""

    endpoint: Endpoint
    guided: Task | None = None
    max_new_tokens: Annotated[int, Field(ge=1)] = 64
    max_examples: Annotated[int, Field(ge=1)] | None = None
    shots: NonNegative = 8


def run(params: Params, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Facts:
    """Answer `inputs["data"]/test.jsonl` by the endpoint; rows as in `evaluate.predict`.

    Raises:
        EndpointError, BudgetError: see `slmops.engines.endpoint`; what was paid for is kept.
    """
    from slmops.engines.endpoint import EndpointTeacher
    from slmops.evaluate.predict import questions, read_test

    examples = read_test(inputs["data"], params.max_examples)
    asked, tidy = questions(inputs["data"], examples, params.guided, params.shots, ctx.seed)
    sampling = Sampling(params.endpoint.max_output_tokens, params.endpoint.temperature, seed=ctx.seed)
    teacher = EndpointTeacher(params.endpoint, ctx)
    try:
        replies = teacher.answers(asked, sampling)
        ledger = teacher.facts()
    finally:
        teacher.close()
    answered = 0
    with (out / "predictions.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        for example, reply in zip(examples, replies, strict=True):
            given = reply[0] if reply else None
            answered += given is not None
            row = {
                "id": example.id,
                "prompt": example.text,
                "gold": example.answer,
                "answer": tidy(given.text) if given else "",
                "finished": given.finished if given else False,
                "tokens": given.completion_tokens if given else 0,
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return {"examples": len(examples), "answered": answered, "teacher": ledger}
