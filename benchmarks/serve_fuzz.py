"""Malformed bodies sent to a server, in OpenAI's and in Ollama's dialect: none may make it fail.

    python benchmarks/serve_fuzz.py http://127.0.0.1:8000 MODEL [--count 10000] [--dialect ollama] [--pid PID_OF_THE_SERVER]

A body is a request that would be good, changed at random: a value replaced by one of another kind, a field left out, doubled or added, an
object nested deeply, bytes cut or overwritten. It ends with 1 if an answer has a status of 500 or more, an error in another shape than
the dialect's, if the server is no longer there or a model's process died, and, with `--pid`, if the memory of the server or of its
models' processes still grows by more than `GROWTH_MB` in the last two fifths of the bodies (Linux only).
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx

from soak import resident, workers

SCHEMA = {
    "type": "object", "required": ["a"], "additionalProperties": False,
    "properties": {
        "a": {"type": "integer", "minimum": -5, "maximum": 5}, "b": {"enum": ["x", None]}, "c": {"type": "integer", "const": 1},
        "d": {"type": "string", "pattern": "a+", "maxLength": 9}, "e": {"type": "array", "items": {"anyOf": [{"$ref": "#/$defs/f"}]}},
    },
    "$defs": {"f": {"type": "string", "format": "date"}},
}  # fmt: skip
FUNCTION = {"name": "f", "description": "d", "parameters": SCHEMA, "strict": True}
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
GOOD: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {
        "messages": [
            {"role": "system", "content": "be brief"}, {"role": "user", "content": [{"type": "text", "text": "hello"}]},
            {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "call_1", "content": "3"},
        ],
        "tools": [{"type": "function", "function": FUNCTION}], "tool_choice": {"type": "function", "function": {"name": "f"}},
        "parallel_tool_calls": False, "max_tokens": 3, "temperature": 1.0, "top_p": 0.9, "n": 2, "stop": ["x"], "seed": 1,
        "logit_bias": {"5": 1}, "logprobs": True, "top_logprobs": 2, "stream": False, "metadata": {"a": "b"},
    }),
    ("/v1/chat/completions", {
        "messages": [{"role": "user", "content": "hello"}], "max_completion_tokens": 2, "stream": True,
        "stream_options": {"include_usage": True},
        "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA, "strict": True}},
    }),
    ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 2, "logprobs": 2, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1}),
    ("/v1/completions", {"prompt": [5, 6], "max_tokens": 2, "presence_penalty": 1, "frequency_penalty": -1, "stop": "x"}),
    ("/v1/responses", {
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "hello"}]},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "3"},
        ],
        "instructions": "x", "max_output_tokens": 2, "tools": [{"type": "function", **FUNCTION}], "tool_choice": "auto", "store": True,
        "text": {"format": {"type": "json_schema", "name": "s", "schema": SCHEMA}}, "include": ["message.output_text.logprobs"],
    }),
    ("/v1/embeddings", {"input": ["a"], "encoding_format": "base64", "dimensions": 3}),
]  # fmt: skip
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA}}
OPTIONS = {
    "temperature": 0.5, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "seed": 3, "num_predict": 2, "num_ctx": 60, "stop": ["x"],
    "repeat_penalty": 1.1, "repeat_last_n": -1, "presence_penalty": 0.5, "num_thread": 2, "mirostat": 0,
}  # fmt: skip
TURNS = "{{ if .System }}{{ .System }}{{ end }}{{ .Prompt }}{{ .Response }}"
OLLAMA: list[tuple[str, dict[str, Any]]] = [
    ("/api/generate", {
        "prompt": "hello", "system": "s", "template": TURNS, "options": OPTIONS, "stream": False, "keep_alive": "5m", "think": False,
        "logprobs": True, "top_logprobs": 2,
    }),
    ("/api/generate", {"prompt": "hello", "raw": True, "format": SCHEMA, "options": {"num_predict": 2}, "keep_alive": 60}),
    ("/api/generate", {"prompt": "hello", "context": [5, 6, 7], "images": [], "suffix": "", "options": {"num_predict": 2}}),
    ("/api/chat", {
        "messages": [
            {"role": "system", "content": "be brief"}, {"role": "user", "content": "hello", "images": []},
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
            {"role": "tool", "content": "3", "tool_name": "f"},
        ],
        "tools": [TOOL], "options": {"num_predict": 2, "stop": "x"}, "format": "json", "stream": True,
    }),
    ("/api/chat", {
        "messages": [{"role": "user", "content": "hello"}], "options": {"num_predict": 2, "top_k": 3}, "format": SCHEMA, "stream": True,
        "logprobs": True, "top_logprobs": 3, "keep_alive": "1h30m",
    }),
    ("/api/show", {"verbose": True}),
    ("/api/create", {
        "model": "made", "from": "tiny", "system": "s", "template": TURNS, "license": ["a"], "parameters": OPTIONS, "stream": True,
        "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
    }),
    ("/api/create", {"name": "made", "modelfile": 'FROM tiny\nPARAMETER stop x\nSYSTEM """s"""\nMESSAGE user "x"\n', "stream": False}),
    ("/api/copy", {"source": "made", "destination": "other"}),
    ("/api/embed", {"input": ["a", "b"], "truncate": True, "dimensions": 3, "options": {}, "keep_alive": "1m"}),
    ("/api/embeddings", {"prompt": "a"}),
    ("/api/pull", {"stream": False}),
]  # fmt: skip
ODD: list[Any] = [
    None, True, -1, 0, 2**63, -(2**70), 1e308, 0.5, "", "x", "\x00", "\ud800", "é" * 50, [], {}, [[]], [None], {"": None}, {"type": "x"},
    [{}],
    {"$ref": "#"}, {"$ref": "#/$defs/none"}, [1, "a"], "null", {"type": "array", "items": {"$ref": "#"}},
]  # fmt: skip

GROWTH_MB = 4.0
"""More growth than this in the last two fifths is taken for a leak."""
FIFTHS, SAMPLES = 5, 20


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to all values in it that are not deep."""
    if len(path) > 12:
        return []
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, one in inside for place in places(one, (*path, key)))]


