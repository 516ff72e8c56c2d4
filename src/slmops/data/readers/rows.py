"""Raw rows to examples: messages, alpaca, sharegpt, prompt and completion, preference pairs, or columns that the user maps.

Every row becomes an `Example` whose prompt has a user message that is not blank and does not end with the assistant. A
row without an answer is kept with `answer=None`; whether that is allowed is for the caller to say. A row of a format with
rejected answers is a whole pair: two different answers, neither blank. What is wrong comes as a `RowError`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

from slmops.core.example import Example, Message, Role
from slmops.core.spec import Columns
from slmops.data.readers.problems import did_you_mean
from slmops.data.readers.text import RawValue

Shape = Literal["messages", "alpaca", "sharegpt", "prompt_completion", "preference", "columns"]
SHAPES: tuple[Shape, ...] = get_args(Shape)

ROLE_NAMES: dict[str, Role] = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "function_call": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip
PROMPT_NAMES = ("prompt", "text", "question", "message", "utterance", "query", "input", "sentence", "document")
ANSWER_NAMES = ("answer", "label", "intent", "category", "completion", "output", "response", "target", "summary")


class RowError(ValueError):
    """What is wrong with one row, and how to mend it."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message, self.hint = message, hint


def detect(value: RawValue) -> Shape:
    """The shape of a file by its first row; `columns` where no known shape fits."""
    if isinstance(value, dict):
        if "chosen" in value:
            return "preference"
        if "messages" in value:
            return "messages"
        if "conversations" in value:
            return "sharegpt"
        if "instruction" in value and "output" in value:
            return "alpaca"
        if "prompt" in value and "completion" in value:
            return "prompt_completion"
        if "rejected" in value and not any(name.casefold() in ANSWER_NAMES for name in value):
            return "preference"
    return "columns"


def guess_columns(value: RawValue) -> Columns:
    """Columns with usual names, where exactly one could be the prompt and at most one the answer.

    Raises:
        RowError: it cannot be told.
    """
    if isinstance(value, list):
        raise RowError("the rows are lists", "say which position holds what: data.columns: {prompt: 0, answer: 1}")
    prompts = [name for name in value if name.casefold() in PROMPT_NAMES]
    answers = [name for name in value if name.casefold() in ANSWER_NAMES]
    if len(prompts) != 1 or len(answers) > 1:
        raise RowError(
            f"cannot tell which column holds the prompt and which the answer: {', '.join(value)}",
            "say so: data.columns: {prompt: NAME, answer: NAME}",
        )
    return Columns(prompt=prompts[0], answer=answers[0] if answers else None)


def parser(shape: Shape, columns: Columns) -> Callable[[RawValue], Example]:
    """What turns a raw row of this shape into an example (its source is left empty); it raises `RowError`."""
    if shape == "columns":
        return lambda value: _columns(value, columns)
    by_key: dict[Shape, Callable[[Mapping[str, Any]], Example]] = {
        "messages": _messages,
        "alpaca": _alpaca,
        "sharegpt": _sharegpt,
        "prompt_completion": _prompt_completion,
        "preference": _preference,
    }
    parse = by_key[shape]

    def from_dict(value: RawValue) -> Example:
        if not isinstance(value, dict):
            raise RowError("the row is a list, not an object", "set data.columns, or correct data.format")
        return parse(value)

    return from_dict


def as_text(value: Any, what: str) -> str:
    """A cell as text: numbers and booleans as JSON writes them, objects and lists as one line of JSON, null as ""."""
    if isinstance(value, str):
        text = value
    elif value is None:
        text = ""
    else:
        try:
            text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise RowError(f"{what} is a {type(value).__name__}, not text") from error
    if "\0" in text:
        raise RowError(f"{what} has a NUL character", "remove it")
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        raise RowError(f"{what} has half of a surrogate pair", "the text was cut or badly converted: correct it")
    return text


def build(messages: Sequence[Message], answer: str | None) -> Example:
    """An example of a prompt and its answer; blank system messages and blank answers count as not there.

    Raises:
        RowError: no user message, a blank one at the end, or a prompt that ends with the assistant.
    """
    prompt = tuple(m for m in messages if m.role != "system" or m.content.strip())
    users = [m for m in prompt if m.role == "user"]
    if not users or not users[-1].content.strip():
        raise RowError("the prompt is empty", "every row needs a user message with text")
    if any(m.role == "system" for m in prompt[1:]):
        raise RowError("a system message stands after other messages", "put it first")
    if prompt[-1].role == "assistant":
        raise RowError("the prompt ends with the assistant", "two answers follow each other: join them or drop one")
    if answer is None or not answer.strip():
        return Example(prompt, None, "none")
    return Example(prompt, answer, "gold")


