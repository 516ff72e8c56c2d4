"""A teacher behind an OpenAI-compatible chat/completions endpoint: OpenAI, Azure OpenAI and AI Foundry, vLLM, Ollama.

Promises: an answer that arrived is never asked for again (see `answer_store`), whatever ends the run; a request that
could break the budget is not sent; every failure has a name, a count and a hint; no key is ever logged, stored or shown.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from slmops.core.digest import digest_json
from slmops.core.engine import Sampling
from slmops.core.method import Context
from slmops.core.spec import Endpoint
from slmops.engines.answer_store import AnswerStore, StoredAnswer
from slmops.engines.answers import Answer, Messages
from slmops.engines.endpoint_address import address, api_key, check_endpoint, shown
from slmops.engines.endpoint_pace import LONGEST_WAIT_S, Backoff, Pace, exhausted_for, retry_after
from slmops.engines.endpoint_reply import Failure, Success, read_reply, wants_completion_limit
from slmops.errors import BudgetError, EndpointError, SlmopsError

if TYPE_CHECKING:
    import httpx

CONNECT_S = 10.0
MOST_BYTES = 16 << 20
"""A longer reply than this is not read to its end."""
GIVE_UP = 8
"""Requests in a row given up, without one answer between, after which the endpoint counts as dead."""
SILENT_TRIES = 2
"""Most tries of a request to an endpoint that has not answered once and lets the time run out."""


@dataclass
class Ledger:
    """What was asked and spent. Money is in the price list's currency.

    Attributes:
        cost: of tokens that the endpoint counted, or that we counted by length where it did not (`uncounted` answers).
        unsure: upper bound of the cost of tries that may have been charged without telling (cut replies, timeouts).
    """

    requests: int = 0
    answered: int = 0
    cached: int = 0
    failed: int = 0
    uncounted: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    unsure: float = 0.0
    failures: Counter[str] = field(default_factory=Counter)

    def to_json(self) -> dict[str, Any]:
        """The ledger as a JSON value; money rounded to a millionth."""
        rounded = {"cost": round(self.cost, 6), "unsure": round(self.unsure, 6)}
        return {**asdict(self), **rounded, "failures": dict(sorted(self.failures.items()))}


@dataclass
class Clock:
    """Time as the client sees it, so that tests need not wait."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep


@dataclass(frozen=True)
class _Item:
    key: str
    messages: Messages
    sampling: Sampling
    worst: float


