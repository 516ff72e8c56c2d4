"""Text from tokens as they come: whole characters, and nothing of a stop string.

Law: the pieces joined are the text of all tokens decoded at once, up to the first stop string in it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from slmops.engines.plain_tokenizer import PlainTokenizer

UNFINISHED = "\ufffd"
KEEP = 4
"""Pieces before a piece that are decoded with it at the least: what a token says can depend on the one before."""
MOST = 8
"""Pieces that are decoded together at the most."""


class Stream:
    """The text that each token adds. A character of several tokens comes with the last of them.

    Args:
        shown: special tokens that are a part of the text; others are not.
    """

    def __init__(self, tokenizer: PlainTokenizer, shown: Collection[int] = ()) -> None:
        self._tokenizer, self._shown = tokenizer, frozenset(shown)
        self._ids: list[int] = []
        """The last ones, at which decoding begins."""
        self._ends = [0]
        """Places among them at which text was told, so that never a part of a character is decoded without the rest."""
        self._told = ""
        """Their text up to the last of these places."""

    def add(self, *tokens: int) -> str:
        """What these tokens add, without a character that is not whole yet."""
        if self._shown.isdisjoint(tokens):
            return self._add(tokens)
        return "".join(self._show(token) if token in self._shown else self._add((token,)) for token in tokens)

    def _show(self, token: int) -> str:
        before = self.rest()
        self._ids, self._ends, self._told = [], [0], ""
        return before + self._tokenizer.token(token)

    def _add(self, tokens: Sequence[int]) -> str:
        self._ids += tokens
        now = self._tokenizer.decode(self._ids)
        if now.endswith(UNFINISHED) or not now.startswith(self._told):
            return ""
        added = now[len(self._told) :]
        self._tell(now)
        return added

    def rest(self) -> str:
        """What has not been told when there are no more tokens: of a broken character its replacement."""
        if self._ends[-1] == len(self._ids):
            return ""
        now = self._tokenizer.decode(self._ids)
        added = now[len(self._told) :]
        self._tell(now)
        return added

    def _tell(self, now: str) -> None:
        """All tokens are told, of which this is the text. The first pieces are dropped where they have become many."""
        self._ends.append(len(self._ids))
        self._told = now
        if len(self._ends) > MOST:
            begin = self._ends[-KEEP - 1]
            self._ids = self._ids[begin:]
            self._ends = [end - begin for end in self._ends[-KEEP - 1 :]]
            self._told = self._tokenizer.decode(self._ids)


class Stop:
    """Holds back what may be the beginning of a stop string. `found`: one came."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """What of the text up to now can be told."""
        if not self._stops:
            return text
        text = self._held + text
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        held = max(_begun(text, stop) for stop in self._stops)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def rest(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


def _begun(text: str, stop: str) -> int:
    """How much of a stop string the text ends with, without having all of it."""
    place = max(0, len(text) - len(stop) + 1)
    while (place := text.find(stop[0], place)) >= 0:
        if stop.startswith(text[place:]):
            return len(text) - place
        place += 1
    return 0
