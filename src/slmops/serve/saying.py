"""What an answer may say, from what a client asks for: tools, one of them at least, or JSON of a schema. For every dialect."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from slmops.engines.plain_tokenizer import PlainTokenizer
from slmops.serve import grammar
from slmops.serve.model import Ask
from slmops.serve.scheduler import RequestError
from slmops.serve.tools import Format, Reader, Tool, format_of


@dataclass(frozen=True)
class Saying:
    """What an answer may say.

    Attributes:
        tools: for the chat template.
        grammar: None: anything.
        shown: special tokens that are a part of its text.
        format: how calls are written; None: there are none to find.
        names: of the tools that may be called.
        most: calls.
    """

    tools: tuple[dict[str, Any], ...] = ()
    grammar: str | None = None
    shown: frozenset[int] = frozenset()
    format: Format | None = None
    names: frozenset[str] = frozenset()
    most: int | None = None

    def ask(self, ask: Ask) -> Ask:
        """The same request, held to this."""
        return replace(ask, grammar=self.grammar, shown=self.shown)

    def reader(self) -> Reader | None:
        """For the text of one answer."""
        return Reader(self.format, self.names, self.most) if self.format else None


def saying(
    tokenizer: PlainTokenizer,
    tools: Sequence[Tool] = (),
    schema: Mapping[str, Any] | bool | None = None,
    *,
    may: Collection[str] | None = None,
    must: bool = False,
    many: bool = True,
) -> Saying:
    """What an answer may say.

    Args:
        tokenizer: of the model.
        tools: are told to the model.
        schema: an answer that calls nothing is JSON of it; None: any text.
        may: names of those tools that may be called; None: all.
        must: at least one is called, and nothing else is said.
        many: whether several may be called.

    Raises:
        RequestError: the model cannot call tools, or arguments are to be something else than an object.
    """
    odd = [tool.name for tool in tools if tool.parameters and tool.parameters.get("type") != "object"]
    if odd:
        raise RequestError(f"the parameters of the tool {odd[0]} are no schema of the type object", "say so in them")
    free = [tool for tool in tools if may is None or tool.name in may]
    if not free:
        return Saying(grammar=None if schema is None else grammar.of_schema(schema))
    form = format_of(tokenizer.template)
    special = form.special(tokenizer)
    text = None
    if must:
        text = form.grammar(free, special, many=many)
    elif schema is not None or any(tool.strict for tool in free):
        text = form.grammar_or_text(free, special, many=many, text=schema)
    return Saying(
        tuple(tool.told() for tool in tools), text, frozenset(special.values()), form,
        frozenset(tool.name for tool in free), None if many else 1,
    )  # fmt: skip