def pair(example: Example, rejected: str) -> Example:
    """The example with a rejected answer beside its own.

    Raises:
        RowError: one of the two is blank, or they are the same.
    """
    hint = "a pair needs two different answers: complete the row or take it out"
    for answer, what in ((example.answer, "chosen"), (rejected, "rejected")):
        if answer is None or not answer.strip():
            raise RowError(f"the {what} answer is empty", hint)
    if rejected.strip() == (example.answer or "").strip():
        raise RowError("the chosen and the rejected answer are the same", hint)
    return replace(example, rejected=rejected)


def _need(row: Mapping[str, Any], key: str) -> Any:
    if key not in row:
        raise RowError(f"no {key!r} in this row", did_you_mean(key, row))
    return row[key]


def _message(role: Any, content: Any) -> Message:
    known = ROLE_NAMES.get(role) if isinstance(role, str) else None
    if known is None:
        raise RowError(f"unknown role {role!r}", did_you_mean(str(role), ROLE_NAMES))
    return Message(known, as_text(content, f"the {known} message"))


def _content(message: Mapping[str, Any]) -> Any:
    """A message's text: a string, a list of text parts, or its tool calls as JSON."""
    content = message.get("content")
    calls = message.get("tool_calls")
    if calls:
        if content:
            raise RowError("a message has both content and tool_calls", "keep one of them")
        flat = []
        for call in calls if isinstance(calls, list) else [calls]:
            inner = call.get("function", call) if isinstance(call, dict) else None
            if not isinstance(inner, dict) or "name" not in inner:
                raise RowError("a tool call has no name", 'write {"name": …, "arguments": {…}}')
            arguments = inner.get("arguments", {})
            if isinstance(arguments, str):
                try:
                    arguments = json.loads(arguments or "{}")
                except ValueError as error:
                    raise RowError(f"the arguments of a tool call are not JSON: {error}") from error
            flat.append({"name": inner["name"], "arguments": arguments})
        return flat[0] if len(flat) == 1 else flat
    if isinstance(content, list):
        texts = []
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text":
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise RowError(f"a message part of type {kind!r}", "only text is read")
            texts.append(as_text(part.get("text"), "a message part"))
        return "".join(texts)
    if "content" not in message:
        raise RowError("a message has no 'content'", did_you_mean("content", message))
    return content


