"""Examples: the canonical form of all training and evaluation data.

An example is a list of messages. The last message with role `assistant`, if the list ends with one, is the answer;
the messages before it are the prompt. Laws: `Example.from_json(e.to_json()) == e`, and `e.id` depends on the prompt
alone (roles and contents), so two rows that ask the same have the same id whatever their answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from slmops.core.digest import digest_json

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")
Origin = Literal["gold", "teacher", "none"]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True)
class Example:
    """A prompt and, if known, its answer.

    Attributes:
        prompt: the messages before the answer, at least one.
        answer: the wanted text, or None for a prompt without a label.
        origin: who wrote the answer: `gold` (people), `teacher`, or `none`.
        source: where the prompt came from, for people: a file name, `sampled`, `paraphrase`, …
        parent: id of the example that this one was derived from, or "".
        rejected: an answer that people like less than `answer`, which is given then; only preference methods look at it.
    """

    prompt: tuple[Message, ...]
    answer: str | None = None
    origin: Origin = "none"
    source: str = ""
    parent: str = ""
    rejected: str | None = None

    @property
    def id(self) -> str:
        """16 hex digits of the digest of the prompt."""
        return digest_json([[m.role, m.content] for m in self.prompt])[7:23]

    @property
    def text(self) -> str:
        """The content of the last user message: what near-duplicate and leak checks look at."""
        for message in reversed(self.prompt):
            if message.role == "user":
                return message.content
        return self.prompt[-1].content

    def answered(self, answer: str, origin: Origin) -> Example:
        """The same prompt with another answer, which makes no pair with the rejected one."""
        return replace(self, answer=answer, origin=origin, rejected=None)

    def unanswered(self) -> Example:
        """The same prompt without its answers."""
        return replace(self, answer=None, origin="none", rejected=None)

    def with_text(self, text: str) -> Example:
        """The same conversation with other last words of the user (or, where no user speaks, another last message).

        A rejected answer is dropped: it was written to the words as they were.
        """
        prompt = list(self.prompt)
        users = [index for index, message in enumerate(prompt) if message.role == "user"]
        index = users[-1] if users else len(prompt) - 1
        prompt[index] = Message(prompt[index].role, text)
        return replace(self, prompt=tuple(prompt), rejected=None)

    def messages(self) -> list[dict[str, str]]:
        """Prompt and answer as the list of dicts that chat templates and endpoints take."""
        out = [{"role": m.role, "content": m.content} for m in self.prompt]
        if self.answer is not None:
            out.append({"role": "assistant", "content": self.answer})
        return out

    def prompt_messages(self) -> list[dict[str, str]]:
        """The prompt alone as a list of dicts."""
        return [{"role": m.role, "content": m.content} for m in self.prompt]

    def to_json(self) -> dict[str, Any]:
        """The canonical row: `messages`, and `origin`, `source`, `parent` and `rejected` where they say something."""
        row: dict[str, Any] = {"messages": self.messages()}
        if self.origin != "none":
            row["origin"] = self.origin
        if self.source:
            row["source"] = self.source
        if self.parent:
            row["parent"] = self.parent
        if self.rejected is not None:
            row["rejected"] = self.rejected
        return row

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Example:
        """Parse a canonical row that slmops wrote itself. Rows that users wrote go through `slmops.data.readers`."""
        messages = tuple(Message(m["role"], m["content"]) for m in row["messages"])
        answer: str | None = None
        if len(messages) > 1 and messages[-1].role == "assistant":
            answer, messages = messages[-1].content, messages[:-1]
        return cls(
            messages,
            answer,
            row.get("origin", "none"),
            row.get("source", ""),
            row.get("parent", ""),
            row.get("rejected"),
        )
