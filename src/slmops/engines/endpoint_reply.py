"""What an HTTP reply of a chat/completions endpoint means: an answer, or a failure with one clear name. Pure.

Every way in which an endpoint can fail has a kind, a detail for people, and two facts that decide what happens next:
whether trying again can help, and whether it is about this one prompt or about the endpoint as a whole.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from typing import Any

from slmops.engines.answer_store import StoredAnswer

DETAIL = 300
"""Characters of an endpoint's own words that are shown."""


@dataclass(frozen=True)
class Failure:
    """One try that brought no answer.

    Attributes:
        kind: short name, the same for all failures of a sort; they are counted by it.
        detail: what the endpoint or the network said, without keys.
        retry: whether the same request may succeed later.
        prompt: the failure is about this prompt; False: about the endpoint.
        fatal: no other request can succeed either: stop at once.
        settings: the endpoint dislikes how it is asked; fatal as long as it has answered nothing.
        hint: what the user can do.
        tries: at most this many tries for failures of this kind (None: as many as the spec allows).
        usage: prompt and completion tokens that the endpoint counted although there is no answer.
        billed: the endpoint may have charged for this try without telling how much.
    """

    kind: str
    detail: str = ""
    retry: bool = False
    prompt: bool = False
    fatal: bool = False
    settings: bool = False
    hint: str = ""
    tries: int | None = None
    usage: tuple[int, int] | None = None
    billed: bool = False

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}" if self.detail else self.kind


@dataclass(frozen=True)
class Success:
    """One answer. `usage` is None where the endpoint counted no tokens."""

    answer: StoredAnswer
    usage: tuple[int, int] | None


_KEY = "check the key in the environment variable that teacher.endpoint.api_key_env names"
_STATUS: dict[int, tuple[str, str]] = {
    401: ("the key was refused", _KEY),
    403: ("access was refused", _KEY + " and that it may use this model"),
    404: ("not found", "check teacher.endpoint.url (it usually ends in /v1) and teacher.endpoint.model"),
    405: ("method not allowed", "check teacher.endpoint.url: it is the base URL, usually ending in /v1"),
    402: ("payment required", "the account has no credit left: top it up, then run the same command again"),
    410: ("gone", "the model or the API version was retired: check teacher.endpoint"),
}
_ABOUT_PROMPT = (
    "content_filter",
    "content_policy",
    "responsibleai",
    "context_length",
    "too long",
    "too large",
    "context window",
)
_RETRY_STATUS = (408, 409, 425, 429)


def read_reply(status: int, content_type: str, body: bytes) -> Success | Failure:
    """The meaning of a complete reply."""
    if status == 200:
        return _read_success(content_type, body)
    if 200 < status < 300:
        return Failure(f"HTTP {status} without an answer", snippet(body), retry=True)
    if 300 <= status < 400:
        hint = "redirects are not followed (they could carry the key elsewhere): give the final URL"
        return Failure(f"HTTP {status} (redirect)", snippet(body), fatal=True, hint=hint)
    return _read_error(status, body)


def _read_error(status: int, body: bytes) -> Failure:
    value = _json(body)
    said = error_text(value) or snippet(body)
    code = _error_code(value)
    if status == 429 and "insufficient_quota" in code:
        return Failure("HTTP 429 (no quota left)", said, fatal=True, hint=_STATUS[402][1])
    if status in _RETRY_STATUS or status >= 500:
        name = {429: " (rate limit)", 408: " (the endpoint timed out)", 503: " (overloaded or starting)"}.get(
            status, ""
        )
        hint = "lower teacher.endpoint.concurrency" if status == 429 else "the endpoint is in trouble; try again later"
        return Failure(f"HTTP {status}{name}", said, retry=True, hint=hint)
    if status in _STATUS:
        name, hint = _STATUS[status]
        pull = re.search(r"try pulling|ollama", said, re.I)
        if status == 404 and pull:
            hint = "pull the model on that machine (`ollama pull …`), or check teacher.endpoint.model"
        return Failure(f"HTTP {status} ({name})", said, fatal=True, hint=hint)
    about = f"{code} {said}".lower()
    if status == 413 or any(word in about for word in _ABOUT_PROMPT):
        return Failure(
            f"HTTP {status} (this prompt was refused)", said, prompt=True, hint="look at the prompts it refuses"
        )
    hint = "check teacher.endpoint.model, temperature and max_output_tokens against what this endpoint takes"
    if "temperature" in about:
        hint = "this model takes no other temperature: set teacher.endpoint.temperature to the one it names"
    return Failure(f"HTTP {status} (the request was refused)", said, prompt=True, settings=True, hint=hint)