def malformed(random_: random.Random, model: str, dialect: str) -> tuple[str, bytes]:
    """A path and a body."""
    path, good = random_.choice(OLLAMA if dialect == "ollama" else GOOD)
    body: Any = copy.deepcopy({} if {"name", "source"} & good.keys() else {"model": model}) | copy.deepcopy(good)
    for _ in range(random_.choice((1, 1, 1, 2, 3))):
        place = random_.choice(places(body)[1:] or [()])
        holder, odd = body, copy.deepcopy(random_.choice(ODD))
        for key in place[:-1]:
            holder = holder[key]
        if not place:
            continue
        what = random_.randrange(6)
        if what == 0 and isinstance(holder, dict):
            del holder[place[-1]]
        elif what == 1 and isinstance(holder, dict):
            holder[random_.choice(("extra", "type", "$ref", "x-guidance", "items"))] = odd
        elif what == 2:
            for _ in range(random_.choice((3, 60, 300))):
                odd = {"items": odd} if random_.random() < 0.5 else [odd]
            holder[place[-1]] = odd
        elif what == 3 and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[0]) if holder else odd)
        else:
            holder[place[-1]] = odd
    raw = json.dumps(body).encode()
    if random_.random() < 0.15:
        cut = bytearray(raw)
        for _ in range(random_.randrange(1, 6)):
            cut[random_.randrange(len(cut))] = random_.randrange(256)
        raw = bytes(cut[: random_.randrange(1, len(cut) + 1)])
    return path, raw


