"""Ollama's dialect as its own Python client meets it: the server is a process, a model of one layer, the client is unmodified.

Needs the package `ollama`, which the extra `dev` has.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import string
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import ollama
import pytest

from slmops.core.engine import Sampling
from slmops.engines import open_engine
from slmops.engines.minimal import SPECIAL, TEMPLATE, VOCABULARY, _write_tokenizer
from slmops.serve.app import State, application
from slmops.serve.dialects import ollama_shapes
from slmops.serve.model import Model, Settings
from slmops.serve.pool import Pool
from tests.serve.test_server import served
from tests.train import bases

pytestmark = pytest.mark.slow
HELLO = [{"role": "user", "content": "hello"}]
GREEDY: Mapping[str, Any] = {"temperature": 0, "num_predict": 12}
LETTERS: Mapping[str, Any] = {"temperature": 1.2, "seed": 5, "num_predict": 12}
TURNS = "{{ if .System }}<|system|>{{ .System }}<|end|>{{ end }}<|user|>{{ .Prompt }}<|end|><|assistant|>{{ .Response }}<|end|>"
CALLING = """{% if tools %}{{ '<|system|>' }}{% for tool in tools %}{{ tool.function.name }}{% endfor %}{{ '<|end|>' }}{% endif %}
{%- for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}
{%- for call in message.tool_calls or [] %}{{ '<tool_call>' + call.function | tojson + '</tool_call>' }}{% endfor %}
{{- '<|end|>' }}{% endfor %}{{ '<|assistant|>' }}"""
NAMES = {"tiny:latest", "caller:latest"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose answers depend on every token of the prompt, and are plain letters: other tokens have logits of 0."""
    import torch
    from transformers import AutoModelForCausalLM

    from slmops.convert import onnx_genai

    words, source, graph, out = (tmp_path_factory.mktemp(name) for name in ("words", "source", "graph", "served"))
    _write_tokenizer(words)
    bases.save("llama", words, source, context=512)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    letters = torch.tensor([len(SPECIAL) + ord(letter) for letter in string.ascii_lowercase])
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        for parameter in model.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.3)
        head = torch.zeros_like(model.get_input_embeddings().weight)
        head[letters] = model.get_input_embeddings().weight[letters]
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(head)
    model.save_pretrained(source)
    onnx_genai.build(source, graph)
    onnx_genai.write(source, graph, out, onnx_genai.Params.model_validate({"precision": "fp32"}))
    return out


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kept = tmp_path_factory.mktemp("own") / "kept"
    kept.mkdir()
    return kept


@pytest.fixture(scope="module")
def http(folder: Path, kept: Path) -> Iterator[httpx.Client]:
    caller = kept.parent / "caller"
    shutil.copytree(folder, caller)
    (caller / "chat_template.jinja").write_text(CALLING)
    with served(folder, "--rows", "3", "--definitions", str(kept), f"caller={caller}") as (http, _):
        yield http


@pytest.fixture(autouse=True)
def as_found(kept: Path) -> Iterator[None]:
    """No test leaves a definition to the next."""
    yield
    for file in kept.iterdir():
        file.unlink()


@pytest.fixture(scope="module")
def client(http: httpx.Client) -> ollama.Client:
    return ollama.Client(host=str(http.base_url))


def expected(folder: Path, messages: list[dict[str, str]], count: int = 12) -> tuple[list[int], Any]:
    """The prompt and the greedy answer of the engine alone."""
    engine = open_engine(folder)
    prompt = engine.encode(messages)
    (answer,) = engine.generate([prompt], Sampling(max_new_tokens=count))
    assert len(set(answer.text)) > 1
    return prompt, answer