def wants_completion_limit(failure: Failure) -> bool:
    """Whether an endpoint refuses `max_tokens` and names `max_completion_tokens`, as newer models do."""
    return failure.settings and "max_completion_tokens" in failure.detail


def _read_success(content_type: str, body: bytes) -> Success | Failure:
    value = _json(body)
    if value is None:
        start = body.lstrip()[:200].lower()
        if start.startswith(b"<") or "html" in content_type:
            hint = "this looks like a web page, not an API: check teacher.endpoint.url and any proxy between"
            return Failure("an HTML page instead of an answer", snippet(body), retry=True, hint=hint)
        if "event-stream" in content_type or start.startswith(b"data:"):
            return Failure("a stream although none was asked for", snippet(body), retry=True, billed=True)
        if not start:
            return Failure("an empty reply", retry=True)
        return Failure("a reply that is not JSON", snippet(body), retry=True, billed=True)
    if not isinstance(value, dict):
        return Failure("a reply that is not a JSON object", snippet(body), retry=True, billed=True)
    if value.get("error"):
        return Failure("an error in a reply of status 200", error_text(value) or snippet(body), retry=True)
    usage = _usage(value)
    choices = value.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return Failure("a reply without choices", snippet(body), retry=True, usage=usage, billed=usage is None)
    return _read_choice(choices[0], usage)


def _read_choice(choice: dict[str, Any], usage: tuple[int, int] | None) -> Success | Failure:
    message = choice.get("message")
    text = _content(message.get("content")) if isinstance(message, dict) else None
    reason = choice.get("finish_reason")
    if text is not None and text.strip() and reason != "content_filter":
        return Success(StoredAnswer(text, reason not in ("length", "max_tokens"), *(usage or (0, 0))), usage)
    return replace(_no_text(message, reason), usage=usage, billed=usage is None)


def _no_text(message: Any, reason: Any) -> Failure:
    if reason == "content_filter":
        return Failure("the content filter stopped the answer", prompt=True, hint="look at the prompts it refuses")
    if not isinstance(message, dict):
        return Failure("a choice without a message", retry=True)
    if reason == "length":
        hint = "it thinks before it answers: raise teacher.endpoint.max_output_tokens"
        return Failure("no answer within max_output_tokens", prompt=True, hint=hint)
    refusal = message.get("refusal")
    if isinstance(refusal, str) and refusal:
        return Failure("the model refused to answer", refusal[:DETAIL], prompt=True)
    # The model itself wrote nothing: asking over and over costs money and seldom helps.
    return Failure("an empty answer", retry=True, prompt=True, tries=3)


def _content(content: Any) -> str | None:
    """The text of a message's content: a string, or a list of parts of which those with text are joined."""
    if isinstance(content, list):
        content = "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    if not isinstance(content, str):
        return None
    return content.encode("utf-16", "surrogatepass").decode(
        "utf-16", "replace"
    )  # a lone surrogate cannot be trained on


def _usage(value: dict[str, Any]) -> tuple[int, int] | None:
    usage = value.get("usage")
    if not isinstance(usage, dict):
        return None
    counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    if not all(isinstance(count, int) and not isinstance(count, bool) and count >= 0 for count in counts):
        return None
    return counts[0], counts[1]  # type: ignore[return-value]


def _json(body: bytes) -> Any | None:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def error_text(value: Any) -> str:
    """The words of an error object, in the shapes that endpoints use."""
    if not isinstance(value, dict):
        return ""
    error = value.get("error", value)
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or error.get("code") or ""
    return error[:DETAIL] if isinstance(error, str) else json.dumps(error)[:DETAIL]


def _error_code(value: Any) -> str:
    error = value.get("error") if isinstance(value, dict) else None
    if not isinstance(error, dict):
        return ""
    inner = error.get("innererror")
    return " ".join(str(part) for part in (error.get("code"), error.get("type"), inner) if part).lower()


def snippet(body: bytes) -> str:
    """The beginning of a body on one line, for messages."""
    text = " ".join(body[: 4 * DETAIL].decode("utf-8", "replace").split())
    return "".join(c if c.isprintable() else "�" for c in text)[:DETAIL]
