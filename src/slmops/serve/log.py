"""The log: one line of JSON for each request that is over. It has no text of prompts and answers unless that was asked for."""

from __future__ import annotations

import contextlib
import datetime
import json
from typing import Any, TextIO

from slmops.serve.metrics import error_of
from slmops.serve.record import Record


class Log:
    """Writes lines to a stream. One that cannot be written is lost: a full disk ends no answer."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def tell(self, record: Record) -> None:
        """Write the line of a request that is over."""
        with contextlib.suppress(OSError, ValueError):
            self._out.write(json.dumps(line(record), separators=(",", ":")) + "\n")
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