def test_answers_are_those_of_the_engine_whole_and_as_streams(client: ollama.Client, folder: Path) -> None:
    prompt, answer = expected(folder, HELLO)
    whole = client.chat(model="tiny", messages=HELLO, options=GREEDY)
    assert whole.message.role == "assistant" and whole.message.content == answer.text
    assert whole.done is True and whole.done_reason == ("stop" if answer.finished else "length")
    assert (whole.prompt_eval_count, whole.eval_count) == (len(prompt), len(answer.tokens))
    parts = list(client.chat(model="tiny:latest", messages=HELLO, options=GREEDY, stream=True))
    assert "".join(part.message.content or "" for part in parts) == answer.text
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True] and len(parts) > 3
    text = client.generate(model="tiny", prompt="hello", options=GREEDY)
    assert text.response == answer.text and text.context == [*prompt, *answer.tokens]
    pieces = list(client.generate(model="tiny", prompt="hello", options=GREEDY, stream=True))
    assert "".join(piece.response or "" for piece in pieces) == answer.text and pieces[-1].context == text.context
    for told in (whole, text, parts[-1], pieces[-1]):
        spans = (told.load_duration, told.prompt_eval_duration, told.eval_duration)
        assert all(span is not None and span >= 0 for span in spans) and told.prompt_eval_duration
        assert told.total_duration and told.total_duration >= sum(span or 0 for span in spans)


def test_the_async_client_gets_the_same(http: httpx.Client, client: ollama.Client) -> None:
    async def ask() -> tuple[str, str, list[str | None]]:
        other = ollama.AsyncClient(host=str(http.base_url))
        whole, names = await asyncio.gather(other.chat(model="tiny", messages=HELLO, options=GREEDY), other.list())
        text = ""
        async for part in await other.generate(model="tiny", prompt="hello", options=GREEDY, stream=True):
            text += part.response or ""
        await other.create(model="async", from_="tiny", system="S")
        await other.copy("async", "async2")
        for name in ("async", "async2"):
            await other.delete(name)
        return whole.message.content or "", text, [one.model for one in names.models]

    whole, text, names = asyncio.run(ask())
    assert whole == text == client.chat(model="tiny", messages=HELLO, options=GREEDY).message.content
    assert set(names) == NAMES


