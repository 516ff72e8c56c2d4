"""Answers that were paid for, kept by content in one SQLite file.

Promises: an answer that `put` returned for is there after `kill -9`, a power cut and in every other process; many
processes may read and write at once; the file holds no prompt and no key, only digests, answers and token counts.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from slmops.errors import IntegrityError, ResourceError, SlmopsError

FILE = "answers.sqlite"
_LAYOUT = 1
_MANY = 500
_WAIT_S = 60.0


@dataclass(frozen=True)
class StoredAnswer:
    """One answer as it was given: its text, whether it ended by itself, and its tokens as the endpoint counted them."""

    text: str
    finished: bool
    prompt_tokens: int = 0
    completion_tokens: int = 0


class AnswerStore:
    """The answers in one folder. Opens on first use; close it, or use it in a `with` block."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._connection: sqlite3.Connection | None = None

    def get(self, keys: Sequence[str]) -> dict[str, StoredAnswer]:
        """The answers that are known among `keys`.

        Raises:
            IntegrityError: the file is damaged.
            ResourceError: the disk is full or the file cannot be opened.
        """
        found: dict[str, StoredAnswer] = {}
        with _Wrapped(self.path):
            for part in _parts(keys):
                marks = ",".join("?" * len(part))
                query = (
                    f"SELECT key, text, finished, prompt_tokens, completion_tokens FROM answers WHERE key IN ({marks})"
                )
                for key, text, finished, asked, told in self._open().execute(query, part):
                    found[key] = StoredAnswer(text.decode("utf-8", "surrogatepass"), bool(finished), asked, told)
        return found

    def put(self, key: str, answer: StoredAnswer) -> None:
        """Keep an answer, durably. The first answer for a key stays.

        Raises:
            IntegrityError, ResourceError: as `get`.
        """
        text = answer.text.encode("utf-8", "surrogatepass")
        row = (key, text, int(answer.finished), answer.prompt_tokens, answer.completion_tokens)
        with _Wrapped(self.path):
            self._open().execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?)", row)

    def __len__(self) -> int:
        with _Wrapped(self.path):
            (count,) = self._open().execute("SELECT COUNT(*) FROM answers").fetchone()
        return int(count)

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def __enter__(self) -> AnswerStore:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise sqlite3.OperationalError(str(error)) from error
            # Autocommit: each `put` is one transaction. FULL: it is on the disk before `put` returns.
            connection = sqlite3.connect(self.path, timeout=_WAIT_S, isolation_level=None, check_same_thread=False)
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
            (layout,) = connection.execute("PRAGMA user_version").fetchone()
            if layout not in (0, _LAYOUT):
                connection.close()
                raise sqlite3.DatabaseError(f"layout {layout} was written by another version of slmops")
            connection.execute(
                "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, text BLOB NOT NULL, finished INTEGER NOT NULL,"
                " prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL) WITHOUT ROWID"
            )
            connection.execute(f"PRAGMA user_version={_LAYOUT}")
            self._connection = connection
        return self._connection


class _Wrapped:
    """Turns what SQLite raises into our own errors."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None: ...

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if not isinstance(error, sqlite3.Error):
            return
        wrapped: SlmopsError
        if isinstance(error, sqlite3.OperationalError):
            wrapped = ResourceError(
                f"answers cannot be kept in {self.path}: {error}",
                "no request is sent while its answer cannot be kept: free some disk space or mend the permissions",
            )
        else:
            wrapped = IntegrityError(
                f"the file of paid answers is damaged: {self.path}: {error}",
                "move it away to ask again (that pays again), or restore it from a backup",
            )
        raise wrapped from error


def _parts(keys: Sequence[str]) -> Iterator[list[str]]:
    for start in range(0, len(keys), _MANY):
        yield list(keys[start : start + _MANY])
