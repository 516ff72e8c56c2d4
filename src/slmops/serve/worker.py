"""The process of one model: requests come as lines of JSON on standard input, tokens go as lines to standard output.

`python -m slmops.serve.worker`. A process per model keeps a crash from the others, and gives all memory back when it ends: the
runtime keeps tens of megabytes otherwise. The first line says what to load; see `run` for the others. Whoever starts it has
`slmops.serve.model` do so. It ends when its input does.
"""

from __future__ import annotations

import contextlib
import json
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

from slmops.errors import ResourceError, SlmopsError
from slmops.serve.embedding import Embeddings
from slmops.serve.engines.load import load
from slmops.serve.grammar import Grammars, Reading
from slmops.serve.sampling import Picking
from slmops.serve.scheduler import GrammarError, Progress, Request, RequestError, Scheduler

Say = Callable[[dict[str, Any]], None]
_json = json.JSONEncoder(separators=(",", ":")).encode
FEW = 4
SELDOM_S = 0.25
"""How often it is told what came of an answer that nobody needs to hear, for what is counted if it is left."""
PIPE_BYTES = 1 << 20
"""What the pipe to the server holds, so that the model does not wait for it."""


def main(lines: TextIO, out: TextIO) -> int:
    """Load what the first line says, answer until the input ends."""

    def say(line: dict[str, Any]) -> None:
        out.write(_json(line) + "\n")
        out.flush()

    _widen(out)
    job = json.loads(lines.readline())
    try:
        engine, threads = load(job)
    except SlmopsError as error:
        say({"failed": error.message, "hint": error.hint})
        return 1
    say(
        {
            "ready": {
                "context": engine.context_length,
                "vocabulary": engine.vocabulary,
                "cache_bytes": engine.cache_bytes,
                "threads": threads,
            }
        }
    )
    commands: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    reading = Reading(Grammars(Path(job["folder"]), engine.vocabulary, engine.end_ids), commands.put)
    threading.Thread(target=_listen, args=(lines, reading), daemon=True).start()
    try:
        embeddings = Embeddings(engine, queue=job["queue"])
        run(Scheduler(engine, queue=job["queue"]), commands, say, embeddings, job["tell_ms"] / 1000)
    except SlmopsError as error:
        say({"failed": error.message, "hint": error.hint})
        return 1
    return 0


def _listen(lines: Iterable[str], reading: Reading) -> None:
    try:
        for line in lines:
            command = json.loads(line)
            if "ask" in command:  # a step may be under way, for which it waits too
                command["ask"]["at"] = time.perf_counter()
            reading.put(command)
    finally:  # also where a line cannot be read: the process ends rather than answer nobody
        reading.put(None)


def _widen(out: TextIO) -> None:
    with contextlib.suppress(ImportError, AttributeError, OSError, ValueError):  # not on this system, or no pipe
        import fcntl

        fcntl.fcntl(out.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)


