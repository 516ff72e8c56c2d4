"""Method `evaluate.predict`: a model answers the test split, greedily, in the runtime it is to be judged in.

Every example gets a row in `predictions.jsonl`, in the order of the file (or of the chosen part of it). A search, which
chooses by what it sees, asks for the validation split instead. A
prompt that does not fit the context is a wrong answer, empty and unfinished, not a crash. Nothing is scored here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from slmops.core.engine import Engine, Generation, KvCache, Sampling
from slmops.core.example import Example
from slmops.core.method import Context, Declaration, Facts
from slmops.core.method import Params as BaseParams
from slmops.core.runtimes import Named
from slmops.core.spec import NonNegative, Task
from slmops.engines.answers import Messages
from slmops.errors import DataError
from slmops.store.rows import labels_of, numbered_examples, read_examples

DECLARATION = Declaration(
    name="evaluate.predict",
    version="1",
    makes="predictions",
    takes={"model": "model", "data": "dataset"},
    extra="runtime",
    packages=("onnxruntime-genai", "onnxruntime", "torch", "transformers"),
    runtimes=lambda params: (params.get("runtime", "auto"),),
)


class Params(BaseParams):
    """`max_examples` keeps that many examples of the split, those with the smallest ids; None keeps all. Of these, `skip` are left
    out, those with the smallest ids: so a split can be answered part by part.

    `adapter`: the one of the model's adapters that answers (`convert.onnx_adapters`).
    `kv_cache`: how llama.cpp holds keys and values.
    `guided`: the task, for a model that is told it in words, with `shots` gold examples before each question.
    """

    runtime: Literal["auto", Named] = "auto"
    adapter: str | None = None
    max_new_tokens: Annotated[int, Field(ge=1)] = 64
    max_examples: Annotated[int, Field(ge=1)] | None = None
    skip: NonNegative = 0
    guided: Task | None = None
    shots: NonNegative = 8
    split: Literal["test", "validation"] = "test"
    kv_cache: KvCache | None = None


def run(params: Params, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Facts:
    """Answer `test.jsonl` (or `validation.jsonl`) of `inputs["data"]` with `inputs["model"]`."""
    from slmops.engines import open_engine

    examples = read_split(inputs["data"], params.split, params.max_examples, params.skip)
    asked, tidy = questions(inputs["data"], examples, params.guided, params.shots, ctx.seed)
    engine = open_engine(
        inputs["model"], threads=ctx.threads, kind=params.runtime, adapter=params.adapter, kv_cache=params.kv_cache
    )
    ctx.progress.start(f"answering {params.split} prompts", len(examples), "prompts")
    try:
        answers, tokens = answer(engine, asked, params.max_new_tokens, ctx)
    finally:
        ctx.progress.stop()
        engine.close()
    with (out / "predictions.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        for example, given in zip(examples, answers, strict=True):
            row = {
                "id": example.id,
                "prompt": example.text,
                "gold": example.answer,
                "answer": tidy(given.text) if given else "",
                "finished": given.finished if given else False,
                "tokens": len(given.tokens) if given else 0,
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    too_long = sum(given is None for given in answers)
    cut = sum(given is not None and not given.finished for given in answers)
    if too_long:
        ctx.progress.log(f"{too_long} {params.split} prompts do not fit the context of the model and count as wrong")
    if cut:
        ctx.progress.log(f"{cut} answers were cut after {params.max_new_tokens} tokens")
    return {
        "examples": len(examples),
        "too_long": too_long,
        "unfinished": cut,
        "prompt_tokens": sum(tokens),
        "new_tokens": sum(len(given.tokens) for given in answers if given),
    }


def questions(
    data: Path, examples: Sequence[Example], task: Task | None, shots: int, seed: int
) -> tuple[list[Messages], Callable[[str], str]]:
    """What is asked for each example, and what is done to an answer before it is judged.

    Args:
        task: for a model that is told the task in words; None: the prompts as they are, the answers as they come.
    """
    if task is None:
        return [e.prompt_messages() for e in examples], lambda text: text
    from slmops.core import prompting
    from slmops.core.validity import AnswerRules
    from slmops.store.files import read_json

    gold = read_examples(data / "gold.jsonl")
    labels = labels_of(read_json(data / "info.json") or {})
    rules = AnswerRules.of(task, labels, [e.answer for e in gold if e.answer is not None])
    shown = prompting.pick_shots(gold, shots, seed)
    return [prompting.guided(e, rules, shown) for e in examples], rules.tidy


def answer(
    engine: Engine, asked: Sequence[Messages], max_new_tokens: int, ctx: Context
) -> tuple[list[Generation | None], list[int]]:
    """Greedy answers, None where the prompt leaves no room, and the length of every prompt in tokens."""
    prompts = [engine.encode(messages) for messages in asked]
    fits = [i for i, p in enumerate(prompts) if len(p) < engine.context_length]
    done = engine.generate([prompts[i] for i in fits], Sampling(max_new_tokens=max_new_tokens), ctx.progress.advance)
    by_index = dict(zip(fits, done, strict=True))
    return [by_index.get(i) for i in range(len(asked))], [len(p) for p in prompts]


def read_test(data: Path, limit: int | None) -> list[Example]:
    """The test examples; see `read_split`."""
    return read_split(data, "test", limit)


def read_split(data: Path, split: Literal["test", "validation"], limit: int | None, skip: int = 0) -> list[Example]:
    """The examples of a split, all of which must have gold answers, in the order of the file.

    Args:
        limit: at most so many, those with the smallest ids.
        skip: so many of them are left out, those with the smallest ids.

    Raises:
        DataError: the split is missing or empty, or an example has no gold answer.
    """
    path = data / f"{split}.jsonl"
    if not path.is_file():
        raise DataError(f"the dataset has no {split} split", f"set data.splits.{split}", file=str(path))
    examples = []
    for number, example in numbered_examples(path):
        if example.answer is None:
            hint = f"{split} data need gold answers"
            raise DataError(f"a {split} example has no answer", hint, file=str(path), line=number)
        examples.append(example)
    if not examples:
        raise DataError(
            f"the {split} split is empty", f"give {split} data or a larger data.splits.{split}", file=str(path)
        )
    if skip or (limit is not None and limit < len(examples)):
        kept = sorted(range(len(examples)), key=lambda i: (examples[i].id, i))[skip:limit]
        examples = [examples[i] for i in sorted(kept)]
    return examples
