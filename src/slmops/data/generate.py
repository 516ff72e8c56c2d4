"""`data.generate`: new prompts, for when the data is short.

Promises: prompts are distinct from each other and from those the data set has, as many as asked for unless the source
runs dry (`stats.json` says so); nothing of the validation and test data is read; the same seed and the same teacher's
answers give the same bytes. With `parts` it writes one part of the prompts and some more, from a seed of its own;
`data.join_prompts` makes one set of all parts.
"""

from __future__ import annotations

import json
import math
import random
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops.core.engine import Sampling
from slmops.core.example import Example, Message
from slmops.core.method import Context, Declaration, Facts
from slmops.core.method import Params as BaseParams
from slmops.core.spec import ENDPOINT_NEUTRAL, Endpoint, Generate, NonNegative, Positive, Task
from slmops.errors import DataError, ModelError, UsageError

if TYPE_CHECKING:
    from slmops.data.teacher import EngineTeacher, Teacher
    from slmops.engines.answers import Messages

DECLARATION = Declaration(
    name="data.generate",
    version="1",
    makes="dataset",
    takes={"data": "dataset", "teacher?": "model"},
    threads=True,
    neutral=ENDPOINT_NEUTRAL,
)

PER_REQUEST = 5
"""New prompts that one request to an instruct model asks for."""
SHOWN = 6
"""Examples that a `seed` request shows."""
STALL_ROUNDS = 3
"""Rounds in a row that bring (almost) nothing new, after which the source counts as dry."""
STALL_SHARE = 0.02
SPARE = 0.15
"""Share of prompts that a part writes beyond its own: some are in another part too."""
_PROBES = ("qa", "7e", "Жo", "好u")


class Params(BaseParams):
    """What to generate; `endpoint` is the teacher where there is no `teacher` input; `part`: which of `parts`, from 0."""

    generate: Generate
    task: Task
    endpoint: Endpoint | None = None
    part: NonNegative = 0
    parts: Positive = 1