def test_system_raw_context_template_and_stops(client: ollama.Client, folder: Path) -> None:
    system = {"role": "system", "content": "S"}
    _, answer = expected(folder, [system, *HELLO])
    assert client.generate(model="tiny", prompt="hello", system="S", options=GREEDY).response == answer.text
    for template in (TURNS, TEMPLATE):  # Go's and Jinja's
        same = client.generate(model="tiny", prompt="hello", system="S", template=template, options=GREEDY)
        assert same.response == answer.text
    raw = client.generate(
        model="tiny", prompt="<|system|>S<|end|><|user|>hello<|end|><|assistant|>", raw=True, options=GREEDY
    )
    assert raw.response == answer.text and raw.context is None
    first = client.generate(model="tiny", prompt="a", options={"temperature": 0, "num_predict": 2})
    second = client.generate(
        model="tiny", prompt="b", context=first.context, options={"temperature": 0, "num_predict": 2}
    )
    assert first.context and second.context
    assert second.context[: len(first.context)] == first.context
    rest = second.context[len(first.context) : -2]
    assert list(rest) == open_engine(folder).encode([{"role": "user", "content": "b"}])
    free = client.generate(model="tiny", prompt="hello", options=LETTERS).response or ""
    assert free == client.generate(model="tiny", prompt="hello", options=LETTERS).response
    stop = free[len(free) // 2]
    cut = client.generate(model="tiny", prompt="hello", options={**LETTERS, "stop": [stop]})
    assert cut.response == free[: free.index(stop)] and cut.done_reason == "stop"


def test_log_probabilities(client: ollama.Client) -> None:
    told = client.chat(model="tiny", messages=HELLO, options=GREEDY, logprobs=True, top_logprobs=2)
    assert told.logprobs and len(told.logprobs) == told.eval_count
    for row in told.logprobs:
        assert row.top_logprobs and len(row.top_logprobs) == 2 and row.logprob == row.top_logprobs[0].logprob <= 0
    assert client.chat(model="tiny", messages=HELLO, options=GREEDY).logprobs is None


def test_models_are_listed_shown_and_loaded(client: ollama.Client, http: httpx.Client, folder: Path) -> None:
    assert {one.model for one in client.list().models} == NAMES
    listed = next(one for one in client.list().models if one.model == "tiny:latest")
    assert listed.model == "tiny:latest" and listed.size == sum(file.stat().st_size for file in folder.iterdir())
    assert listed.digest and len(listed.digest) == 64 and listed.modified_at and listed.details
    assert (listed.details.format, listed.details.family) == ("onnx", "llama")
    assert (listed.details.parameter_size, listed.details.quantization_level) == ("107K", "F32")
    shown = client.show("tiny")
    assert shown.template == TEMPLATE and shown.capabilities == ["completion", "embedding"]
    assert shown.modelinfo and shown.modelinfo["llama.context_length"] == 512
    layer = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 128 + 2 * 64
    assert (
        shown.modelinfo["general.parameter_count"] == 2 * (VOCABULARY * 64 + layer) + 64
    )  # table and head are two here
    assert shown.modelinfo["general.architecture"] == "llama" and shown.modelfile == "FROM tiny\n"
    running = next(one for one in client.ps().models if one.model == "tiny:latest")
    assert running.name == "tiny:latest" and running.context_length == 512
    assert running.size and running.size > 1 << 20 and running.expires_at
    loaded = client.generate(model="tiny", prompt="", keep_alive="5m")
    assert loaded.done and loaded.done_reason == "load" and loaded.response == ""
    assert client.chat(model="tiny", messages=[]).done_reason == "load"
    assert http.get("/").text == "Ollama is running" and http.head("/").status_code == 200
    assert http.get("/api/version").json().keys() == {"version"}


def test_a_definition_speaks_as_it_was_made_to(
    client: ollama.Client, http: httpx.Client, folder: Path, kept: Path
) -> None:
    example = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    steps = client.create(
        model="helper", from_="tiny", system="S", messages=example, parameters={**GREEDY, "stop": ["zz"]},
        license="free", stream=True,
    )  # fmt: skip
    assert [step.status for step in steps][-1] == "success"
    _, answer = expected(folder, [{"role": "system", "content": "S"}, *example, *HELLO])
    assert client.chat(model="helper", messages=HELLO).message.content == answer.text
    assert client.generate(model="helper", prompt="hello").response == answer.text
    own = [{"role": "system", "content": "T"}, *HELLO]
    _, other = expected(folder, [own[0], *example, *HELLO], 3)
    assert client.chat(model="helper", messages=own, options={"num_predict": 3}).message.content == other.text
    shown = client.show("helper")
    assert shown.details and shown.details.parent_model == "tiny" and shown.license == "free"
    assert shown.parameters and shown.parameters.split() == ["num_predict", "12", "stop", "zz", "temperature", "0.0"]
    http.post("/api/create", json={"name": "again", "modelfile": shown.modelfile, "stream": False}).raise_for_status()
    again = client.show("again")
    assert (again.modelfile, again.parameters) == (shown.modelfile, shown.parameters)
    client.copy("helper", "team/copy:v1")
    assert {one.model for one in client.list().models} == {
        *NAMES, "helper:latest", "again:latest", "team/copy:v1",
    }  # fmt: skip
    digests = {one.model: one.digest for one in client.list().models}
    assert digests["helper:latest"] == digests["team/copy:v1"] != digests["tiny:latest"]
    with served(folder, "--definitions", str(kept)) as (after, _):  # what was made outlives the server
        same = ollama.Client(host=str(after.base_url)).chat(model="team/copy:v1", messages=HELLO)
        assert same.message.content == answer.text
    client.create(model="longer", from_="helper", template=TURNS, parameters={"num_predict": 14})
    client.delete("helper")
    _, more = expected(folder, [{"role": "system", "content": "S"}, *example, *HELLO], 14)
    assert client.chat(model="longer", messages=HELLO).message.content == more.text
    http.post(
        "/api/create", json={"model": "by-place", "modelfile": f"FROM {folder}\n", "stream": False}
    ).raise_for_status()
    assert client.show("by-place").modelfile == "FROM tiny\n"
    for name in ("again", "team/copy:v1", "longer", "by-place"):
        assert client.delete(name).status == "success"
    assert {one.model for one in client.list().models} == NAMES and list(kept.iterdir()) == []


def test_a_definition_is_a_model_in_the_dialect_of_openai(
    client: ollama.Client, http: httpx.Client, folder: Path
) -> None:
    client.create(
        model="brief", from_="tiny", system="S", parameters={"temperature": 0, "num_predict": 5, "num_ctx": 30}
    )
    _, answer = expected(folder, [{"role": "system", "content": "S"}, *HELLO], 5)
    body: dict[str, Any] = {"model": "brief", "messages": HELLO}
    assert [one["id"] for one in http.get("/v1/models").json()["data"]] == ["caller", "tiny", "brief"]
    assert http.get("/v1/models/brief").json()["id"] == "brief"
    said = http.post("/v1/chat/completions", json=body).json()
    assert said["choices"][0]["message"]["content"] == answer.text and said["usage"]["completion_tokens"] == 5
    assert http.post("/v1/chat/completions", json=body | {"max_tokens": 2}).json()["usage"]["completion_tokens"] == 2
    long = [{"role": "user", "content": "x" * 30}]
    assert http.post("/v1/chat/completions", json=body | {"messages": long}).status_code == 400
    text = {"model": "brief", "prompt": "hello"}
    plain = http.post("/v1/completions", json=text | {"model": "tiny", "temperature": 0, "max_tokens": 5}).json()
    assert http.post("/v1/completions", json=text).json()["choices"] == plain["choices"]
    client.delete("brief")


@pytest.mark.parametrize(
    ("change", "status", "says"),
    [
        ({"model": "other"}, 404, "model 'other' not found"),
        ({"model": ""}, 400, "model is required"),
        ({"model": "../up"}, 404, "not found"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, 400, "the context holds 512"),
        ({"options": {"num_ctx": 8}}, 400, "the context holds 8"),
        ({"options": {"temprature": 1}}, 400, "did you mean temperature"),
        ({"options": {"mirostat": 1}}, 400, "mirostat is not served"),
        ({"think": True}, 400, "does not support thinking"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "has no tools"),
        ({"messages": [{"role": "user", "content": "a", "images": ["aGk="]}]}, 400, "images are not served"),
        ({"format": {"type": "thing"}}, 400, "thing"),
        ({"format": "yaml"}, 400, "yaml is not known"),
        ({"keep_alive": "soon"}, 400, "soon is no time"),
        ({"truncate": True}, 400, "a prompt is never cut"),
        ({"nonsense": 1}, 400, "nonsense is not known"),
        ({"messages": "hello"}, 400, "messages"),
    ],
)
def test_what_cannot_be_done_is_an_error_that_names_it(
    http: httpx.Client, change: dict[str, Any], status: int, says: str
) -> None:
    refused = http.post("/api/chat", json={"model": "tiny", "messages": HELLO} | change)
    assert refused.status_code == status, refused.text
    body = refused.json()
    assert set(body) == {"error"} and says in body["error"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"suffix": "x"}, "suffix is not served"),
        ({"raw": True, "system": "S"}, "raw mode does not support"),
        ({"template": "{{ range .Messages }}{{ end }}"}, "range .Messages"),
        ({"template": "{{ .Prompt }}", "system": "S"}, "no {{ .System }}"),
        ({"template": "{% for m in messages %}"}, "cannot be read"),
        (
            {"template": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"},
            "come to an end",
        ),
        ({"template": "{{ 'a' * 10 ** 10 }}"}, "more memory"),
        ({"template": "{{ bos_token }}"}, "no place for the user's words"),
        ({"context": [99999]}, "no token 99999"),
    ],
)
def test_what_generate_cannot_do_is_an_error_and_harms_nobody(
    http: httpx.Client, change: dict[str, Any], says: str
) -> None:
    refused = http.post("/api/generate", json={"model": "tiny", "prompt": "hello"} | change)
    assert refused.status_code == 400 and says in refused.json()["error"]


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"model": "x"}, 400, "from is required"),
        ({"model": "x", "from": "other"}, 404, "model 'other' not found"),
        ({"model": "x", "from": "/etc"}, 404, "model '/etc' not found"),
        ({"model": "tiny", "from": "tiny"}, 400, "served from a folder"),
        ({"model": "Tiny:latest", "from": "tiny"}, 400, "served from a folder"),
        ({"model": "../x", "from": "tiny"}, 400, "no name of a model"),
        ({"model": "x", "from": "tiny", "parameters": {"temprature": 1}}, 400, "did you mean temperature"),
        ({"model": "x", "from": "tiny", "template": "{{ range .Messages }}{{ end }}"}, 400, "range .Messages"),
        ({"model": "x", "from": "tiny", "template": "{{ bos_token }}"}, 400, "no place for the user's words"),
        ({"model": "x", "from": "tiny", "system": "S", "template": "{{ .Prompt }}"}, 400, "no {{ .System }}"),
        ({"model": "x", "from": "tiny", "adapters": {"a": "sha256:1"}}, 400, "without an adapter"),
        ({"model": "x", "modelfile": "FROM tiny\nADAPTER ./a"}, 400, "without an adapter"),
        ({"model": "x", "modelfile": "FROM tiny\nPARAMETR a 1"}, 400, "line 2 of the Modelfile"),
        ({"model": "x", "from": "tiny", "quantize": "q4_0"}, 400, "quantize is not served"),
        ({"model": "x", "from": "tiny", "files": {"a.gguf": "sha256:1"}}, 400, "files is not served"),
    ],
)
def test_a_definition_that_cannot_work_is_not_made(
    http: httpx.Client, kept: Path, body: dict[str, Any], status: int, says: str
) -> None:
    refused = http.post("/api/create", json=body)
    assert refused.status_code == status and says in refused.json()["error"]
    assert list(kept.iterdir()) == []


