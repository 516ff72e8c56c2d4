"""What becomes of `slmops serve` under many clients for a long time? One that answers wrongly, hangs, loses a row or grows is found here.

.venv/bin/python benchmarks/soak.py --minutes 30 --clients 64

A random model in two versions, asked in both dialects: whole answers and streams, each compared with what the engine says alone;
clients that leave; prompts that are too long; keys that are wrong; meanwhile its process is killed and its version swapped, again and
again. At the end SIGTERM comes under load. Prints a table; `--json FILE` writes all counts. Ends with 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import statistics
import string
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

WORK = Path("build/bench/soak")
CONTEXT, ROWS, QUESTIONS = 512, 16, 40
PATIENCE_S = 60.0
"""A request that takes longer is stuck."""
GRACE_S = 5.0
"""So long after a kill an answer may still fail, as the model is being loaded again."""
ACTIONS = {"whole": 34, "stream": 24, "leave": 16, "ollama": 10, "too long": 8, "bad key": 8}


@dataclass(frozen=True)
class Question:
    """A prompt, how long its answer may be, and what each version says to it."""

    text: str
    most: int
    answers: tuple[str, ...]

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation."""
        return [{"role": "user", "content": self.text}]

    def body(self, **more: Any) -> dict[str, Any]:
        """For OpenAI's dialect."""
        wanted = {"model": "soak", "messages": self.messages, "temperature": 0, "max_completion_tokens": self.most}
        return wanted | more


@dataclass
class Found:
    """What happened."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    slowest_s: float = 0.0
    kills: list[float] = field(default_factory=list)
    swaps: int = 0
    memory: list[tuple[float, int, int]] = field(default_factory=list)
    """Seconds since the start, resident bytes of the server and of its models' processes."""


