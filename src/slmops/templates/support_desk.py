"""Messages to a support desk and the function call that each one wants.

`generate(n, seed)` gives n rows of the canonical form, all with different prompts, the same rows for the same seed on
every machine, and `generate(k, seed)` is the beginning of `generate(n, seed)` for k < n. The words are in
`slmops.templates.wording`. A message is built in this order: a function and its arguments; a core that asks for it;
perhaps a trap (a second request that does not count, a negation, a correction, a thing told before and then only
called "it", other things and days in passing); chatter around it; then noise (case, punctuation, abbreviations,
typos).
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from slmops.templates import wording as w

T = TypeVar("T")
CHOICE = re.compile(r"\[([^\[\]]*)\]")
SLOT = re.compile(r"\{(\w+)\}")
WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday")
BARE_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat")
CORRECTABLE = ("day", "item", "to", "colour", "by", "time")


@dataclass(frozen=True)
class Call:
    """A function call: the answer of a message. `arguments` in the order in which they are written."""

    name: str
    arguments: tuple[tuple[str, str], ...] = ()

    def text(self) -> str:
        """The call as compact JSON."""
        return json.dumps({"name": self.name, "arguments": dict(self.arguments)}, separators=(",", ":"))


class _Writer:
    """Writes one message after the other from one stream of random numbers.

    Only `Random.random()` is used: its stream for a seed is the same in every Python version.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def chance(self, share: float) -> bool:
        return self._random.random() < share

    def pick(self, choices: Sequence[T]) -> T:
        return choices[int(self._random.random() * len(choices))]

    def other(self, choices: Sequence[T], than: T) -> T:
        return self.pick([c for c in choices if c != than])

    def expand(self, template: str) -> str:
        """Resolve the `[a|b]` of a template, inner ones first."""
        while match := CHOICE.search(template):
            template = template[: match.start()] + self.pick(match[1].split("|")) + template[match.end() :]
        return template

    def fill(self, template: str, slots: Mapping[str, str]) -> str:
        """Expand a template and put the slots in; a slot that is not given is an error."""
        return SLOT.sub(lambda match: slots[match[1]], self.expand(template))

    # -- words ---------------------------------------------------------------------------------------------------

    def say(self, slot: str, value: str, correct: bool) -> str:
        """One wording of a value, perhaps after a wrong one that the customer takes back."""
        word = self.pick(w.VALUES[slot][value])
        if not (correct and slot in CORRECTABLE and self.chance(0.07)):
            return word
        wrong = self.pick(w.VALUES[slot][self.other(list(w.VALUES[slot]), value)])
        return self.fill(self.pick(w.CORRECTIONS), {"wrong": wrong, "right": word})

    def call(self, function: w.Function, item: str | None = None) -> Call:
        """A random call of a function, about `item` if that is given and the function is about things."""
        arguments = [
            (slot, item if slot == "item" and item else self.pick(list(w.VALUES[slot]))) for slot in function.arguments
        ]
        return Call(function.name, tuple(arguments))

    def slots(self, call: Call, pronoun: bool, correct: bool) -> dict[str, str]:
        """How the arguments of a call are said in its core."""
        said: dict[str, str] = {}
        for slot, value in call.arguments:
            word = self.say(slot, value, correct and not (pronoun and slot == "item"))
            if slot == "item":
                said["item"] = "it" if pronoun else f"{self.pick(w.DETERMINERS)} {word}"
                said["thing"] = self.pick(("a ", "any ", "", "the ")) + word
            elif slot == "day" and self.chance(0.6) and word.startswith(BARE_DAYS) and "," not in word:
                said["day"] = "on " + word
            else:
                said[slot] = word
        return said

    def rival(self, frames: Sequence[str], main: str, function: w.Function, call: Call) -> str:
        """The request `main` in a frame that names another one which does not count."""
        slots = self.slots(call, pronoun=False, correct=False)
        act, want = (self.fill(self.pick(acts), slots) for acts in (function.asks, function.wants))
        return self.fill(self.pick(frames), {"main": main, "act": act, "want": want}).replace("?.", "?")

    def core(self, function: w.Function, call: Call, pronoun: bool) -> str:
        """The request itself."""
        slots = self.slots(call, pronoun, correct=True)
        kind = self._random.random()
        if kind < 0.4:
            return self.fill(self.pick(function.says), slots)
        frames, acts = (w.ASK_FRAMES, function.asks) if kind < 0.7 else (w.WANT_FRAMES, function.wants)
        return self.fill(self.pick(frames), {"act": self.fill(self.pick(acts), slots)})

    # -- messages ------------------------------------------------------------------------------------------------

    def message(self) -> tuple[str, Call]:
        """One message and the call that it wants."""
        total = sum(f.weight for f in w.FUNCTIONS) + w.NONE_WEIGHT
        left = self._random.random() * total
        for function in w.FUNCTIONS:
            left -= function.weight
            if left < 0:
                call = self.call(function)
                return self.noise(self.around(self.request(function, call), call)), call
        call = Call("none")
        return self.noise(self.around(self.nothing(), call)), call

    def nothing(self) -> str:
        """A message that wants no function; it may name things and days."""
        said = {slot: self.pick(self.pick(list(values.values()))) for slot, values in w.VALUES.items()}
        said["thing"] = said["item"]
        said["other"] = "the " + self.pick(self.pick(list(w.VALUES["item"].values())))
        said["item"] = f"{self.pick(w.DETERMINERS)} {said['item']}"
        return self.fill(self.pick(w.NONE), said)

    def request(self, function: w.Function, call: Call) -> str:
        """The core of a request with at most one trap around it."""
        arguments = dict(call.arguments)
        item = arguments.get("item")
        trap = self._random.random()
        if trap < 0.08:
            wanted = self.other(w.FUNCTIONS, function)
            rival = self.call(wanted, self.other(list(w.VALUES["item"]), item) if item else None)
            return self.rival(w.TWO, self.core(function, call, False), wanted, rival)
        if trap < 0.18:
            wanted = self.other(w.FUNCTIONS, function)
            rival = self.call(wanted, item)
            return self.rival(w.NEGATIONS, self.core(function, call, False), wanted, rival)
        if trap < 0.33 and item and function.name != "stock":
            return self.told_before(function, call)
        return self.core(function, call, False)

    def told_before(self, function: w.Function, call: Call) -> str:
        """The thing is named in a first sentence; the request then says "it"."""
        word = self.pick(w.VALUES["item"][dict(call.arguments)["item"]])
        words = {
            "a_item": f"a {word}",
            "the_item": f"{self.pick(w.DETERMINERS)} {word}",
            "other_day": self.pick(WEEKDAYS),
        }
        story = self.fill(self.pick(w.BACKSTORY), words)
        link = " " if story.endswith("?") else self.pick((". ", ", ", " - ", ". "))
        return story + link + self.core(function, call, True)

    def around(self, core: str, call: Call) -> str:
        """Greeting, chatter, asides and closing."""
        parts = [core]
        item = dict(call.arguments).get("item", "")
        if self.chance(0.08):
            other = self.pick(w.VALUES["item"][self.other(list(w.VALUES["item"]), item)])
            words = {"other": other, "other_a": f"a {other}", "other_day": self.pick(WEEKDAYS)}
            aside = self.fill(self.pick(w.ASIDES), words)
            parts.insert(int(self._random.random() * 2), aside)
        if self.chance(0.1):
            parts.insert(0 if self.chance(0.4) else len(parts), self.expand(self.pick(w.CHATTER)))
        if self.chance(0.3):
            parts.insert(0, self.expand(self.pick(w.OPENINGS)))
        if self.chance(0.22):
            parts.append(self.expand(self.pick(w.CLOSINGS)))
        text = parts[0]
        for part in parts[1:]:
            text += (" " if text[-1] in "?!." else self.pick((". ", ", ", ". ", " ... ", "! ", " "))) + part
        return text

    # -- noise ---------------------------------------------------------------------------------------------------

    def noise(self, text: str) -> str:
        """What fingers do: abbreviations, typos, case, punctuation. Digits are left alone."""
        if self.chance(0.4):
            for long, shorts in w.SHORT.items():
                if self.chance(0.5):
                    text = re.sub(rf"\b{long}\b", self.pick(shorts), text)
        if self.chance(0.4):
            rate = 0.03 + 0.06 * self._random.random()
            text = " ".join(self.typo(word) if self.chance(rate) else word for word in text.split(" "))
        style = self._random.random()
        if style < 0.45:
            text = re.sub(r"(^|[.?!] )(\w)", lambda m: m[1] + m[2].upper(), text)
            text = re.sub(r"\bi\b", "I", text)
        elif style < 0.48:
            text = text.upper()
        end = self._random.random()
        if end < 0.3 and text[-1] not in "?!.":
            text += self.pick((".", ".", "!", "!!", " :)", "?"))
        elif end > 0.8:
            text = text.rstrip("?!.")
        if self.chance(0.12):
            text = text.replace(",", "").replace(". ", " ")
        return text

    def typo(self, word: str) -> str:
        """One slip in a word of at least four letters."""
        if len(word) < 4 or not word.isalpha():
            return word
        at = 1 + int(self._random.random() * (len(word) - 2))
        slips = (
            word[:at] + word[at + 1 :],
            word[:at] + word[at] + word[at:],
            word[:at] + word[at + 1] + word[at] + word[at + 2 :],
            word[:at] + w.KEYS.get(word[at], word[at]) + word[at + 1 :],
        )
        slip = self.pick(slips)
        return word if slip in w.RUDE else slip


def generate(n: int, seed: int) -> list[dict[str, Any]]:
    """`n` rows `{"messages": [user, assistant]}` with n different user texts; the assistant's text is compact JSON."""
    writer = _Writer(seed)
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    while len(rows) < n:
        text, call = writer.message()
        if text in seen:
            continue
        seen.add(text)
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": call.text()}]
        rows.append({"messages": messages})
    return rows
