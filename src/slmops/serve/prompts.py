"""Prompts by another template than the model's own: Jinja, or the common part of Go's templates."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from slmops.errors import ModelError
from slmops.serve.go_template import GoTemplate, is_go
from slmops.serve.model import Model
from slmops.serve.pool import Found
from slmops.serve.record import within
from slmops.serve.refusals import DeadlineError
from slmops.serve.scheduler import RequestError

Ids = TypeVar("Ids")
PATIENCE_S = 15.0
SHORT = 4000
"""Characters of a conversation that are cut into tokens at once: a thread would take longer."""
EACH = 10
"""Characters that a text of its own costs beside those that it has."""
LONGEST = 64 << 10
"""Characters of a template."""
AT_ONCE = asyncio.Semaphore(2)
"""So many templates of clients are run at a time: each is a process."""


async def written(
    found: Found, turns: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = (), template: str = ""
) -> list[int]:
    """Token ids of a conversation, ready for its answer, with what its definition puts before it.

    Args:
        tools: functions that the answer may call, as the model's own template takes them.
        template: another one than the definition's or the model's own.

    Raises:
        RequestError: a template cannot be read, fails, or has no place for a message.
        DeadlineError: the request's time is over.
    """
    model, definition = found.model, found.definition
    turns = definition.opened(turns) if definition else turns
    template = template or (definition.template if definition else "")
    try:
        if not template:
            if short(turns) and not tools:
                return model.encode(turns)
            return await asyncio.to_thread(model.encode, turns, tools)
        if tools:
            raise RequestError("another template than the model's own has no place for tools", "leave one of both out")
        text = await within(rendered(template, turns, model.tokenizer.marks))
        return await ids_of(text, lambda: plain(model, text))
    except (RequestError, DeadlineError):
        raise
    except ModelError as failure:  # the conversation is the client's to mend
        raise RequestError(failure.message) from failure


def short(turns: Sequence[dict[str, Any]]) -> bool:
    """Whether a conversation is cut into tokens at once. A call of a tool may hold anything."""
    if any(turn.get("tool_calls") for turn in turns):
        return False
    texts = (value for turn in turns for value in turn.values() if isinstance(value, str))
    return sum(len(text) + EACH for text in texts) < SHORT


async def ids_of(texts: str | Sequence[str], cut: Callable[[], Ids]) -> Ids:
    """What `cut` makes of these texts: at once where they are short, else in a thread, so that others are answered meanwhile."""
    size = len(texts) if isinstance(texts, str) else sum(len(text) + EACH for text in texts)
    return cut() if size < SHORT else await asyncio.to_thread(cut)


def plain(model: Model, text: str) -> list[int]:
    """Token ids of a text that is a whole prompt. The mark of a beginning stands there once, whether the text has it or not."""
    ids = model.tokenizer.ids(text)
    begin = model.tokenizer.marks.get("bos_token")
    twice = begin is not None and len(ids) > 1 and ids[0] == ids[1] == model.tokenizer.id_of(begin)
    return ids[1:] if twice else ids


async def rendered(template: str, messages: Sequence[dict[str, Any]], marks: Mapping[str, str]) -> str:
    """The text of a conversation in a client's template.

    Raises:
        RequestError: it cannot be read, fails, needs too much, or loses the last message.
    """
    if len(template) > LONGEST:
        raise RequestError(f"the template has {len(template)} characters, more than {LONGEST}", "shorten it")
    if is_go(template):
        return await asyncio.to_thread(lambda: GoTemplate(template).prompt(messages))
    line = json.dumps({"template": template, "messages": list(messages), "marks": dict(marks)}).encode() + b"\n"
    pipe = asyncio.subprocess.PIPE
    async with AT_ONCE:
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "slmops.serve.jinja_child", stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.DEVNULL
        )
        try:
            out, _ = await asyncio.wait_for(child.communicate(line), PATIENCE_S)
        except TimeoutError:
            out = b""
        finally:
            if child.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    child.kill()
                await child.wait()
    if not out:
        raise RequestError("the template does not come to an end in the time and memory that it may use", "simplify it")
    said = json.loads(out)
    if "wrong" in said:
        raise RequestError(said["wrong"], "mend the template")
    text = str(said["text"])
    if messages and str(messages[-1]["content"] or "").strip() not in text:
        raise RequestError("the template has no place for the user's words", "write a loop over messages")
    return text