def make(folder: Path, seed: int) -> None:
    """A random model of four layers as ONNX Runtime GenAI's folder."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    from slmops.convert import onnx_genai
    from slmops.engines.minimal import END, VOCABULARY, _write_tokenizer

    source, graph = folder / "source", folder / "graph"
    for part in (source, graph, folder / "model"):
        part.mkdir(parents=True, exist_ok=True)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=CONTEXT, bos_token_id=None, eos_token_id=END, pad_token_id=END,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.25)
    model.save_pretrained(source)
    _write_tokenizer(source)
    onnx_genai.build(source, graph)
    onnx_genai.write(source, graph, folder / "model", onnx_genai.Params(precision="int4"))


def questions(folders: list[Path]) -> list[Question]:
    """Prompts of many lengths with the answers of ONNX Runtime GenAI alone."""
    from slmops.core.engine import Sampling
    from slmops.engines import open_engine
    from slmops.engines.plain_tokenizer import PlainTokenizer

    chance = random.Random(5)
    asked = []
    for number in range(QUESTIONS):
        text = "".join(chance.choices(string.ascii_letters + "  ", k=chance.randrange(4, 300)))
        asked.append((f"{number} {text}", chance.choice((8, 16, 32, 64, 120))))
    answers = []
    for folder in folders:
        engine, tokenizer = open_engine(folder, threads=1), PlainTokenizer(folder, "serve")
        said = []
        for text, most in asked:
            prompt = engine.encode([{"role": "user", "content": text}])
            said.append(tokenizer.decode(engine.generate([prompt], Sampling(max_new_tokens=most))[0].tokens))
        answers.append(said)
        engine.close()
    return [Question(text, most, said) for (text, most), said in zip(asked, zip(*answers, strict=True), strict=True)]


class Soak:
    """Clients over a server."""

    def __init__(
        self, url: str, pid: int, key: str, folders: list[Path], asked: list[Question], options: argparse.Namespace
    ) -> None:
        self.url, self.pid, self.key, self.folders, self.asked, self.options = url, pid, key, folders, asked, options
        self.found, self.began, self.over = Found(), time.monotonic(), False

    def client_of(self, patience: float = PATIENCE_S) -> httpx.AsyncClient:
        """With the key."""
        headers = {"Authorization": f"Bearer {self.key}"}
        return httpx.AsyncClient(base_url=self.url, timeout=patience, headers=headers)

    def complain(self, action: str, what: str, begun: float) -> None:
        """A failure is wrong, unless a process was killed while the request was there or just before."""
        if any(begun - GRACE_S <= kill <= time.monotonic() for kill in self.found.kills):
            self.found.counts["failed beside a kill"] += 1
        else:
            self.found.wrong.append(f"{time.monotonic() - self.began:.0f} s, {action}: {what}"[:400])

    async def client(self, number: int) -> None:
        """One client until the time is over."""
        chance = random.Random(number)
        async with self.client_of() as http:
            while not self.over:
                action = chance.choices(list(ACTIONS), list(ACTIONS.values()))[0]
                begun = time.monotonic()
                try:
                    await getattr(self, action.replace(" ", "_"))(http, chance.choice(self.asked), chance, begun)
                except httpx.TimeoutException:
                    self.found.wrong.append(f"{begun - self.began:.0f} s, {action}: stuck")
                except httpx.HTTPError as error:
                    self.complain(action, repr(error), begun)
                self.found.counts[action] += 1
                self.found.slowest_s = max(self.found.slowest_s, time.monotonic() - begun)
                await asyncio.sleep(chance.expovariate(self.options.rate))

    def judge(self, action: str, question: Question, text: str, begun: float) -> None:
        """A whole answer is one version's, or wrong: also beside a kill."""
        if text not in question.answers:
            self.found.wrong.append(
                f"{begun - self.began:.0f} s, {action}: a wrong answer to {question.text[:20]!r}: {text[:80]!r}"
            )

    async def whole(self, http: httpx.AsyncClient, question: Question, chance: random.Random, begun: float) -> None:
        """An answer at once."""
        got = await http.post("/v1/chat/completions", json=question.body())
        if got.status_code == 200:
            self.judge("whole", question, got.json()["choices"][0]["message"]["content"], begun)
        else:
            self.complain("whole", f"{got.status_code} {got.text}", begun)

    async def stream(self, http: httpx.AsyncClient, question: Question, chance: random.Random, begun: float) -> None:
        """An answer in pieces."""
        text, ended = "", False
        async with http.stream("POST", "/v1/chat/completions", json=question.body(stream=True)) as got:
            if got.status_code != 200:
                return self.complain("stream", f"{got.status_code} {(await got.aread()).decode()}", begun)
            async for line in got.aiter_lines():
                if line == "data: [DONE]":
                    ended = True
                elif line:
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        return self.complain("stream", line, begun)
                    text += event["choices"][0]["delta"].get("content") or ""
        if ended:
            return self.judge("stream", question, text, begun)
        return self.complain("stream", "it ended without its end", begun)

    async def leave(self, http: httpx.AsyncClient, question: Question, chance: random.Random, begun: float) -> None:
        """A client that does not wait."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(chance.choice((0, 0.01, 0.1, 0.5))):
                await http.post("/v1/chat/completions", json=question.body(stream=chance.random() < 0.5))

    async def ollama(self, http: httpx.AsyncClient, question: Question, chance: random.Random, begun: float) -> None:
        """A stream in Ollama's dialect."""
        options = {"temperature": 0, "num_predict": question.most}
        got = await http.post("/api/chat", json={"model": "soak", "messages": question.messages, "options": options})
        lines = [json.loads(line) for line in got.text.splitlines()]
        if got.status_code != 200 or any("error" in line for line in lines):
            return self.complain("ollama", f"{got.status_code} {got.text[-300:]}", begun)
        return self.judge("ollama", question, "".join(line["message"]["content"] for line in lines), begun)

    async def too_long(self, http: httpx.AsyncClient, question: Question, chance: random.Random, begun: float) -> None:
        """A prompt that leaves no room."""
        text = "x" * chance.randrange(CONTEXT, 40 * CONTEXT)
        got = await http.post("/v1/chat/completions", json=question.body(messages=[{"role": "user", "content": text}]))
        if got.status_code != 400 or got.json()["error"]["code"] != "context_length_exceeded":
            self.complain("too long", f"{got.status_code} {got.text}", begun)

    async def bad_key(self, http: httpx.AsyncClient, question: Question, chance: random.Random, begun: float) -> None:
        """Somebody who may not."""
        key = self.key[:-1] + ("0" if self.key[-1] != "0" else "1") if chance.random() < 0.5 else "none"
        got = await http.post("/v1/chat/completions", json=question.body(), headers={"Authorization": f"Bearer {key}"})
        if got.status_code != 401:
            self.complain("bad key", f"{got.status_code} {got.text}", begun)

    async def kill(self) -> None:
        """Kill a model's process now and then."""
        chance = random.Random(7)
        while not self.over:
            await self.pause(self.options.kill_every)
            processes = workers(self.pid)
            if processes and not self.over:
                self.found.kills.append(time.monotonic())
                self.found.counts["kills"] += 1
                with contextlib.suppress(ProcessLookupError):
                    os.kill(chance.choice(processes), signal.SIGKILL)

    async def swap(self) -> None:
        """Put the other version in its place now and then."""
        async with self.client_of(2 * PATIENCE_S) as http:
            place = 0
            while not self.over:
                await self.pause(self.options.swap_every)
                if self.over:
                    return
                other = 1 - place
                canaries = [
                    {"messages": one.messages, "expect": one.answers[other], "max_tokens": one.most}
                    for one in self.asked[:3]
                ]
                body = {"folder": str(self.folders[other].resolve()), "canaries": canaries}
                begun = time.monotonic()
                got = await http.post("/admin/models/soak/swap", json=body)
                if got.status_code == 200:
                    self.found.swaps += 1
                    place = other
                else:
                    self.complain("swap", f"{got.status_code} {got.text}", begun)

    async def watch(self) -> None:
        """Take down the memory every five seconds."""
        while not self.over:
            here = resident([self.pid]), resident(workers(self.pid))
            self.found.memory.append((time.monotonic() - self.began, *here))
            await self.pause(5)

    async def pause(self, seconds: float) -> None:
        """Sleep, less where the time is over."""
        end = time.monotonic() + seconds
        while not self.over and time.monotonic() < end:
            await asyncio.sleep(min(0.2, seconds))

    async def run(self) -> None:
        """All of it, and what is left at the end."""
        others = [asyncio.create_task(one) for one in (self.kill(), self.swap(), self.watch())]
        clients = [asyncio.create_task(self.client(number)) for number in range(self.options.clients)]
        end = self.began + 60 * self.options.minutes
        while time.monotonic() < end:
            await asyncio.sleep(min(30, max(0.1, end - time.monotonic())))
            total, wrong = sum(self.found.counts.values()), len(self.found.wrong)
            say(f"{time.monotonic() - self.began:5.0f} s  {total} requests, {wrong} wrong")
        self.over = True
        _, late = await asyncio.wait(clients, timeout=2 * PATIENCE_S)
        for task in late:
            task.cancel()
            self.found.wrong.append("a client was never answered")
        await asyncio.gather(*others)
        await self.rest()
        await self.end()

    async def rest(self) -> None:
        """When nobody asks, no row is busy and nobody waits; and all rows take an answer at once."""
        async with self.client_of() as http:
            await asyncio.sleep(2 * GRACE_S)
            busy = gauges((await http.get("/metrics")).text)
            if len(busy) < 3 or any(busy.values()):
                self.found.wrong.append(f"at rest: {busy or 'the metrics say nothing'}")
            begun = time.monotonic()
            await asyncio.gather(*(self.whole(http, one, random.Random(), begun) for one in self.asked[:ROWS]))

    async def end(self) -> None:
        """SIGTERM under load: what was begun is finished, what comes later gets 503."""
        begun = time.monotonic()
        self.found.kills.clear()  # nothing excuses a failure here
        async with self.client_of() as http:
            long = [one for one in self.asked if one.most >= 64]
            work = [self.stream(http, long[number % len(long)], random.Random(), begun) for number in range(48)]
            streams = [asyncio.create_task(one) for one in work]
            await asyncio.sleep(0.3)
            self.found.counts["streams at SIGTERM"] = sum(not task.done() for task in streams)
            os.kill(self.pid, signal.SIGTERM)
            await asyncio.sleep(0.05)
            try:
                got = await http.post("/v1/chat/completions", json=self.asked[0].body())
                if got.status_code != 503:
                    self.found.wrong.append(f"after SIGTERM: {got.status_code}")
            except httpx.ConnectError:
                self.found.counts["ended before it could refuse"] += 1
            await asyncio.gather(*streams)


