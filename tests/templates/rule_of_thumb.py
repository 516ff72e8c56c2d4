"""What a colleague writes in an afternoon: keywords for the function, the desk's own word lists for the arguments."""

from __future__ import annotations

import json
import re

from slmops.templates.wording import FUNCTIONS, VALUES

KEYWORDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("account", ("password", "profile", "my account", "surname", "last name", "phone number", "email address")),
    ("refund", ("refund", "money back", "paid back", "the money for", "credited", "get paid")),
    ("invoice", ("invoice", "bill", "receipt", "proof of", "tax")),
    ("callback", ("call me", "ring me", "phone me", "a call", "talk", "speak")),
    ("cancel", ("cancel", "call off", "do not ship", "by mistake", "by accident")),
    ("stock", ("in stock", "do you have", "available", "sold out", "any left", "on stock")),
    ("return", ("return", "send back", "take it back", "give back", "changed my mind", "do not keep", "back to you")),
    ("replace", ("replace", "swap", "exchange", "new one", "another one", "missing")),
    ("redirect", ("office", "neighbour", "locker", "next door", "shop", "address", "new place")),
    ("reschedule", ("deliver", "move", "shift", "instead", "new date", "bring")),
    ("track", ("where", "track", "status", "arrive", "update", "waiting", "shipped", "when")),
)
ORDER = {f.name: f.arguments for f in FUNCTIONS}


def first(text: str, values: dict[str, tuple[str, ...]]) -> str:
    """The value whose wording stands first in the text; the first of the list if none does."""
    found = []
    for value, words in values.items():
        for word in {value, *words}:
            if match := re.search(rf"\b{re.escape(word)}\b", text):
                found.append((match.start(), -len(word), value))
    return min(found)[2] if found else next(iter(values))


def answer(text: str) -> str:
    """The call that the keywords point to."""
    text = text.lower().replace("'", "")
    for name, words in KEYWORDS:
        if any(re.search(rf"\b{word}", text) for word in words):
            arguments = {slot: first(text, VALUES[slot]) for slot in ORDER[name]}
            return json.dumps({"name": name, "arguments": arguments}, separators=(",", ":"))
    return '{"name":"none","arguments":{}}'