class Teller:
    """Tells what tokens came: the first and the last of an answer at once, those between together, from time to time, since to hear
    of each takes a server more of the machine than a small model does to make it.

    Args:
        say: where to.
        every: seconds from one time to the next; more where more than `FEW` answers go on, so that all together are told no oftener.
        clock: what the time is.
    """

    def __init__(self, say: Say, every: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._say, self._every, self._clock = say, every, clock
        self._rows: dict[int, list[list[Any]]] = {}
        """By answer that has begun, those that are not told yet."""
        self._whole: set[int] = set()
        self._told = self._told_all = clock()

    def hold(self, id: int) -> None:
        """An answer of which nobody needs to hear between its first token and its last."""
        self._whole.add(id)

    def add(self, found: Iterable[Progress], began: Sequence[tuple[int, float]] = ()) -> None:
        """Tokens of a step, and which answers got a row in it, each with the seconds that it had waited."""
        now: list[list[Any]] = []
        for progress in found:
            rows = self._rows.get(progress.id)
            if rows is None or progress.finish:
                now += [*(rows or ()), row_of(progress)]
                self._rows[progress.id] = []
                if progress.finish:
                    self.forget(progress.id)
            else:
                rows.append(row_of(progress))
        when = self._clock()
        if when - self._told >= self._every:
            everyone = when - self._told_all >= SELDOM_S
            heard = [rows for id, rows in self._rows.items() if everyone or id not in self._whole]
            if when - self._told >= self._every * len(heard) / FEW:
                self._told = when
                self._told_all = when if everyone else self._told_all
                for rows in heard:
                    now += rows
                    rows.clear()
        line = ({"began": began} if began else {}) | ({"tokens": now} if now else {})
        if line:
            self._say(line)

    def forget(self, id: int) -> None:
        """An answer that has ended, or that nobody wants any more."""
        self._rows.pop(id, None)
        self._whole.discard(id)


def run(
    scheduler: Scheduler, commands: queue.SimpleQueue[dict[str, Any] | None], say: Say, embeddings: Embeddings, every: float,
) -> None:  # fmt: skip
    """Take commands and steps in turn until a command is None.

    A command is `{"ask": {id, prompt, most, how, ignore_end, grammar, adapter, whole}}`, `{"embed": {id, prompts, adapter}}` or
    `{"cancel": id}`. What is said: `{"tokens": [[id, token, finish, cached, logprob, likely], …]}`, those of one answer one after the
    other (see `Teller`); before or with the first of an answer `{"began": [[id, seconds until it had a row], …]}`; `{"embedded": [id, which
    prompt, vector]}`; and `{"refused": id, "why": text, "hint": text, "busy": whether it may be asked again, "asked": whether the request
    was wrong, "grammar": whether that is why}`, which may also come in the middle of an answer.
    """
    asked_at: dict[int, float] = {}
    teller = Teller(say, every)
    while True:
        idle = not (scheduler.waiting or scheduler.busy or embeddings)
        while idle or not commands.empty():
            command = commands.get()
            if command is None:
                return
            idle = False
            if "cancel" in command:
                if not scheduler.cancel(command["cancel"]):
                    embeddings.cancel(command["cancel"])
                asked_at.pop(command["cancel"], None)
                teller.forget(command["cancel"])
                continue
            asked = command.get("ask") or command["embed"]
            try:
                if "embed" in command:
                    embeddings.submit(asked)
                elif "refused" in asked:
                    raise asked["refused"]
                else:
                    scheduler.submit(request_of(asked))
                    asked_at[asked["id"]] = asked.get("at", time.perf_counter())
                    if asked.get("whole"):
                        teller.hold(asked["id"])
            except SlmopsError as error:
                why = (("busy", ResourceError), ("asked", RequestError), ("grammar", GrammarError))
                marks = {mark: True for mark, kind in why if isinstance(error, kind)}
                say({"refused": asked["id"], "why": error.message, "hint": error.hint, **marks})
            except (KeyError, TypeError, ValueError) as error:
                say(
                    {
                        "refused": asked.get("id"),
                        "why": f"the request cannot be read: {error}",
                        "hint": "",
                        "busy": False,
                        "asked": True,
                    }
                )
        now = time.perf_counter()
        found = scheduler.step()
        began = [(id, max(0.0, now - asked_at.pop(id, now))) for id in scheduler.admitted]
        if found or began:
            teller.add([progress for progress in found if progress.finish != "failed"], began)
        for progress in found:
            if progress.finish == "failed":
                teller.forget(progress.id)
                why_not = f"the answer could not be held to its grammar: {progress.why}"
                say({"refused": progress.id, "why": why_not, "hint": "make it simpler", "asked": True, "grammar": True})
        if embeddings and (line := embeddings.step()):
            say(line)


def request_of(asked: dict[str, Any]) -> Request:
    """A request as it came over the line."""
    how = dict(asked.get("how", {}))
    how["logit_bias"] = {int(id): float(value) for id, value in how.get("logit_bias", {}).items()}
    return Request(
        asked["id"], tuple(asked["prompt"]), asked["most"], Picking(**how), asked.get("ignore_end", False),
        asked.get("limit"), asked.get("adapter"),
    )  # fmt: skip


def row_of(progress: Progress) -> list[Any]:
    """A token as it goes over the line."""
    picked = progress.picked
    row = [progress.id, picked.token, progress.finish, progress.cached]
    return row if picked.logprob is None else [*row, picked.logprob, picked.likely]


if __name__ == "__main__":
    sys.exit(main(sys.stdin, sys.stdout))
