"""`data.answer`: the teacher answers prompts that have no label.

Promises: reads the student's side of the data set alone (gold, pool, generated prompts), never validation or test; the
student's gold examples keep their gold answers and are not asked; with several votes per prompt the most frequent
answer wins (self-consistency, arXiv 2203.11171) and its share is kept beside it. With `parts` it answers one run of the
prompts: all parts together, in their order, are the whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from slmops.core.engine import Sampling
from slmops.core.example import Example
from slmops.core.method import Context, Declaration, Facts
from slmops.core.method import Params as BaseParams
from slmops.core.spec import ENDPOINT_NEUTRAL, Endpoint, NonNegative, Positive, Task
from slmops.errors import DataError

if TYPE_CHECKING:
    from slmops.core.validity import AnswerRules
    from slmops.data.teacher import Teacher
    from slmops.engines.answers import Answer

DECLARATION = Declaration(
    name="data.answer",
    version="1",
    makes="dataset",
    takes={"data": "dataset", "prompts?": "dataset", "teacher?": "model"},
    threads=True,
    neutral=ENDPOINT_NEUTRAL,
)


class Params(BaseParams):
    """Which prompts are answered and how often. `endpoint` is the teacher where there is no `teacher` input."""

    label_pool: bool = True
    votes: Positive = 1
    vote_temperature: Annotated[float, Field(gt=0)] = 0.7
    max_new_tokens: Positive = 64
    task: Task
    endpoint: Endpoint | None = None
    guided: bool | None = Field(
        None, description="tell the teacher the task in words; default: endpoints only, as they were not trained on it"
    )
    shots: NonNegative = Field(8, description="gold examples shown to a teacher that is told the task")
    part: NonNegative = Field(0, description="which part of the prompts, from 0")
    parts: Positive = 1


def run(params: Params, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Facts:
    """Write answers.jsonl: examples with the teacher's answer, `finished` and `agreement`; with votes also votes.jsonl.

    Raises:
        DataError: the teacher answered nothing although it was asked.
        EndpointError, BudgetError: see `slmops.engines.endpoint`; what was paid for is kept.
    """
    from slmops.data.teacher import open_teacher
    from slmops.store.rows import read_examples, write_rows

    data = inputs["data"]
    gold = read_examples(data / "gold.jsonl")
    asked = read_examples(data / "pool.jsonl") if params.label_pool else []
    if "prompts" in inputs:
        asked += read_examples(inputs["prompts"] / "prompts.jsonl")
    has_gold = {example.id for example in gold}
    unique: dict[str, Example] = {}
    for example in asked:
        if example.id not in has_gold:
            unique.setdefault(example.id, example.unanswered())
    prompts = list(unique.values())
    prompts = prompts[len(prompts) * params.part // params.parts : len(prompts) * (params.part + 1) // params.parts]
    rows: list[dict[str, Any]] = []
    votes: list[dict[str, Any]] = []
    facts: Facts = {"asked": len(prompts)}
    if prompts:
        rules = load_rules(params.task, data)
        teacher = open_teacher(inputs, params.endpoint, ctx)
        try:
            replies = _ask(teacher, params, prompts, gold, rules, ctx)
            facts["teacher"] = teacher.facts()
        finally:
            teacher.close()
        tidy = _guided(params, teacher)
        for example, answers in zip(prompts, replies, strict=True):
            decided = decide(answers, rules, tidy=tidy)
            if decided is None:
                continue
            text, finished, agreement, counts = decided
            rows.append(example.answered(text, "teacher").to_json() | {"finished": finished, "agreement": agreement})
            if params.votes > 1:
                votes.append({"id": example.id, "agreement": agreement, "answers": counts})
        if not rows:
            raise DataError(f"the teacher answered none of {len(prompts)} prompts", "do they fit into its context?")
    write_rows(out / "answers.jsonl", rows)
    if params.votes > 1:
        write_rows(out / "votes.jsonl", votes)
    missing = len(prompts) - len(rows)
    if missing:
        ctx.progress.log(f"{missing} of {len(prompts)} prompts have no answer")
    mean = sum(row["agreement"] for row in rows) / len(rows) if rows else None
    return facts | {"answered": len(rows), "missing": missing, "agreement": mean}


def load_rules(task: Task, data: Path) -> AnswerRules:
    """What a valid answer is, from the data set's labels and training answers."""
    from slmops.core.validity import AnswerRules
    from slmops.store.files import read_json
    from slmops.store.rows import labels_of, read_examples

    answers = [
        e.answer for name in ("gold", "teacher") for e in read_examples(data / f"{name}.jsonl") if e.answer is not None
    ]
    return AnswerRules.of(task, labels_of(read_json(data / "info.json") or {}), answers)


def decide(
    answers: Sequence[Answer | None], rules: AnswerRules, *, tidy: bool
) -> tuple[str, bool, float, list[dict[str, Any]]] | None:
    """The winning answer of the votes: text, finished, agreement (share of the votes that came), and all counts.

    A finished answer is preferred to a cut one; the first wins a tie. None if no vote came.
    """
    came = [answer for answer in answers if answer is not None]
    pool = [answer for answer in came if answer.finished] or came
    if not pool:
        return None
    texts = [rules.tidy(answer.text) if tidy else answer.text.strip() for answer in pool]
    keys = [rules.vote_key(text) for text in texts]
    counts = Counter(keys)
    winner = max(counts, key=lambda key: counts[key])  # the first of the most frequent: Counter keeps the order
    first = keys.index(winner)
    listing = [{"text": texts[keys.index(key)], "count": count} for key, count in counts.most_common()]
    return texts[first], pool[first].finished, round(counts[winner] / len(came), 6), listing


def _guided(params: Params, teacher: Teacher) -> bool:
    return teacher.remote if params.guided is None else params.guided


def _ask(
    teacher: Teacher, params: Params, prompts: list[Example], gold: list[Example], rules: AnswerRules, ctx: Context
) -> list[list[Answer | None]]:
    from slmops.core import prompting

    messages = [example.prompt_messages() for example in prompts]
    if _guided(params, teacher):
        shots = prompting.pick_shots(gold, params.shots, ctx.seed)
        messages = [prompting.guided(example, rules, shots) for example in prompts]
    greedy = params.endpoint.temperature if teacher.remote and params.endpoint else 0.0
    limit = params.endpoint.max_output_tokens if teacher.remote and params.endpoint else params.max_new_tokens
    sampling = Sampling(limit, params.vote_temperature if params.votes > 1 else greedy, seed=ctx.seed)
    return teacher.answers(messages, sampling, params.votes)
