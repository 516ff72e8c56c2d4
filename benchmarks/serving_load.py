"""Clients for `serving.py`: streams of requests over plain sockets, each token's arrival noted and read only afterwards.

So the clients take little of the machine: a stream costs a wake-up for each piece that comes, and no parsing while it runs.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Heard:
    """An answer as a client got it: when it was asked for, when each event with text came, when the last byte came."""

    asked: float
    ended: float = 0.0
    texts: list[float] = field(default_factory=list)
    tokens: int = 0
    read: int = 0
    parts: list[tuple[float, bytes]] = field(default_factory=list)
    """What came and when, until it is read."""

    @property
    def gaps(self) -> list[float]:
        """Seconds between events with text."""
        return [b - a for a, b in zip(self.texts, self.texts[1:], strict=False)]


async def load(
    port: int,
    prompts: Sequence[str],
    streams: int,
    body: dict[str, Any],
    stream: bool = True,
    path: str = "/v1/completions",
) -> tuple[float, list[Heard]]:
    """Answers to all prompts, so many at a time, and the seconds that took.

    Args:
        body: of each request, beside the prompt.
        path: of completions, or of chat completions, to which the prompt is a message.
    """
    left = iter(prompts)
    heard: list[Heard] = []

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
        for prompt in left:
            said = {"messages": [{"role": "user", "content": prompt}]} if "/chat/" in path else {"prompt": prompt}
            whole = {**body, **said, "stream": stream}
            try:
                one = await _ask(reader, writer, path, whole)
            except (asyncio.IncompleteReadError, ConnectionError):  # the server keeps no connection, or not for so long
                writer.close()
                reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
                one = await _ask(reader, writer, path, whole)
            heard.append(one)
        writer.close()

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(streams)))
    seconds = time.perf_counter() - began
    for one in heard:
        _understand(one, one.parts, stream)
        one.parts = []
    return seconds, heard


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str, body: dict[str, Any]) -> Heard:
    raw = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    found = Heard(time.perf_counter())
    writer.write(head.encode() + raw)
    answer = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    if " 200 " not in answer.split("\r\n", 1)[0]:
        raise SystemExit(f"the server refused: {answer}{(await reader.read(2000)).decode(errors='replace')}")
    parts = found.parts
    if "transfer-encoding: chunked" in answer:
        while size := int((await reader.readline()).strip() or b"0", 16):
            part = await reader.readexactly(size + 2)
            parts.append((time.perf_counter(), part[:-2]))
        await reader.readline()
    else:
        length = int(answer.split("content-length:")[1].split("\r\n")[0])
        parts.append((0.0, await reader.readexactly(length)))
        parts[0] = (time.perf_counter(), parts[0][1])
    found.ended = time.perf_counter()
    return found


def _understand(found: Heard, parts: Sequence[tuple[float, bytes]], stream: bool) -> None:
    if not stream:
        _usage(found, json.loads(b"".join(part for _, part in parts)))
        return
    kept = b""
    for when, part in parts:
        *events, kept = (kept + part).replace(b"\r\n", b"\n").split(b"\n\n")
        texts = 0
        for event in events:
            if event.startswith(b"data: {"):
                said = json.loads(event[6:])
                if "error" in said:
                    raise SystemExit(f"the server failed: {said['error']}")
                texts += any(
                    choice.get("text") or choice.get("delta", {}).get("content") for choice in said.get("choices", ())
                )
                _usage(found, said)
        found.texts += [when] * texts


def _usage(found: Heard, said: dict[str, Any]) -> None:
    usage = said.get("usage")
    if usage:
        found.tokens, found.read = usage["completion_tokens"], usage["prompt_tokens"]