def run(params: Params, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Facts:
    """Write prompts.jsonl (examples without answers, `source` is the method) and stats.json.

    Raises:
        UsageError: the method does not fit the teacher, or templates and slots do not fit each other.
        DataError: there is nothing to start from, or not one usable prompt came.
        EndpointError, BudgetError: see `slmops.engines.endpoint`; what was paid for is kept.
    """
    from slmops.data.teacher import open_teacher, part_seed
    from slmops.store.rows import read_examples, write_json, write_rows

    if params.parts > 1:
        count = math.ceil(params.generate.count * (1 + SPARE) / params.parts)
        params = params.model_copy(update={"generate": params.generate.model_copy(update={"count": count})})
        ctx = replace(ctx, seed=part_seed(ctx.seed, params.part))
    generate = params.generate
    known = [*read_examples(inputs["data"] / "gold.jsonl"), *read_examples(inputs["data"] / "pool.jsonl")]
    collected = Collected(generate, params.task, known)
    if generate.method == "template":
        collected.take(Example((Message("user", text),)) for text in _fill(generate, ctx.seed))
        facts: dict[str, Any] = {}
    else:
        if generate.method == "sample" and "teacher" not in inputs:
            raise UsageError("an endpoint cannot write user turns from nothing", "use `method: seed` or `paraphrase`")
        if generate.method != "sample" and not known:
            raise DataError(
                f"`{generate.method}` needs prompts to start from, and the student has none",
                "give some gold examples (data.gold), or use `sample` or `template`",
            )
        teacher = open_teacher(inputs, params.endpoint, ctx)
        try:
            if generate.method == "sample":
                _sample(teacher, collected, params, ctx)  # type: ignore[arg-type]
            else:
                _rewrite(teacher, collected, params, known, ctx)
            facts = {"teacher": teacher.facts()}
        finally:
            teacher.close()
    stats = collected.stats()
    if not collected.kept:
        raise DataError(
            f"not one usable prompt came from `{generate.method}` in {stats['asked']} tries "
            f"({', '.join(f'{count} {reason}' for reason, count in stats['dropped'].items() if count) or 'no replies'})",
            "a teacher that is to be sampled has to learn prompts too (teacher.train.prompt_weight); templates need slots",
        )
    if stats["kept"] < generate.count:
        ctx.progress.log(f"{stats['kept']} of {generate.count} prompts: the source ran dry")
    write_rows(out / "prompts.jsonl", (example.to_json() for example in collected.kept))
    write_json(out / "stats.json", stats)
    return {key: stats[key] for key in ("asked", "kept", "stalled")} | facts


class Collected:
    """Prompts so far: distinct, none that the data set has."""

    def __init__(self, generate: Generate, task: Task, known: Sequence[Example]) -> None:
        from slmops.data.overlap import normalise

        self._normal = normalise
        self.generate, self.task = generate, task
        self.kept: list[Example] = []
        self.dropped = {"unfinished": 0, "empty": 0, "repeated": 0, "in_data": 0}
        self.candidates = self.rounds = self._dry = 0
        self._known = {self._form(example) for example in known}
        self._seen: set[str] = set()

    @property
    def missing(self) -> int:
        """How many are still wanted."""
        return self.generate.count - len(self.kept)

    @property
    def dry(self) -> bool:
        """Whether the last rounds brought nothing new."""
        return self._dry >= STALL_ROUNDS

    def take(self, candidates: Iterator[Example | None]) -> None:
        """One round. None stands for a prompt that was cut; candidates past the wanted number are not looked at."""
        before, looked = len(self.kept), 0
        for example in candidates:
            if self.missing <= 0:
                break
            looked += 1
            self._one(example)
        self.rounds += 1
        self.candidates += looked
        self._dry = self._dry + 1 if len(self.kept) - before <= STALL_SHARE * looked else 0

    def _one(self, example: Example | None) -> None:
        form = self._form(example) if example is not None and self._normal(example.text) else ""
        if example is None:
            self.dropped["unfinished"] += 1
        elif not form:
            self.dropped["empty"] += 1
        elif form in self._seen:
            self.dropped["repeated"] += 1
        elif form in self._known:
            self.dropped["in_data"] += 1
        else:
            self._seen.add(form)
            if self.task.instruction and example.prompt[0].role != "system":
                example = replace(example, prompt=(Message("system", self.task.instruction), *example.prompt))
            self.kept.append(replace(example, source=self.generate.method))

    def _form(self, example: Example) -> str:
        """What two prompts are compared by: the conversation in normal form, and a system message of its own."""
        own = [m.content for m in example.prompt if m.role == "system" and m.content != self.task.instruction]
        talk = self._normal("\n".join(m.content for m in example.prompt if m.role != "system"))
        return "\n".join([*own, talk])

    def stats(self) -> dict[str, Any]:
        """What stats.json says."""
        return {
            "method": self.generate.method,
            "wanted": self.generate.count,
            "kept": len(self.kept),
            "asked": self.candidates,
            "rounds": self.rounds,
            "stalled": self.missing > 0,
            "dropped": self.dropped,
            "examples": [example.text for example in self.kept[:5]],
        }


# --- sample: a local teacher writes user turns -----------------------------------------------------------------------


def user_turn(teacher: EngineTeacher, instruction: str) -> tuple[list[int], int | None]:
    """Token ids from the start of a prompt up to where the user's words begin, and the token that ends such a turn.

    Found by rendering messages that differ only in the user's words: what all renderings begin with is the one, what
    follows the words in all of them begins with the other. No template is parsed, and where a tokenizer joins the
    space before the words to them, that space is rightly left to the teacher.

    Raises:
        ModelError: the rendering depends on the words in a way that leaves no beginning.
    """
    system = [{"role": "system", "content": instruction}] if instruction else []
    rendered = [teacher.engine.encode([*system, {"role": "user", "content": probe}]) for probe in _PROBES]
    prefix = _common(rendered)
    if not prefix:
        raise ModelError(f"{teacher.name} has a chat template without a beginning of the user's turn", "use `seed`")
    rests = [ids[len(prefix) :] for ids in rendered]
    ending = _common([rest[::-1] for rest in rests])[::-1]
    return prefix, ending[0] if ending else None


def _common(rows: Sequence[Sequence[int]]) -> list[int]:
    """The longest beginning that all rows share."""
    out: list[int] = []
    for column in zip(*rows, strict=False):
        if len(set(column)) > 1:
            break
        out.append(column[0])
    return out


def _sample(teacher: EngineTeacher, collected: Collected, params: Params, ctx: Context) -> None:
    generate = params.generate
    prefix, end = user_turn(teacher, params.task.instruction)
    sampling = Sampling(generate.max_new_tokens, generate.temperature, generate.top_p, seed=ctx.seed)
    ctx.progress.start(f"sampling messages from {teacher.name}", unit="messages")
    while collected.missing > 0 and not collected.dry:
        wave = max(64, math.ceil(collected.missing * 1.15))
        rate = len(collected.kept) / collected.candidates if collected.candidates else 1.0
        wave = min(8192, math.ceil(wave / max(0.1, rate)))
        generations = teacher.generate([prefix] * wave, sampling, collected.rounds)
        collected.take(iter([_turn(teacher, g.tokens, g.text, g.finished, end) for g in generations]))
    ctx.progress.stop()


def _turn(teacher: EngineTeacher, tokens: Sequence[int], text: str, finished: bool, end: int | None) -> Example | None:
    """The user's words in what a teacher wrote: up to the end of the turn. None if that never came."""
    if end is not None and end in tokens:
        text = teacher.engine.decode(tokens[: list(tokens).index(end)])
    elif not finished:
        return None
    return Example((Message("user", text.strip()),))


# --- paraphrase, evolve, seed: an instruct model writes --------------------------------------------------------------


def _rewrite(teacher: Teacher, collected: Collected, params: Params, known: list[Example], ctx: Context) -> None:
    from slmops.core.prompting import read_list

    generate = params.generate
    limit = max(generate.max_new_tokens * PER_REQUEST, params.endpoint.max_output_tokens if params.endpoint else 0)
    sampling = Sampling(limit, generate.temperature, generate.top_p, seed=ctx.seed)
    rng = random.Random(ctx.seed)
    while collected.missing > 0 and not collected.dry:
        requests = math.ceil(collected.missing * 1.15 / PER_REQUEST)
        asked = _requests(params, known, rng, min(requests, 2048))
        replies = teacher.answers([messages for messages, _ in asked], sampling, first=collected.rounds)
        found: list[Example | None] = []
        for (_, source), (reply,) in zip(asked, replies, strict=True):
            texts = read_list(reply.text) if reply is not None else []
            if reply is not None and not reply.finished and texts:
                texts, found = texts[:-1], [*found, None]  # the last one was cut
            found.extend(_with_text(source, text) for text in texts)
        collected.take(iter(found))


def _requests(
    params: Params, known: list[Example], rng: random.Random, count: int
) -> list[tuple[Messages, Example | None]]:
    """Distinct requests of one round, each with the example whose last message it rewrites."""
    from slmops.core import prompting

    task, out, told = params.task, [], set()
    order = rng.sample(range(len(known)), len(known))
    groups: dict[str, list[Example]] = {}
    for example in known:
        groups.setdefault(example.answer or "" if task.type == "classification" else "", []).append(example)
    names = sorted(groups)
    rng.shuffle(names)
    for turn in range(4 * count):
        source: Example | None = known[order[turn % len(order)]]
        assert source is not None
        if params.generate.method == "paraphrase":
            messages = prompting.paraphrase(source.text, PER_REQUEST, task)
        elif params.generate.method == "evolve":
            messages = prompting.evolve(source.text, rng.choice(prompting.DIRECTIONS), PER_REQUEST, task)
        else:
            group = groups[names[turn % len(names)]]
            shown = [example.text for example in rng.sample(group, min(SHOWN, len(group)))]
            messages, source = prompting.seed(shown, PER_REQUEST, task), None
        key = json.dumps(messages)
        if key not in told:
            told.add(key)
            out.append((messages, source))
            if len(out) == count:
                break
    return out


def _with_text(source: Example | None, text: str) -> Example:
    """The source's conversation with other last words of the user, or a conversation of these words alone."""
    return Example((Message("user", text),)) if source is None else Example(source.with_text(text).prompt)


# --- template: slots are filled, no model ----------------------------------------------------------------------------


def _fill(generate: Generate, seed: int) -> Iterator[str]:
    """Every filling of every template in an order drawn by the seed, without repeating one.

    Raises:
        UsageError: a template names a slot that is not given, a slot is empty or used by no template.
    """
    fields = [_slots(template) for template in generate.templates]
    used = {name for names in fields for name in names}
    if not generate.templates:
        raise UsageError("`method: template` needs templates", "give synthesize.generate.templates")
    for name in sorted(used):
        if not generate.slots.get(name):
            raise UsageError(
                f"a template uses {{{name}}}, which has no values", f"give synthesize.generate.slots.{name}"
            )
    for name in sorted(set(generate.slots) - used):
        raise UsageError(f"the slot {name} is used by no template", f"write {{{name}}} in a template or take it out")
    rng = random.Random(seed)
    sizes = [math.prod(len(generate.slots[name]) for name in names) for names in fields]
    # Each template is walked in a full cycle of its fillings: x -> x + step (mod size) with step prime to size.
    starts = [rng.randrange(size) for size in sizes]
    steps = [_coprime(rng, size) for size in sizes]
    for turn in range(max(sizes)):
        for index in rng.sample(range(len(sizes)), len(sizes)):
            if turn < sizes[index]:
                place = (starts[index] + turn * steps[index]) % sizes[index]
                yield _filled(generate, index, fields[index], place)


def _slots(template: str) -> list[str]:
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise UsageError(f"the template {template!r} cannot be read ({error})", "write a brace as {{ or }}") from error
    for name in names:
        if not name.isidentifier():
            raise UsageError(f"the template {template!r} has a slot without a name", "write a brace as {{ or }}")
    return list(dict.fromkeys(names))


def _coprime(rng: random.Random, size: int) -> int:
    if size <= 2:
        return 1
    while math.gcd(step := rng.randrange(1, size), size) != 1:
        pass
    return step


def _filled(generate: Generate, index: int, names: Sequence[str], place: int) -> str:
    values = {}
    for name in names:
        choices = generate.slots[name]
        place, chosen = divmod(place, len(choices))
        values[name] = choices[chosen]
    return generate.templates[index].format(**values)
