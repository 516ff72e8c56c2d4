"""The log: one line of JSON for each request that is over. It has no text of prompts and answers unless that was asked for."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from pathlib import Path
from typing import Any, Protocol

from slmops.serve.metrics import error_of
from slmops.serve.record import Record

_json = json.JSONEncoder(separators=(",", ":")).encode


class Out(Protocol):
    """Where lines go."""

    def write(self, text: str, /) -> Any:
        """Add a text."""

    def flush(self) -> Any:
        """Have it seen."""


class LogFile:
    """A file that texts are added to, for its owner alone. Once it was moved or deleted, as by logrotate, the next text begins a new one of
    the same name; where none can be made, it still goes to the old one.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, open(path, "a", encoding="utf-8", opener=_private)  # noqa: SIM115

    def write(self, text: str) -> None:
        """Add a text."""
        with contextlib.suppress(OSError):
            if self._moved():
                new = open(self._path, "a", encoding="utf-8", opener=_private)  # noqa: SIM115
                self._file, old = new, self._file
                old.close()
        self._file.write(text)

    def flush(self) -> None:
        """Have it seen by whoever reads the file."""
        self._file.flush()

    def close(self) -> None:
        """No more texts."""
        self._file.close()

    def _moved(self) -> bool:
        try:
            return not os.path.samestat(self._path.stat(), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            return True


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


class Log:
    """Writes lines. One that cannot be written is lost: a full disk ends no answer."""

    def __init__(self, out: Out) -> None:
        self._out = out

    def tell(self, record: Record) -> None:
        """Write the line of a request that is over."""
        with contextlib.suppress(OSError, ValueError):
            self._out.write(_json(line(record)) + "\n")
            self._out.flush()


def line(record: Record) -> dict[str, Any]:
    """What is logged of a request; what there is nothing of is left out. Times are seconds."""
    came = datetime.datetime.fromtimestamp(record.time, datetime.UTC)
    first, waits = record.first_token, [watch.waited for watch in record.answers if watch.waited is not None]
    found: dict[str, Any] = {
        "time": came.isoformat(timespec="milliseconds"), "id": record.id, "client": record.client, "key": record.key,
        "method": record.method, "path": record.path[:200], "status": record.status, "duration": round(record.duration, 6),
        "error": error_of(record), "model": record.model,
    }  # fmt: skip
    if record.answers:
        found |= {
            "answers": len(record.answers), "prompt_tokens": record.prompt_tokens,
            "cached_tokens": sum(watch.cached for watch in record.answers), "completion_tokens": record.tokens,
            "queue": round(max(waits), 6) if waits else None, "first_token": None if first is None else round(first, 6),
            "finish": sorted({watch.finish for watch in record.answers if watch.finish}),
        }  # fmt: skip
    if record.parent.get("traceparent"):
        found["traceparent"] = record.parent["traceparent"][:100]
    if record.texts:
        found["texts"] = record.texts
    return {name: value for name, value in found.items() if value not in ("", None)}
