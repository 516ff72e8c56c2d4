"""The server as clients meet it: a process of its own, a model of one layer, HTTP."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from slmops.core.engine import Sampling
from slmops.engines import open_engine
from slmops.engines.minimal import write_minimal

pytestmark = pytest.mark.slow
HELLO = [{"role": "user", "content": "hello"}]


@contextlib.contextmanager
def served(folder: Path, *options: str) -> Iterator[tuple[httpx.Client, subprocess.Popen[str]]]:
    command = [
        sys.executable,
        "-m",
        "slmops.cli.main",
        "serve",
        "--port",
        "0",
        "--threads",
        "1",
        *options,
        f"tiny={folder}",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            lines = []
            for line in process.stderr:
                lines.append(line)
                if found := re.match(r"serving (https?://\S+)/v1", line):
                    with httpx.Client(base_url=found[1], timeout=60) as client:
                        yield client, process
                    break
            else:
                raise AssertionError("".join(lines))
        finally:
            process.kill()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    write_minimal(folder, "onnx_genai")
    return folder


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[httpx.Client]:
    with served(folder, "--rows", "3", "--queue", "4") as (client, _):
        yield client


def chat(client: httpx.Client, **more: Any) -> httpx.Response:
    return client.post("/v1/chat/completions", json={"model": "tiny", "messages": HELLO, "temperature": 0} | more)


def events(client: httpx.Client, **more: Any) -> list[dict[str, Any]]:
    body = {"model": "tiny", "messages": HELLO, "temperature": 0, "stream": True} | more
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = [line for line in response.iter_lines() if line]
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def text_of(found: list[dict[str, Any]], index: int = 0) -> str:
    return "".join(c["delta"].get("content", "") for e in found for c in e["choices"] if c["index"] == index)


def test_an_answer_is_that_of_the_engine_whole_and_in_pieces(client: httpx.Client, folder: Path) -> None:
    engine = open_engine(folder)
    prompt = engine.encode(HELLO)
    (expected,) = engine.generate([prompt], Sampling(max_new_tokens=20))
    whole = chat(client, max_completion_tokens=20).json()
    assert whole["choices"][0]["message"]["content"] == expected.text
    assert whole["choices"][0]["finish_reason"] == ("stop" if expected.finished else "length")
    usage = whole["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(prompt), len(expected.tokens))
    found = events(client, max_tokens=20, stream_options={"include_usage": True})
    assert text_of(found) == expected.text
    assert found[-1]["choices"] == [] and found[-1]["usage"] == usage
    assert found[0]["choices"][0]["delta"]["role"] == "assistant"
    assert [e["choices"][0]["finish_reason"] for e in found[:-1]].count(None) == len(found) - 2


def test_seeds_choices_stops_and_log_probabilities(client: httpx.Client) -> None:
    warm = {"temperature": 1.5, "seed": 3, "n": 3, "max_tokens": 12}
    first, again = chat(client, **warm).json(), chat(client, **warm).json()
    answers = [c["message"]["content"] for c in first["choices"]]
    assert answers == [c["message"]["content"] for c in again["choices"]] and len(set(answers)) == 3
    pieces = events(client, **warm)
    assert [text_of(pieces, index) for index in range(3)] == answers
    letters = {"temperature": 1.0, "seed": 1, "max_tokens": 12, "logit_bias": {str(5 + ord(c)): 100 for c in "abc"}}
    whole = chat(client, **letters).json()["choices"][0]["message"]["content"]
    assert len(whole) == 12 and set(whole) <= set("abc")
    cut = chat(client, **letters, stop=[whole[4:6]]).json()["choices"][0]
    assert cut["message"]["content"] == whole[: whole.index(whole[4:6])] and cut["finish_reason"] == "stop"
    told = chat(client, max_tokens=3, logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]["content"]
    assert len(told) == 3 and all(one["top_logprobs"][0]["logprob"] == one["logprob"] <= 0 for one in told)


def test_an_answer_goes_back_as_the_next_turn_and_nulls_are_as_good_as_nothing(client: httpx.Client) -> None:
    first = chat(client, max_tokens=4).json()["choices"][0]["message"]
    turns = [*HELLO, first, {"role": "user", "content": "x"}]
    empty = dict.fromkeys(
        ("top_p", "n", "stop", "stream", "logprobs", "tools", "seed", "response_format", "max_tokens")
    )
    again = chat(client, messages=turns, max_completion_tokens=4, **empty)
    assert again.status_code == 200 and again.json()["usage"]["completion_tokens"] <= 4


def test_completions_take_texts_and_tokens(client: httpx.Client) -> None:
    body = {"model": "tiny", "prompt": ["hello", "bye"], "temperature": 0, "max_tokens": 5}
    found = client.post("/v1/completions", json=body).json()
    assert [c["index"] for c in found["choices"]] == [0, 1] and found["usage"]["completion_tokens"] == 10
    one = client.post("/v1/completions", json=body | {"prompt": "bye", "logprobs": 2}).json()["choices"][0]
    assert one["text"] == found["choices"][1]["text"]
    assert len(one["logprobs"]["tokens"]) == 5 and one["logprobs"]["text_offset"][0] == 0
    assert client.post("/v1/completions", json=body | {"prompt": [5, 999]}).json()["error"]["param"] == "prompt"


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"tools": []}, 400, "tools"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}},
            400,
            "response_format",
        ),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools"),
        ({"tool_choice": "required"}, 400, "tool_choice"),
        ({"temperature": 3}, 400, "temperature"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 100}]}, 400, "messages"),
        ({"logit_bias": {"100000": 1}}, 400, "logit_bias"),
        ({"model": "other"}, 404, "model"),
        ({"max_tokens": 0}, 400, "max_tokens"),
    ],
)
def test_what_cannot_be_done_is_an_error_that_names_it(
    client: httpx.Client, change: dict[str, Any], status: int, param: str
) -> None:
    refused = chat(client, **change)
    assert refused.status_code == status
    said = refused.json()["error"]
    assert said["param"] == param and said["message"] and set(said) == {"message", "type", "param", "code"}


def test_bodies_that_are_no_requests(client: httpx.Client) -> None:
    post = client.post
    assert post("/v1/chat/completions", content=b"{").status_code == 400
    assert post("/v1/chat/completions", content=b"[1]").status_code == 400
    assert post("/v1/chat/completions", content=b"x" * (5 << 20)).status_code == 413
    assert post("/v1/chat/completions", content=iter([b"x" * (1 << 20)] * 5)).status_code == 413
    good = json.dumps({"model": "tiny", "messages": HELLO, "stream": True, "max_tokens": 2}).encode()
    assert post("/v1/chat/completions", content=iter([good, *[b" " * (1 << 20)] * 5])).status_code == 413
    assert client.get("/healthz", timeout=5).status_code == 200
    assert client.get("/v1/nothing").json()["error"]["code"] == "unknown_url"
    wrong = client.get("/v1/chat/completions")
    assert wrong.status_code == 405 and wrong.headers["allow"] == "POST"
    assert client.get("/v1/models").json()["data"][0]["id"] == client.get("/v1/models/tiny").json()["id"] == "tiny"


def test_what_there_is_no_room_for_is_told_and_may_be_asked_again(folder: Path) -> None:
    long = {"n": 8, "logprobs": True, "top_logprobs": 20, "logit_bias": {"4": -100}}
    with served(folder, "--rows", "1", "--queue", "8") as (own, _):
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            found = list(pool.map(lambda n: chat(own, **long), range(6)))
        codes = [response.status_code for response in found]
        assert set(codes) == {200, 503}
        assert all(response.headers["retry-after"] for response in found if response.status_code == 503)
        assert chat(own, max_tokens=2).status_code == 200


def test_a_model_whose_process_is_killed_comes_back(folder: Path) -> None:
    with served(folder) as (own, process):
        assert chat(own, max_tokens=2).status_code == 200
        (child,) = children(process.pid)
        os.kill(child, signal.SIGKILL)
        deadline = time.monotonic() + 30
        while own.get("/readyz").status_code == 200 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert chat(own, max_tokens=2).status_code == 200
        assert children(process.pid) != [child]


def test_a_server_that_is_told_to_end_finishes_what_was_begun(folder: Path) -> None:
    with served(folder, "--rows", "1") as (own, process):  # 16 answers one after the other take a while
        body = {
            "model": "tiny",
            "messages": HELLO,
            "stream": True,
            "logit_bias": {"4": -100},
            "n": 16,
            "logprobs": True,
            "top_logprobs": 20,
        }
        with own.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + 10
            while own.get("/readyz").status_code == 200 and time.monotonic() < deadline:
                pass
            late = chat(own)
            rest = [line for line in lines if line]
        assert late.status_code == 503 and late.json()["error"]["code"] == "draining"
        finishes = [choice["finish_reason"] for line in rest[:-1] for choice in json.loads(line[6:])["choices"]]
        assert rest[-1] == "data: [DONE]" and finishes.count("length") == 16
        assert process.wait(20) == 0


def children(pid: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            if f"\nPPid:\t{pid}\n" in status.read_text():
                found.append(int(status.parent.name))
    return found


def test_it_ends_when_told_though_nobody_hears_what_it_says(folder: Path) -> None:
    with served(folder) as (client, process):
        assert chat(client, max_tokens=2).status_code == 200
        assert process.stderr is not None
        process.stderr.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
