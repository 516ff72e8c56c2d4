"""Asks `slmops serve` by the package `ollama`, as if it were Ollama.

pip install ollama
slmops serve desk=outputs/demo/bundle/model --port 11434        (in another terminal)
python with_ollama.py desk "where is my parcel?"
"""

import os
import sys

from ollama import Client


def main(model: str, message: str) -> None:
    client = Client(os.environ.get("OLLAMA_HOST", "http://127.0.0.1:11434"))
    print("models:", ", ".join(str(one.model) for one in client.list().models))
    messages = [{"role": "user", "content": message}]
    for part in client.chat(model=model, messages=messages, options={"temperature": 0}, stream=True):
        print(part.message.content, end="", flush=True)
        if part.done and part.eval_duration:
            print(f"\n{part.eval_count} tokens, {part.eval_count / part.eval_duration * 1e9:.0f} tokens/s")


main(*sys.argv[1:])
