"""What keys, limits, deadlines, logs, metrics and traces cost: tokens a second of streams with and without them, in turns.

    python benchmarks/serve_observed.py MODEL_FOLDER [--before SRC] [--streams 8] [--rounds 12]

Each form is a server of its own on the same core; the forms take turns, and a round's ratio is that of its own turns. `--before`: the
sources of another version, as a form without any of this. A collector that takes the traces runs beside.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx

PROMPT = "where is my parcel, and when will it be here?"


class Collector(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@contextlib.contextmanager
def server(model: str, options: list[str], source: str) -> Iterator[tuple[str, int]]:
    command = [
        sys.executable,
        "-m",
        "slmops.cli.main",
        "serve",
        f"m={model}",
        "--port",
        "0",
        "--threads",
        "1",
        *options,
    ]
    path = os.pathsep.join([source, os.environ.get("PYTHONPATH", "")]) if source else os.environ.get("PYTHONPATH", "")
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.match(r"serving (\S+)/v1", line):
                threading.Thread(target=process.stderr.read, daemon=True).start()
                yield found[1], process.pid
                break
        process.terminate()


def processor_seconds(pid: int) -> float:
    """Of all its threads."""
    return sum(int(file.read_text().split()[0]) for file in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


def model_of(pid: int) -> int:
    """The process of a server's model."""
    stats = {int(file.parent.name): file.read_text() for file in Path("/proc").glob("[0-9]*/stat") if file.exists()}
    return next(other for other, text in stats.items() if int(text.rpartition(")")[2].split()[1]) == pid)


def turn(address: str, pid: int, token: str, streams: int, tokens: int) -> tuple[float, float, float]:
    """Tokens a second, and processor time in microseconds a token: of the server, and of server and model."""
    counts, model = [0] * streams, model_of(pid)

    def stream(number: int) -> None:
        body = {
            "model": "m", "messages": [{"role": "user", "content": f"{PROMPT} {number}"}], "stream": True, "max_tokens": tokens,
            "seed": number, "stream_options": {"include_usage": True},
        }  # fmt: skip
        headers = {"authorization": f"Bearer {token}"}
        with httpx.stream(
            "POST", f"{address}/v1/chat/completions", json=body, headers=headers, timeout=120
        ) as response:
            for line in response.iter_lines():
                if '"usage":{' in line:
                    counts[number] = json.loads(line.removeprefix("data: "))["usage"]["completion_tokens"]

    threads = [threading.Thread(target=stream, args=(number,)) for number in range(streams)]
    used, used_by_model, began = processor_seconds(pid), processor_seconds(model), time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took, total = time.perf_counter() - began, sum(counts)
    own, models = processor_seconds(pid) - used, processor_seconds(model) - used_by_model
    return total / took, own / total * 1e6, (own + models) / total * 1e6


def interval(values: list[float]) -> str:
    chance = random.Random(0)
    medians = sorted(statistics.median(chance.choices(values, k=len(values))) for _ in range(2000))
    return f"{statistics.median(values):.3f} ({medians[50]:.3f} to {medians[1949]:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--before", default="")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=200)
    options = parser.parse_args()
    collector = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        keys = f"{scratch}/keys.json"
        made = [sys.executable, "-m", "slmops.cli.main", "keys", "add", "bench", "--file", keys]
        token = subprocess.run(made, check=True, capture_output=True, text=True).stdout.strip()
        all_of_it = [
            "--keys", keys, "--requests-per-minute", "100000", "--tokens-per-minute", "100000000", "--answers", "64", "--deadline", "300",
            "--log", f"{scratch}/log", "--traces", f"http://127.0.0.1:{collector.server_port}",
        ]  # fmt: skip
        forms = {"plain": ([], ""), "all": (all_of_it, "")}
        if options.before:
            forms = {"before": ([], options.before), **forms}
        running = {name: stack.enter_context(server(options.model, *form)) for name, form in forms.items()}
        found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in running}
        for number in range(options.rounds + 1):
            for name in random.Random(number).sample(list(running), len(running)):
                result = turn(*running[name], token, options.streams, options.tokens)
                if number:  # the first warms up
                    found[name].append(result)
    first = next(iter(found))
    for name, results in found.items():
        medians = [statistics.median(column) for column in zip(*results, strict=True)]
        print(
            f"{name}: {medians[0]:.0f} tokens/s; µs of processor time a token: server {medians[1]:.0f}, both {medians[2]:.0f}"
        )
        if name != first:
            pairs = list(zip(results, found[first], strict=True))
            told = [interval([mine[i] / base[i] for mine, base in pairs]) for i in range(3)]
            print(f"  to {first}: speed ×{told[0]}, server ×{told[1]}, both ×{told[2]}")


if __name__ == "__main__":
    main()
