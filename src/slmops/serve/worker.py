"""The process of one model: requests come as lines of JSON on standard input, tokens go as lines to standard output.

`python -m slmops.serve.worker`. A process per model keeps a crash from the others, and gives all memory back when it ends: the
runtime keeps tens of megabytes otherwise. The first line says what to load; see `run` for the others. Whoever starts it has
`slmops.serve.model` do so. It ends when its input does.
"""

from __future__ import annotations

import json
import queue
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TextIO

from slmops.errors import ResourceError, SlmopsError
from slmops.serve.engines.onnx import OnnxRows
from slmops.serve.sampling import Picking
from slmops.serve.scheduler import Progress, Request, Scheduler

Say = Callable[[dict[str, Any]], None]


def main(lines: TextIO, out: TextIO) -> int:
    """Load what the first line says, answer until the input ends."""

    def say(line: dict[str, Any]) -> None:
        out.write(json.dumps(line, separators=(",", ":")) + "\n")
        out.flush()

    job = json.loads(lines.readline())
    try:
        engine = OnnxRows(Path(job["folder"]), rows=job["rows"], context=job["context"], threads=job["threads"])
    except SlmopsError as error:
        say({"failed": error.message, "hint": error.hint})
        return 1
    say(
        {
            "ready": {
                "context": engine.context_length,
                "vocabulary": engine.vocabulary,
                "cache_bytes": engine.cache_bytes,
            }
        }
    )
    commands: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(lines, commands), daemon=True).start()
    try:
        run(Scheduler(engine, queue=job["queue"]), commands, say)
    except SlmopsError as error:
        say({"failed": error.message, "hint": error.hint})
        return 1
    return 0


def _listen(lines: Iterable[str], commands: queue.SimpleQueue[dict[str, Any] | None]) -> None:
    for line in lines:
        commands.put(json.loads(line))
    commands.put(None)


def run(scheduler: Scheduler, commands: queue.SimpleQueue[dict[str, Any] | None], say: Say) -> None:
    """Take commands and steps in turn until a command is None.

    A command is `{"ask": {id, prompt, most, how, ignore_end}}` or `{"cancel": id}`. What is said: `{"tokens": [[id, token, finish,
    cached, logprob, likely], …]}`, one line for each step, and `{"refused": id, "why": text, "hint": text, "busy": whether it may be
    asked again}`.
    """
    while True:
        idle = not (scheduler.waiting or scheduler.busy)
        while idle or not commands.empty():
            command = commands.get()
            if command is None:
                return
            idle = False
            if "cancel" in command:
                scheduler.cancel(command["cancel"])
                continue
            asked = command["ask"]
            try:
                scheduler.submit(request_of(asked))
            except SlmopsError as error:
                busy = isinstance(error, ResourceError)
                say({"refused": asked["id"], "why": error.message, "hint": error.hint, "busy": busy})
            except (KeyError, TypeError, ValueError) as error:
                say(
                    {
                        "refused": asked.get("id"),
                        "why": f"the request cannot be read: {error}",
                        "hint": "",
                        "busy": False,
                    }
                )
        found = scheduler.step()
        if found:
            say({"tokens": [_row(progress) for progress in found]})


def request_of(asked: dict[str, Any]) -> Request:
    """A request as it came over the line."""
    how = dict(asked.get("how", {}))
    how["logit_bias"] = {int(id): float(value) for id, value in how.get("logit_bias", {}).items()}
    return Request(asked["id"], tuple(asked["prompt"]), asked["most"], Picking(**how), asked.get("ignore_end", False))


def _row(progress: Progress) -> list[Any]:
    picked = progress.picked
    row = [progress.id, picked.token, progress.finish, progress.cached]
    return row if picked.logprob is None else [*row, picked.logprob, picked.likely]


if __name__ == "__main__":
    sys.exit(main(sys.stdin, sys.stdout))
