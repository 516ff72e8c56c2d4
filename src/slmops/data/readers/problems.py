"""Gathers what is wrong in data files, so that a user sees many bad rows at once and not one per try."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import NoReturn

from slmops.errors import DataError, Problem

MOST = 20
"""Bad rows shown before reading stops."""


class Problems:
    """The bad rows found so far. Law: `check()` returns only if nothing was added."""

    def __init__(self, most: int = MOST) -> None:
        self.most = most
        self.found: list[Problem] = []

    def add(self, message: str, hint: str = "", *, file: str, line: int | None = None) -> None:
        """Note one problem.

        Raises:
            DataError: there are now too many to go on.
        """
        self.found.append(Problem(message, hint, file, line))
        if len(self.found) >= self.most:
            self._fail(f" (reading stopped after {self.most})")

    def check(self) -> None:
        """Raise what was found.

        Raises:
            DataError: at least one problem was added; its `file` and `line` are those of the first.
        """
        if self.found:
            self._fail("")

    def _fail(self, note: str) -> NoReturn:
        first = self.found[0]
        if len(self.found) == 1:
            raise DataError(first.message, first.hint, file=first.file, line=first.line)
        hints = list(dict.fromkeys(p.hint for p in self.found if p.hint))
        lines = "\n".join(f"  {Problem(p.message, '', p.file, p.line)}" for p in self.found)
        error = DataError(f"{len(self.found)} bad rows{note}:\n{lines}", "; ".join(hints[:3]))
        error.file, error.line = first.file, first.line
        raise error


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?`, or what there is to choose from."""
    names = [str(name) for name in known]
    close = difflib.get_close_matches(word, names, n=1)
    if not close:
        close = [name for name in names if name.casefold().strip() == word.casefold().strip()][:1]
    shown = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
    return (f"did you mean {close[0]!r}? " if close else "") + (f"there are: {shown}" if names else "there is none")
