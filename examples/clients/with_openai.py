"""Asks `slmops serve` by the package `openai`: a stream, then facts in a form that is asked for.

pip install openai
slmops serve desk=outputs/demo/bundle/model        (in another terminal)
python with_openai.py desk "where is my parcel?"
"""

import os
import sys

from openai import OpenAI


def main(model: str, message: str) -> None:
    client = OpenAI(
        base_url=os.environ.get("SLMOPS_URL", "http://127.0.0.1:8000") + "/v1",
        api_key=os.environ.get("SLMOPS_API_KEY", "none"),
    )
    messages = [{"role": "user", "content": message}]
    for event in client.chat.completions.create(model=model, messages=messages, temperature=0, stream=True):
        print(event.choices[0].delta.content or "", end="", flush=True)
    print()
    answer = client.chat.completions.create(
        model=model, messages=messages, temperature=0, max_completion_tokens=8, logprobs=True, top_logprobs=2
    )
    for token in answer.choices[0].logprobs.content:
        others = ", ".join(f"{other.token!r} {other.logprob:.2f}" for other in token.top_logprobs)
        print(f"{token.token!r:>12} {token.logprob:6.2f}   likeliest: {others}")


main(*sys.argv[1:])