def gauges(text: str) -> dict[str, float]:
    """Busy rows, waiting requests and open ones in Prometheus' text, but the one that asks."""
    found = {name: float(value) for name, value in re.findall(r"^(slmops_(?:rows_busy|waiting)\S*) (\S+)$", text, re.M)}
    opened = re.search(r"^slmops_requests_open (\S+)$", text, re.M)
    return found | ({"slmops_requests_open": float(opened[1])} if opened else {})


def workers(pid: int) -> list[int]:
    """Processes of models below a process."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir() if Path(f"/proc/{pid}").exists() else ():
        with contextlib.suppress(OSError):
            found += [int(child) for child in (task / "children").read_text().split()]
    return found


def resident(pids: list[int]) -> int:
    """Bytes."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return total


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def growth(memory: list[tuple[float, int, int]], index: int) -> tuple[float, float]:
    """Medians of the second and of the last sixth of the time, MB."""
    sixth = max(1, len(memory) // 6)
    parts = (memory[sixth : 2 * sixth] or memory, memory[-sixth:])
    early, late = (statistics.median(row[index] for row in part) / 1e6 for part in parts)
    return early, late


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, metavar="N")
    parser.add_argument("--clients", type=int, default=64, metavar="N")
    parser.add_argument("--rate", type=float, default=2, metavar="N", help="requests a second that a client begins (2)")
    parser.add_argument("--kill-every", type=float, default=45, metavar="SECONDS")
    parser.add_argument("--swap-every", type=float, default=20, metavar="SECONDS")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    folders = [WORK / f"version-{seed}" / "model" for seed in (1, 2)]
    for seed, folder in enumerate(folders, 1):
        if not (folder / "genai_config.json").is_file():
            say(f"making version {seed}")
            make(folder.parent, seed)
    asked = questions(folders)
    keys = WORK / "keys.json"
    keys.unlink(missing_ok=True)
    slmops = [sys.executable, "-m", "slmops.cli.main"]
    adding = [*slmops, "keys", "add", "soak", "--scope", "infer,admin", "--file", str(keys), "--json"]
    made = subprocess.run(adding, capture_output=True, text=True, check=True)
    key = json.loads(made.stdout)["key"]
    command = [*slmops, "serve", f"soak={folders[0]}", "--port", "0", "--rows", str(ROWS), "--threads", "1"]
    command += ["--keys", str(keys), "--definitions", str(WORK / "definitions")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            url = next(found[1] for line in process.stderr if (found := re.match(r"serving (http://[^/\s]+)", line)))
            soak = Soak(url, process.pid, key, folders, asked, options)
            asyncio.run(soak.run())
            code = process.wait(timeout=PATIENCE_S)
        finally:
            process.kill()
    found = soak.found
    if code:
        found.wrong.append(f"the server ended with {code}")
    for name, count in found.counts.most_common():
        print(f"{name:28} {count:9,}")
    print(f"{'swaps':28} {found.swaps:9,}")
    print(f"{'slowest request':28} {found.slowest_s:9.1f} s")
    for name, index in (("server", 1), ("models", 2)):
        early, late = growth(found.memory, index)
        print(f"{f'memory of the {name}':28} {early:9.1f} MB early, {late:.1f} MB at the end")
    print(f"{'wrong':28} {len(found.wrong):9,}")
    for line in found.wrong[:20]:
        print(f"  {line}")
    if options.json:
        whole = {"counts": found.counts, "wrong": found.wrong, "swaps": found.swaps, "slowest_s": found.slowest_s,
                 "memory": found.memory}  # fmt: skip
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    return int(bool(found.wrong))


if __name__ == "__main__":
    raise SystemExit(main())