def test_an_answer_holds_to_its_format(client: ollama.Client) -> None:
    schema = {
        "type": "object",
        "properties": {"open": {"type": "boolean"}},
        "required": ["open"],
        "additionalProperties": False,
    }
    for ask in (
        lambda: (
            client.chat(
                model="tiny", messages=HELLO, format=schema, options={**LETTERS, "num_predict": 30}
            ).message.content
        ),
        lambda: (
            client.generate(
                model="tiny", prompt="hello", format=schema, options={**LETTERS, "num_predict": 30}
            ).response
        ),
    ):
        assert json.loads(ask() or "")["open"] in (True, False)
    anything = client.chat(model="tiny", messages=HELLO, format="json", options={"num_predict": 30})
    assert (anything.message.content or "").startswith("{")


def test_tools_are_told_to_the_model(client: ollama.Client, http: httpx.Client) -> None:
    def weather(city: str) -> str:
        """The weather of a city."""
        return city

    plain = client.chat(model="caller", messages=HELLO, options=GREEDY)
    told = client.chat(model="caller", messages=HELLO, tools=[weather], options=GREEDY)
    named = len("weather") + 2
    assert told.prompt_eval_count == (plain.prompt_eval_count or 0) + named and told.message.tool_calls is None
    call = {"function": {"name": "weather", "arguments": {"city": "Ulm"}}}
    called = {"role": "assistant", "content": "", "tool_calls": [call]}
    turns = [*HELLO, called, {"role": "tool", "content": "rain", "tool_name": "weather"}]
    after = client.chat(model="caller", messages=turns, tools=[weather], options=GREEDY)
    spoken = f"<tool_call>{json.dumps(call['function'])}</tool_call>"
    more = len(spoken) + 2 + len("<|tool|>rain") + 1
    assert after.prompt_eval_count == (told.prompt_eval_count or 0) + more
    assert client.show("caller").capabilities == ["completion", "embedding", "tools"]
    function = {"name": "weather", "parameters": {"type": "object"}, "strict": True}  # as LiteLLM hands it on
    body = {"model": "caller", "messages": HELLO, "options": GREEDY, "stream": False}
    handed = http.post("/api/chat", json=body | {"tools": [{"type": "function", "function": function}]}).json()
    assert handed["prompt_eval_count"] == told.prompt_eval_count
    assert ollama_shapes.ToolOf.model_validate({"function": function}).tool().strict


