"""Every feature of Ollama's dialect, with ollama-python as it comes.

    slmops serve desk=MODEL_FOLDER
    pip install ollama && python examples/clients/every_ollama.py http://127.0.0.1:8000 desk

A third word names an adapter that the model is served with. Parts that need a chat template with tools are left out, and said so,
where the model has none. What the script makes it deletes again.
"""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

import ollama

HELLO: list[Any] = [{"role": "user", "content": "Where is my parcel?"}]
SCHEMA: dict[str, Any] = {
    "type": "object", "required": ["number"], "additionalProperties": False,
    "properties": {"number": {"type": "integer", "minimum": 1, "maximum": 9999}},
}  # fmt: skip
GREEDY: dict[str, Any] = {"temperature": 0, "num_predict": 8}
TEMPLATE = "{{ if .System }}{{ .System }} {{ end }}{{ .Prompt }} {{ .Response }}"


def find_order(number: int) -> str:
    """Look an order up.

    Args:
        number: of the order
    """
    return f"order {number} is on its way"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", metavar="URL")
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("adapter", metavar="ADAPTER", nargs="?")
    options = parser.parse_args()
    client, model = ollama.Client(host=options.url), options.model

    shown = client.show(model)
    assert shown.details and shown.details.family and shown.modelinfo and shown.template and shown.modelfile
    assert f"{model}:latest" in [one.model for one in client.list().models]
    assert client.generate(model=model, keep_alive="5m").done_reason == "load"
    running = next(one for one in client.ps().models if one.model == f"{model}:latest")
    assert running.size and running.expires_at and running.context_length
    print("models: listed, shown, loaded, running:", shown.details.family, shown.details.parameter_size)

    whole = client.chat(model=model, messages=HELLO, options=GREEDY, logprobs=True, top_logprobs=2)
    assert whole.done and whole.done_reason in ("stop", "length") and whole.eval_count and whole.prompt_eval_count
    assert whole.logprobs and len(whole.logprobs) == whole.eval_count and whole.total_duration
    pieces = list(client.chat(model=model, messages=HELLO, options=GREEDY, stream=True))
    assert "".join(piece.message.content or "" for piece in pieces) == whole.message.content
    assert pieces[-1].done and pieces[-1].eval_count == whole.eval_count
    every: dict[str, Any] = {
        "temperature": 1.2, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "seed": 1, "stop": ["\n"], "num_predict": 4, "num_ctx": 256,
        "repeat_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.1, "repeat_last_n": -1,
    }  # fmt: skip
    some = client.chat(model=model, messages=HELLO, options=every)
    assert client.chat(model=model, messages=HELLO, options=every).message.content == some.message.content
    print("chat: whole, streamed, log probabilities, options, seed, stop")

    text = client.generate(model=model, prompt="Hello", system="Be brief.", options=GREEDY, keep_alive="5m")
    parts = list(client.generate(model=model, prompt="Hello", system="Be brief.", options=GREEDY, stream=True))
    assert "".join(part.response or "" for part in parts) == text.response and text.context
    assert client.generate(model=model, prompt="More", context=text.context, options=GREEDY).context
    assert client.generate(model=model, prompt="Hello", template=TEMPLATE, options=GREEDY).done
    assert client.generate(model=model, prompt="Hello", raw=True, options=GREEDY).prompt_eval_count
    print("generate: whole, streamed, with a system text, a context, a template, raw")

    free: dict[str, Any] = {"seed": 1, "num_predict": 100}
    held = client.chat(model=model, messages=HELLO, format=SCHEMA, options=free)
    assert 1 <= json.loads(held.message.content or "")["number"] <= 9999
    anything = client.generate(model=model, prompt="Hello", format="json", options=free)
    assert anything.done_reason == "length" or isinstance(json.loads(anything.response or ""), dict)
    print("format:", held.message.content)

    try:
        asked = client.chat(model=model, messages=HELLO, tools=[find_order], options=GREEDY)
        call = {"function": {"name": "find_order", "arguments": {"number": 5}}}
        said: Any = {"role": "assistant", "content": "", "tool_calls": [call]}
        result: Any = {"role": "tool", "tool_name": "find_order", "content": find_order(5)}
        after = client.chat(model=model, messages=[*HELLO, said, result], tools=[find_order], options=GREEDY)
        assert after.prompt_eval_count and asked.prompt_eval_count and after.prompt_eval_count > asked.prompt_eval_count
        assert list(client.chat(model=model, messages=HELLO, tools=[find_order], options=GREEDY, stream=True))[-1].done
        print("tools: told, answered, streamed; the model", "called" if asked.message.tool_calls else "did not call")
    except ollama.ResponseError as error:
        if "no tools" not in error.error:
            raise
        print("tools left out:", error.error)

    steps = client.create(
        model="brief", from_=model, system="Be brief.", template=TEMPLATE, parameters={**GREEDY, "stop": ["\n"]},
        messages=HELLO, license="free", stream=True,
    )  # fmt: skip
    assert [step.status for step in steps][-1] == "success"
    try:
        assert client.chat(model="brief", messages=HELLO).eval_count
        told = client.show("brief")
        assert told.details and told.details.parent_model and told.license == "free"
        assert told.modelfile and all(word in told.modelfile for word in ("FROM", "PARAMETER", "SYSTEM", "TEMPLATE"))
        client.copy("brief", "brief-copy")
        assert {"brief:latest", "brief-copy:latest"} <= {one.model for one in client.list().models}
        client.delete("brief-copy")
    finally:
        client.delete("brief")
    print("create, copy, delete")
    if options.adapter:
        client.create(model="adapted", from_=model, adapters={options.adapter: ""}, parameters=GREEDY)
        try:
            direct = client.chat(model=f"{model}+{options.adapter}", messages=HELLO, options=GREEDY)
            assert client.chat(model="adapted", messages=HELLO).message.content == direct.message.content
        finally:
            client.delete("adapted")
        print("adapter: by its name, and in a definition")

    try:
        found = client.embed(model=model, input=["Where is my parcel?", "Hello"], dimensions=16).embeddings
        assert len(found) == 2 and all(math.isclose(math.hypot(*one), 1, abs_tol=1e-4) for one in found)
        assert client.embeddings(model=model, prompt="Hello").embedding
        print("embed:", len(found[0]), "dimensions")
    except ollama.ResponseError as error:
        if "hidden states" not in error.error:
            raise
        print("embeddings left out:", error.error)

    for wrong, status in (({"model": "none"}, 404), ({"options": {"num_predict": 8, "temprature": 1}}, 400)):
        try:
            client.chat(**{"model": model, "messages": HELLO, **wrong})
        except ollama.ResponseError as error:
            assert error.status_code == status
            print("errors:", error.status_code, error.error)
        else:
            raise AssertionError(f"{wrong} is no error")


if __name__ == "__main__":
    main()