def _turns(value: Any, what: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise RowError(f"{what!r} is not a list of messages", 'write [{"role": "user", "content": "…"}, …]')
    out = []
    for message in value:
        if not isinstance(message, dict):
            raise RowError("a message is not an object", 'write {"role": "user", "content": "…"}')
        out.append(_message(_need(message, "role"), _content(message)))
    return out


def _split(turns: list[Message]) -> Example:
    if turns[-1].role == "assistant":
        return build(turns[:-1], turns[-1].content) if len(turns) > 1 else build((), None)
    return build(turns, None)


def _messages(row: Mapping[str, Any]) -> Example:
    turns = _turns(_need(row, "messages"), "messages")
    if row.get("tools"):
        raise RowError("'tools' beside the messages is not read", "write the tools into the system message")
    return _split(turns)


def _sharegpt(row: Mapping[str, Any]) -> Example:
    return _split(_conversation(row))


def _conversation(row: Mapping[str, Any]) -> list[Message]:
    """The turns of a sharegpt row, its system message first."""
    value = _need(row, "conversations")
    if not isinstance(value, list) or not value:
        raise RowError("'conversations' is not a list of turns", 'write [{"from": "human", "value": "…"}, …]')
    turns = [Message("system", as_text(row["system"], "the system message"))] if row.get("system") else []
    for turn in value:
        if not isinstance(turn, dict):
            raise RowError("a turn is not an object", 'write {"from": "human", "value": "…"}')
        turns.append(_message(_need(turn, "from"), _need(turn, "value")))
    return turns


def _alpaca(row: Mapping[str, Any]) -> Example:
    return build(_instruction(row), as_text(_need(row, "output"), "'output'"))


def _instruction(row: Mapping[str, Any]) -> list[Message]:
    """The prompt of an alpaca row."""
    instruction = as_text(_need(row, "instruction"), "'instruction'")
    given = as_text(row.get("input"), "'input'")
    turns = [Message("system", as_text(row["system"], "'system'"))] if row.get("system") else []
    for pair in row.get("history") or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError("'history' is not a list of [question, answer]")
        turns += [_message("user", pair[0]), _message("assistant", pair[1])]
    text = "\n\n".join(part for part in (instruction, given) if part.strip())
    return [*turns, Message("user", text)]


def _prompt_completion(row: Mapping[str, Any]) -> Example:
    prompt, completion = _need(row, "prompt"), _need(row, "completion")
    turns = _turns(prompt, "prompt") if isinstance(prompt, list) else [Message("user", as_text(prompt, "'prompt'"))]
    if isinstance(completion, list):
        answers = _turns(completion, "completion")
        return _split([*turns, *answers])
    return build(turns, as_text(completion, "'completion'"))


def _preference(row: Mapping[str, Any]) -> Example:
    """A chosen and a rejected answer: texts, messages, or whole conversations, which then hold the prompt."""
    if row.get("tools"):
        raise RowError("'tools' beside the messages is not read", "write the tools into the system message")
    chosen, rejected = (_side(_need(row, key), key) for key in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise RowError(
            "chosen and rejected differ before their last message", "only the last answer may differ: cut both there"
        )
    turns = _prompt(row, chosen[:-1])
    if row.get("system") and turns and turns[0].role != "system":
        turns = [Message("system", as_text(row["system"], "the system message")), *turns]
    return pair(build(turns, chosen[-1].content), rejected[-1].content)


def _side(value: Any, what: str) -> list[Message]:
    """The messages of one answer, the last of them the assistant's."""
    if isinstance(value, dict) and ("role" in value or "from" in value):
        value = [value]
    if not isinstance(value, list):
        return [Message("assistant", as_text(value, repr(what)))]
    turns = []
    for turn in value:
        if isinstance(turn, dict) and "from" in turn:
            turns.append(_message(turn["from"], _need(turn, "value")))
        else:
            turns += _turns([turn], what)
    if not turns or turns[-1].role != "assistant":
        raise RowError(f"{what!r} does not end with the assistant", "the last message must be the answer")
    return turns


def _prompt(row: Mapping[str, Any], head: list[Message]) -> list[Message]:
    """The messages before the answers of a pair, from the row's own prompt and what both answers begin with."""
    if "conversations" in row:
        given = _conversation(row)
    elif "instruction" in row and "prompt" not in row:
        given = _instruction(row)
    else:
        names = [name for name in row if name.casefold() in PROMPT_NAMES]
        name = "prompt" if "prompt" in names else names[0] if len(names) == 1 else None
        value = row[name] if name is not None else None
        if isinstance(value, list) and value:
            given = _turns(value, str(name))
        else:
            given = [Message("user", as_text(value, repr(name)))] if value else []
    if not given and not head:
        raise RowError(
            "the pair has no prompt",
            "add 'prompt', give chosen and rejected as whole conversations, or set data.columns: {prompt: NAME, …}",
        )
    if not head or not given:
        return head or given
    asked = {m.content.strip() for m in head if m.role == "user"}
    if head[: len(given)] == given or (given[-1].role == "user" and given[-1].content.strip() in asked):
        return head
    if head[0].role not in ("assistant", "tool"):
        raise RowError("chosen and rejected do not begin with the prompt", "leave the prompt out, or correct it")
    return [*given, *head]


def _columns(row: RawValue, columns: Columns) -> Example:
    def cell(which: str | int | None, what: str) -> str:
        if which is None:
            return ""
        if isinstance(which, int):
            cells = row if isinstance(row, list) else list(row.values())
            if not -len(cells) <= which < len(cells):
                raise RowError(f"no column {which} ({what}): the row has {len(cells)}", "positions count from 0")
            return as_text(cells[which], f"column {which}")
        if isinstance(row, list):
            raise RowError(
                f"column {which!r} is a name, but the rows are lists", "give positions: prompt: 0, answer: 1"
            )
        return as_text(row.get(which), f"column {which!r}")  # a name that no row has was refused before

    prompt = cell(columns.prompt, "prompt")
    if not prompt.strip():
        raise RowError("the prompt is empty", "every row needs a prompt")
    context = cell(columns.context, "context")
    system = cell(columns.system, "system")
    turns = [Message("system", system), Message("user", f"{context}\n\n{prompt}" if context.strip() else prompt)]
    example = build(turns, cell(columns.answer, "answer"))
    return example if columns.rejected is None else pair(example, cell(columns.rejected, "rejected"))