def test_a_model_is_unloaded_when_it_is_told_to_and_comes_back(client: ollama.Client) -> None:
    def loaded() -> bool:
        return "caller:latest" in {one.model for one in client.ps().models}

    kept = client.generate(model="caller", prompt="hello", options=GREEDY, keep_alive="5m")
    running = next(one for one in client.ps().models if one.model == "caller:latest")
    assert running.expires_at and 200 < running.expires_at.timestamp() - time.time() < 301
    assert client.generate(model="caller", prompt="", keep_alive=0).done_reason == "unload"
    deadline = time.monotonic() + 30
    while loaded() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not loaded()
    again = client.generate(model="caller", prompt="hello", options=GREEDY, keep_alive=-1)
    assert again.response == kept.response and again.load_duration and again.load_duration > 10**6 and loaded()


def test_embeddings_have_length_one_and_are_cut_only_when_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dialect's part alone, in this process: the model gives numbers that tell which prompt they are of."""

    async def embed(self: Model, prompts: list[list[int]]) -> list[list[float]]:
        return [[3.0 * len(prompt), 4.0 * len(prompt), float(prompt[0])] for prompt in prompts]

    monkeypatch.setattr(Model, "embed", embed, raising=False)

    async def main() -> None:
        pool = Pool([Settings(folder, "tiny", rows=1)])
        try:
            transport = httpx.ASGITransport(app=application(pool, State()))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:

                async def ask(path: str, **body: Any) -> httpx.Response:
                    return await http.post(path, json={"model": "tiny", **body}, timeout=60)

                made = ollama.EmbedResponse(**(await ask("/api/embed", input=["ab", "b"])).json())
                assert [round(sum(value**2 for value in vector), 9) for vector in made.embeddings] == [1, 1]
                assert made.prompt_eval_count == 3 and made.embeddings[0] != made.embeddings[1]
                two = (await ask("/api/embed", input="ab", dimensions=2)).json()["embeddings"]
                assert [round(value, 9) for value in two[0]] == [0.6, 0.8]
                assert (await ask("/api/embed", input="")).json()["embeddings"] == []
                assert (await ask("/api/embed", input="x" * 600)).status_code == 400
                cut = (await ask("/api/embed", input="x" * 600, truncate=True)).json()
                assert cut["prompt_eval_count"] == 512
                assert (await ask("/api/embeddings", prompt="ab")).json()["embedding"][:2] == [6.0, 8.0]
                assert "embedding" in (await ask("/api/show")).json()["capabilities"]
        finally:
            await pool.stop()

    asyncio.run(main())