def wrong(response: httpx.Response, dialect: str) -> str | None:
    """What is wrong with an answer, None if nothing is."""
    if response.status_code >= 500:
        return f"status {response.status_code}"
    if response.status_code == 200:
        return None
    try:
        said = response.json()["error"]
        if dialect == "ollama":
            return None if isinstance(said, str) and len(response.json()) == 1 else "an error in another shape"
        good = set(said) == {"message", "type", "param", "code"} and isinstance(said["message"], str)
    except (ValueError, KeyError, TypeError):
        good = False
    return None if good else "an error in another shape"


def fuzz(
    client: httpx.Client, model: str, count: int, seed: int = 0, dialect: str = "openai",
    before: Callable[[int], None] | None = None,
) -> tuple[Counter[int], list[str]]:  # fmt: skip
    """How often each status came, and what was wrong. `before`: called before each body, with its number."""
    random_ = random.Random(seed)
    codes: Counter[int] = Counter()
    faults = []
    for number in range(count):
        if before:
            before(number)
        path, raw = malformed(random_, model, dialect)
        response = client.post(path, content=raw, headers={"content-type": "application/json"})
        codes[response.status_code] += 1
        if said := wrong(response, dialect):
            faults.append(f"{number}: {said}: {path} {raw[:2000]!r}: {response.text[:200]}")
    return codes, faults


class Memory:
    """What the server and its models' processes hold, over the bodies."""

    def __init__(self, pid: int, count: int) -> None:
        self._pid, self._count = pid, count
        self._every = max(1, count // (FIFTHS * SAMPLES))
        self.found: list[tuple[int, float, float]] = []
        """How many bodies were sent, MB of the server, MB of its models' processes."""

    def take(self, number: int) -> None:
        """Take it down, from time to time."""
        if number % self._every == 0:
            self.found.append((number, resident([self._pid]) / 1e6, resident(workers(self._pid)) / 1e6))

    def part(self, fifth: int, index: int) -> float:
        """The most that was held in a fifth of the bodies."""
        begin, end = self._count * fifth / FIFTHS, self._count * (fifth + 1) / FIFTHS
        return max(row[index] for row in self.found if begin <= row[0] <= end)

    def growth(self, index: int) -> float:
        """In the last two fifths."""
        return self.part(FIFTHS - 1, index) - self.part(FIFTHS - 3, index)

    def table(self) -> str:
        """In words."""
        rows = [f"{'bodies':>9} {'server MB':>10} {'models MB':>10}"]
        for fifth in range(FIFTHS + 1):
            near = min(self.found, key=lambda row: abs(row[0] - self._count * fifth / FIFTHS))
            rows.append(f"{near[0]:9} {near[1]:10.1f} {near[2]:10.1f}")
        return "\n".join(rows)


def deaths(client: httpx.Client) -> int:
    """How often processes of models died."""
    found = re.findall(r"^slmops_model_deaths_total\{.*\} (\S+)$", client.get("/metrics").text, re.M)
    return int(sum(map(float, found)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", metavar="URL")
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dialect", choices=("openai", "ollama"), default="openai")
    parser.add_argument(
        "--pid", type=int, help="process of the server: its memory is looked at, and that of its models"
    )
    options = parser.parse_args()
    memory = Memory(options.pid, options.count) if options.pid else None
    with httpx.Client(base_url=options.url, timeout=120) as client:
        before = deaths(client)
        take = memory.take if memory else None
        codes, faults = fuzz(client, options.model, options.count, options.seed, options.dialect, take)
        there, died = client.get("/readyz").status_code, deaths(client) - before
    if died:
        faults.append(f"{died} processes of models died")
    if memory:
        memory.take(options.count)
        print(memory.table(), file=sys.stderr)
        for index, name in ((1, "server"), (2, "models")):
            if (grown := memory.growth(index)) > GROWTH_MB:
                faults.append(f"the memory of the {name} grew by {grown:.1f} MB in the last two fifths")
    found = {"codes": codes, "ready": there, "faults": faults[:20], "memory": memory.found if memory else None}
    print(json.dumps(found, indent=2 if memory is None else None))
    return 1 if faults or there != 200 else 0


if __name__ == "__main__":
    raise SystemExit(main())