class EndpointTeacher:
    """The client. One `answers` call runs at a time.

    Args:
        transport: an httpx transport instead of the network, for instance `StandIn.transport()`.
        environ: where keys are looked up; default: the process's environment.

    Raises:
        UsageError: see `check_endpoint`. The key itself is wanted only when something has to be asked.
    """

    remote = True

    def __init__(
        self,
        endpoint: Endpoint,
        ctx: Context,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
        environ: Mapping[str, str] | None = None,
        backoff: Backoff | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.endpoint, self.name, self.ledger = endpoint, endpoint.model, Ledger()
        self._ctx, self._transport, self._environ = ctx, transport, environ
        self._backoff, self._clock = backoff or Backoff(), clock or Clock()
        self._url = address(endpoint)
        self._store = AnswerStore(ctx.shared / "answers")
        self._limit_name = "max_tokens"
        self._said: set[str] = set()

    def answers(
        self, prompts: Sequence[Messages], sampling: Sampling, samples: int = 1, first: int = 0
    ) -> list[list[Answer | None]]:
        """See `slmops.data.teacher.Teacher.answers`. Equal prompts are asked once."""
        keys = [[self.key(messages, sampling, first + n) for n in range(samples)] for messages in prompts]
        wanted = {key: messages for row, messages in zip(keys, prompts, strict=True) for key in row}
        known = self._store.get(list(wanted))
        self.ledger.cached += len(known)
        todo = [
            _Item(key, messages, sampling, self._worst(messages, sampling))
            for key, messages in wanted.items()
            if key not in known
        ]
        if todo:
            check_endpoint(self.endpoint, self._ctx.budget, self._environ)
            if known:
                self._ctx.progress.log(f"{len(known)} of {len(wanted)} answers of {self.name} were there already")
            run = _Run(self, todo, len(known))
            try:
                _run_async(run.all())
            finally:
                self._ctx.progress.stop()
            known |= run.answers
        return [[_answer(known.get(key)) for key in row] for row in keys]

    def key(self, messages: Messages, sampling: Sampling, sample: int) -> str:
        """What an answer is stored under: everything that can change it, and which sample it is."""
        limits = [sampling.max_new_tokens, sampling.temperature, sampling.top_p]
        return digest_json([self._url, self.endpoint.model, messages, limits, sample])

    def facts(self) -> dict[str, Any]:
        """The ledger."""
        return self.ledger.to_json()

    def close(self) -> None:
        """Close the store of answers."""
        self._store.close()

    def _price(self, asked: float, told: float) -> float:
        price = self.endpoint.price
        return (asked * price.input_per_million + told * price.output_per_million) / 1e6

    def _worst(self, messages: Messages, sampling: Sampling) -> float:
        # No tokenizer that works on bytes makes more tokens than there are bytes; templates add a few per message.
        asked = sum(len(m["content"].encode("utf-8", "surrogatepass")) + 16 for m in messages) + 32
        return self._price(asked, sampling.max_new_tokens)

    def _body(self, item: _Item) -> bytes:
        s = item.sampling
        body: dict[str, Any] = {"model": self.endpoint.model, "messages": item.messages, "stream": False}
        body |= {self._limit_name: s.max_new_tokens, "temperature": s.temperature}
        return json.dumps(body | ({"top_p": s.top_p} if s.top_p < 1 else {})).encode()


class _Run:
    """One `answers` call: workers that share a pace, a budget and a reason to stop."""

    def __init__(self, teacher: EndpointTeacher, todo: list[_Item], known: int) -> None:
        self.t, self.todo, self.known, self.total = teacher, todo, known, known + len(todo)
        self.endpoint, self.ledger, self.progress = teacher.endpoint, teacher.ledger, teacher._ctx.progress
        self.key = api_key(self.endpoint, teacher._environ)
        self.answers: dict[str, StoredAnswer] = {}
        self.given_up: list[Failure] = []
        self.in_a_row = 0
        self.reserved = 0.0
        self.stop: SlmopsError | None = None

    async def all(self) -> None:
        """Ask for everything that is to do.

        Raises:
            EndpointError, BudgetError, ResourceError: after all requests under way have ended and were kept.
        """
        import httpx

        self.pace = Pace(self.endpoint.concurrency, self.t._clock.now, self._sleep)
        self.stopped = asyncio.Event()
        self.settled = asyncio.Condition()
        self.progress.start(f"asking {self.t.name}", len(self.todo), "answers")
        timeout = httpx.Timeout(self.endpoint.timeout_s, connect=min(CONNECT_S, self.endpoint.timeout_s))
        limits = httpx.Limits(max_connections=self.endpoint.concurrency)
        queue = iter(self.todo)
        async with httpx.AsyncClient(transport=self.t._transport, timeout=timeout, limits=limits) as client:

            async def work() -> None:
                for item in queue:
                    if self.stop is not None:
                        return
                    await self._item(client, item)

            async with asyncio.TaskGroup() as group:
                for _ in range(min(self.endpoint.concurrency, len(self.todo))):
                    group.create_task(work())
        if self.stop is None and self._success() < self.endpoint.min_success_ratio:
            self._halt(self._too_many())
        if self.stop is not None:
            raise self.stop

    async def _item(self, client: httpx.AsyncClient, item: _Item) -> None:
        tried = 0
        while self.stop is None:
            if not await self._reserve(item.worst):
                return
            entered = await self.pace.enter()
            outcome: Success | Failure | None = None
            limit_name = self.t._limit_name
            headers: Mapping[str, str] = {}
            try:
                if self.stop is None:
                    outcome, headers = await self._try(client, item)
                    if isinstance(outcome, Success):
                        self._keep(item, outcome)
            except SlmopsError as error:  # the answers cannot be kept: spend nothing more
                self._halt(error)
            finally:
                wait = self._wait(outcome, headers)
                crowded = isinstance(outcome, Failure) and outcome.kind.startswith("HTTP 429")
                await self.pace.leave(entered, answered=isinstance(outcome, Success), crowded=crowded, wait_s=wait)
                await self._settle(item, outcome)
            if outcome is None or isinstance(outcome, Success):
                return
            if limit_name == "max_tokens" and wants_completion_limit(outcome):
                self.t._limit_name = "max_completion_tokens"
                continue
            tried += 1
            if not self._again(outcome, tried):
                self._give_up(outcome)
                return
            seed = f"{self.t._ctx.seed}:{item.key}:{tried}"
            await self._sleep((wait or 0.0) + self.t._backoff.delay(tried - 1, seed))

    async def _sleep(self, seconds: float) -> None:
        """Wait, but not on when the run has a reason to stop."""
        waits = {asyncio.ensure_future(self.t._clock.sleep(seconds)), asyncio.ensure_future(self.stopped.wait())}
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def _try(self, client: httpx.AsyncClient, item: _Item) -> tuple[Success | Failure, Mapping[str, str]]:
        import httpx

        self.ledger.requests += 1
        limit = self.endpoint.timeout_s
        try:
            async with asyncio.timeout(limit):
                headers = self._headers()
                async with client.stream("POST", self.t._url, content=self.t._body(item), headers=headers) as reply:
                    body = bytearray()
                    async for chunk in reply.aiter_bytes():
                        body += chunk
                        if len(body) > MOST_BYTES:
                            return Failure("a reply without end", f"more than {MOST_BYTES >> 20} MiB", retry=True), {}
            kind = reply.headers.get("content-type", "").lower()
            outcome = read_reply(reply.status_code, kind, bytes(body))
            return (outcome if isinstance(outcome, Success) else self._clean(outcome)), reply.headers
        except httpx.ConnectTimeout:
            return Failure("no connection in time", f"{CONNECT_S:g} s", retry=True, hint=self._reach()), {}
        except (TimeoutError, httpx.TimeoutException):
            hint = "raise teacher.endpoint.timeout_s, or look whether the endpoint still works"
            detail = f"teacher.endpoint.timeout_s is {limit:g}"
            tries = None if self.answers or self.known else SILENT_TRIES
            return Failure("no answer in time", detail, retry=True, hint=hint, tries=tries, billed=True), {}
        except httpx.ConnectError as error:
            return self._clean(self._no_connection(str(error))), {}
        except httpx.RemoteProtocolError as error:
            cut = "incomplete" in str(error) or "without sending complete" in str(error)
            kind = "the reply was cut off" if cut else "the connection broke"
            return self._clean(Failure(kind, str(error), retry=True, billed=True)), {}
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            what = f"{type(error).__name__}: {error}"
            return self._clean(Failure("the connection broke", what, retry=True, billed=True)), {}

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json"}
        if self.key is None:
            return headers
        azure = self.endpoint.api == "azure"
        return headers | ({"api-key": self.key} if azure else {"Authorization": f"Bearer {self.key}"})

    def _no_connection(self, said: str) -> Failure:
        if "CERTIFICATE" in said.upper():
            hint = "trust the endpoint's certificate (SSL_CERT_FILE), or use http:// for a server on this machine"
            return Failure("its certificate is not trusted", said, fatal=True, hint=hint)
        return Failure("no connection", said, retry=True, hint=self._reach())

    def _reach(self) -> str:
        ollama = " (`ollama serve`)" if urlsplit(self.t._url).port == 11434 else ""
        return f"is the server running{ollama}, and can this machine reach it? Check teacher.endpoint.url"

    def _clean(self, failure: Failure) -> Failure:
        """The failure without anything that looks like a key."""
        detail = failure.detail
        if self.key:
            detail = detail.replace(self.key, "***")
        detail = re.sub(r"(?i)\b(bearer\s+|(?:sk|key|pk)-)[\w*.\-]{6,}", r"\1***", detail)
        return replace(failure, detail=detail)

    def _wait(self, outcome: Success | Failure | None, headers: Mapping[str, str]) -> float | None:
        wait = (
            retry_after(headers, self.t._ctx.clock() or time.time())
            if isinstance(outcome, Failure) and outcome.retry
            else None
        )
        if wait is not None and wait > LONGEST_WAIT_S:
            self._halt(
                EndpointError(
                    f"{self._where()} asks to wait {wait / 60:.0f} minutes ({outcome})",
                    f"run the same command again after that. {self._kept()}",
                )
            )
        left = exhausted_for(headers)
        waits = [w for w in (wait, left) if w is not None]
        return max(waits) if waits else None

    def _keep(self, item: _Item, success: Success) -> None:
        self.t._store.put(item.key, success.answer)
        self.answers[item.key] = success.answer
        self.in_a_row = 0
        self.ledger.answered += 1
        self.progress.advance(1, f"spent {self.ledger.cost:.4f}" if self.ledger.cost else "")

    def _again(self, failure: Failure, tried: int) -> bool:
        most = self.endpoint.retries + 1
        most = most if failure.tries is None else min(most, failure.tries)
        again = failure.retry and tried < most
        if again and failure.kind not in self.t._said:
            self.t._said.add(failure.kind)
            self.progress.log(f"{self._where()}: {failure}; trying again (at most {most} tries)")
        return again

    def _give_up(self, failure: Failure) -> None:
        self.given_up.append(failure)
        self.ledger.failed += 1
        self.ledger.failures[failure.kind] += 1
        self.progress.advance(1)
        if not failure.prompt:
            self.in_a_row += 1
        ratio = self.endpoint.min_success_ratio
        allowed = self.total * (1 - ratio) + 1e-9
        if failure.fatal or (failure.settings and not self.answers and not self.known):
            self._halt(EndpointError(f"{self._where()}: {failure}", f"{failure.hint}. {self._kept()}".lstrip(". ")))
        elif len(self.given_up) > allowed or (ratio > 0 and self.in_a_row >= max(GIVE_UP, self.endpoint.concurrency)):
            self._halt(self._too_many())

    def _success(self) -> float:
        return 1 - len(self.given_up) / self.total

    def _too_many(self) -> EndpointError:
        kind, count = Counter(f.kind for f in self.given_up).most_common(1)[0]
        example = next(f for f in self.given_up if f.kind == kind)
        done = len(self.given_up) + len(self.answers) + self.known
        message = (
            f"{len(self.given_up)} of {done} requests to {self._where()} failed; at least "
            f"{self.endpoint.min_success_ratio:.0%} have to succeed. Most often ({count} times): {example}"
        )
        return EndpointError(message, f"{example.hint or 'try again later'}. {self._kept()}")

    def _halt(self, error: SlmopsError) -> None:
        if self.stop is None:
            self.stop = error
            self.pace.closed = True
            self.stopped.set()

    def _where(self) -> str:
        return shown(self.t._url)

    def _kept(self) -> str:
        return "Every answer that came is kept: the same command asks only for the rest"

    async def _reserve(self, worst: float) -> bool:
        budget, ledger = self.t._ctx.budget, self.ledger
        if budget is None:
            return True
        async with self.settled:
            while self.stop is None:
                spent = ledger.cost + ledger.unsure
                if spent + self.reserved + worst <= budget + 1e-12:
                    self.reserved += worst
                    return True
                if self.reserved <= 1e-12:  # nothing under way could turn out cheaper than feared
                    left = len(self.todo) - len(self.answers) - len(self.given_up)
                    self._halt(
                        BudgetError(
                            f"the budget of {budget:g} is used up: {spent:.4f} spent, the next request could cost up to "
                            f"{worst:.4f}, {left} answers are missing",
                            f"give a larger --budget, or lower max_output_tokens. {self._kept()}",
                        )
                    )
                    break
                await self.settled.wait()
            self.settled.notify_all()
        return False

    async def _settle(self, item: _Item, outcome: Success | Failure | None) -> None:
        ledger = self.ledger
        usage = outcome.usage if outcome is not None else None
        if isinstance(outcome, Success) and usage is None:
            ledger.uncounted += 1
            said = len(outcome.answer.text.encode("utf-8", "surrogatepass"))
            usage = (sum(len(m["content"]) for m in item.messages) // 3, min(said, item.sampling.max_new_tokens))
        if usage is not None:
            ledger.prompt_tokens += usage[0]
            ledger.completion_tokens += usage[1]
            ledger.cost += self.t._price(*usage)
        elif isinstance(outcome, Failure) and outcome.billed:
            ledger.unsure += item.worst
        if self.t._ctx.budget is not None:
            async with self.settled:
                self.reserved -= item.worst
                self.settled.notify_all()


def _answer(stored: StoredAnswer | None) -> Answer | None:
    if stored is None:
        return None
    return Answer(stored.text, stored.finished, stored.prompt_tokens, stored.completion_tokens)


def _run_async(work: Coroutine[Any, Any, None]) -> None:
    """Run to the end, also where a loop already runs in this thread (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work)
        return
    errors: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(work)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