def test_errors_reach_the_client(client: ollama.Client, tmp_path: Path) -> None:
    for status, ask in (
        (404, lambda: client.show("other")),
        (404, lambda: client.delete("other")),
        (400, lambda: client.delete("tiny")),
        (404, lambda: client.copy("other", "x")),
        (400, lambda: client.copy("tiny", "tiny")),
        (400, lambda: client.pull("llama3.2")),
        (400, lambda: client.push("tiny")),
        (400, lambda: client.embed(model="tiny", input="x" * 600, truncate=False)),
        (404, lambda: client.chat(model="other", messages=HELLO)),
        (400, lambda: list(client.generate(model="tiny", prompt="x" * 600, stream=True))),
    ):
        with pytest.raises(ollama.ResponseError) as failure:
            ask()
        assert failure.value.status_code == status and failure.value.error and "{" not in failure.value.error
    with pytest.raises(ollama.ResponseError, match="slmops pull"):
        client.pull("llama3.2")
    (tmp_path / "weights").write_bytes(b"x")
    with pytest.raises(ollama.ResponseError, match="takes no files"):
        client.create_blob(tmp_path / "weights")


def test_bodies_that_are_no_requests(http: httpx.Client) -> None:
    for content in (b"", b"{", b"[1]", b'"x"', b"\xff"):
        refused = http.post("/api/chat", content=content)
        assert refused.status_code == 400 and set(refused.json()) == {"error"}
    assert http.post("/api/generate", content=b"x" * (5 << 20)).status_code == 413
    assert set(http.get("/api/nothing").json()) == {"error"} and http.get("/api/chat").status_code == 405
    good = httpx.post(
        f"{http.base_url}/api/chat", timeout=60,
        content=json.dumps({"model": "tiny", "messages": HELLO, "stream": False, "options": dict(GREEDY)}),
    )  # fmt: skip
    assert good.status_code == 200  # without a content type


def test_the_client_finds_the_server_by_its_variable(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", f"{http.base_url.host}:{http.base_url.port}")
    assert {one.model for one in ollama.Client().list().models} == NAMES
