"""The words that instruct models are asked with, and how their replies are read.

A teacher that was trained on the task gets the student's prompt as it is; these words are for teachers that were not:
what the task is, which answers there are, how to write new prompts, how to judge a pair. Pure.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Sequence

from slmops.core.example import Example
from slmops.core.spec import Task
from slmops.core.validity import AnswerRules, without_thinking

Messages = list[dict[str, str]]

_TASKS = {
    "classification": "Decide which label fits the user's message. Answer with that label alone, spelled as in the list.",
    "extraction": "Turn the user's message into one JSON object. Answer with the JSON alone, on one line, no code fence.",
    "chat": "Answer the user's message.",
    "question_answering": "Answer the question. Give the answer alone, as briefly as the examples do.",
    "summarisation": "Summarise the user's text. Give the summary alone.",
    "generation": "Write what the user asks for. Give the text alone.",
}

DIRECTIONS = (
    "Make it more specific: add a detail such as a place, a time, an amount or a name.",
    "Let the same wish be described by its symptom or situation instead of being named.",
    "Make it harder to understand at first glance, yet still unambiguous: indirect, with an aside.",
    "Write it as somebody in a hurry would: short, colloquial, maybe with a typing mistake.",
    "Write it as a polite person would who explains a little too much.",
    "Ask about a neighbouring situation that the original does not mention.",
)


def guided(example: Example, rules: AnswerRules, shots: Sequence[Example]) -> Messages:
    """A prompt for a teacher that does not know the task: the task, its labels and some answered examples before it."""
    task = rules.task
    parts = [task.instruction, _TASKS[task.type]]
    if rules.labels:
        parts.append("Labels:\n" + "\n".join(rules.labels))
        if task.out_of_scope is not None:
            parts.append(f"If none of the labels fits, answer {task.out_of_scope}.")
    if rules.shape is not None and rules.shape.functions:
        names = "\n".join(
            f"{key}: {', '.join(sorted(values))}" for key, values in sorted(rules.shape.functions.items())
        )
        parts.append(f"Allowed values:\n{names}")
    own = [m.content for m in example.prompt if m.role == "system" and m.content != task.instruction]
    messages = [{"role": "system", "content": "\n\n".join(part for part in (*parts, *own) if part)}]
    for shot in shots:
        messages += [m for m in shot.messages() if m["role"] != "system"]
    return messages + [m for m in example.prompt_messages() if m["role"] != "system"]


def paraphrase(text: str, count: int, task: Task) -> Messages:
    """Ask for `count` other wordings of a message."""
    return _writer(
        task,
        f"Write {count} other wordings of the message below, as other people would send it. Keep its meaning and every "
        f"fact in it; change words, order, length and tone.\n\nMessage:\n{text}",
    )


def evolve(text: str, direction: str, count: int, task: Task) -> Messages:
    """Ask for `count` messages derived from one, in a direction (in the manner of arXiv 2304.12244)."""
    return _writer(
        task,
        f"Derive {count} new messages from the one below. {direction} They must be such as the same service would "
        f"receive, and make sense alone.\n\nMessage:\n{text}",
    )


def seed(examples: Sequence[str], count: int, task: Task) -> Messages:
    """Ask for `count` new messages like some examples (in the manner of arXiv 2212.10560)."""
    listing = "\n".join(json.dumps(text, ensure_ascii=False) for text in examples)
    return _writer(
        task,
        f"Here are messages that a service received:\n{listing}\n\nWrite {count} new ones of the same kind. Do not "
        "repeat these; vary length, wording and what is asked.",
    )


def _writer(task: Task, request: str) -> Messages:
    about = f"The service: {task.instruction}\n\n" if task.instruction else ""
    system = (
        "You write realistic user messages for training a model. Reply with a JSON list of strings and nothing else."
    )
    return [{"role": "system", "content": system}, {"role": "user", "content": about + request}]


def read_list(text: str) -> list[str]:
    """The messages in a writer's reply: a JSON list, or else one per line, numbered or not."""
    text = without_thinking(text)
    start, end = text.find("["), text.rfind("]")
    if 0 <= start < end:
        try:
            value = json.loads(text[start : end + 1])
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, list):
            return [item.strip() for item in value if isinstance(item, str) and item.strip()]
    out = []
    for line in text.splitlines():
        line = re.sub(r"^\s*(?:[-*•]|\(?\d{1,3}[.):])\s+", "", line).strip().rstrip(",")
        if len(line) > 1 and line[0] == line[-1] == '"':
            line = line[1:-1].strip()
        if line and not line.startswith("```") and line not in "[]" and not line.endswith(":"):
            out.append(line)
    return out


def judge(example: Example, rules: AnswerRules) -> Messages:
    """Ask whether an answer belongs to its prompt."""
    task = rules.task
    labels = "\nThe possible labels are: " + ", ".join(rules.labels) if rules.labels else ""
    turns = "\n".join(f"{m.role}: {m.content}" for m in example.prompt if m.role != "system")
    return [
        {"role": "system", "content": "You check training data. Reply with yes or no and nothing else."},
        {
            "role": "user",
            "content": f"The task: {' '.join(part for part in (task.instruction, _TASKS[task.type]) if part)}{labels}\n\n"
            f"{turns}\n\nProposed answer: {example.answer}\n\nIs the message one that makes sense, and the answer right?",
        },
    ]


def read_verdict(text: str) -> bool | None:
    """True for yes, False for no, None where a reply is neither."""
    text = without_thinking(text)
    word = re.match(r"[\s*_\"'`]*(yes|no)\b", text, re.I)
    return None if word is None else word[1].lower() == "yes"


def pick_shots(gold: Sequence[Example], count: int, seed: int) -> list[Example]:
    """Gold examples to show: as many different answers as fit, drawn by the seed, always the same for all prompts."""
    rng = random.Random(seed)
    order = rng.sample(list(gold), len(gold))
    told: Counter[str] = Counter()
    ranked = []
    for place, example in enumerate(order):
        ranked.append((told[example.answer or ""], place, example))
        told[example.answer or ""] += 1
    return [example for _, _, example in sorted(ranked, key=lambda item: item[:2])[:count]]
