"""Answers of `slmops serve` that are held to JSON schemas: are they all valid, and what does it cost.

    python benchmarks/serve_grammar.py MODEL_FOLDER [--schemas 1000]

Random schemas (nested objects and arrays, enums, bounds, patterns, formats, references that may be recursive) are asked of the model, in
its process, eight at a time, at temperature 1. Each answer that ended is read and held against its schema by `jsonschema`. Then, in
this process: how long the tokens that may come next take to work out, and what a step of the model takes with and without.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slmops.serve import grammar
from slmops.serve.model import Ask, Model, Settings
from slmops.serve.sampling import Picking
from slmops.serve.scheduler import GrammarError, Request, Scheduler

WORDS = ("id", "name", "tags", "count", "when", "größe", "a b", "kind", "next", "items", "x", "note")
FORMATS = ("date", "date-time", "time", "uuid", "email", "ipv4")
PATTERNS = ("^[a-z]{2,8}$", "^[A-Z]{3}-[0-9]{4}$", "^(yes|no|maybe)$", "^[0-9a-f]{8}$")
SLOW_S = grammar.SLOW_S
TYPES = ("string", "integer", "number", "boolean", "null", "array", "object", "enum", "any_of", "ref", "types")


def schema_of(random_: random.Random) -> dict[str, Any]:
    """A random schema. An object with an optional property ends each way back to itself."""
    refs = [f"d{n}" for n in range(random_.randrange(3))]
    found: dict[str, Any] = _object(random_, 3, refs)
    if refs:
        found["$defs"] = {name: _object(random_, 1, refs, recursive=True) for name in refs}
    return found


def _object(random_: random.Random, depth: int, refs: Sequence[str], recursive: bool = False) -> dict[str, Any]:
    names = random_.sample(WORDS, random_.randrange(1, 5))
    properties = {name: _value(random_, depth - 1, () if recursive else refs) for name in names}
    found = {"type": "object", "properties": properties, "required": [n for n in names if random_.random() < 0.7]}
    if recursive and refs and random_.random() < 0.5:
        found["properties"]["more"] = {"$ref": f"#/$defs/{random_.choice(refs)}"}  # never required
    more = random_.choice((False, False, True, {"type": "integer"}, None))
    if more is not None:
        found["additionalProperties"] = more
    return found


def _value(random_: random.Random, depth: int, refs: Sequence[str]) -> dict[str, Any]:
    kind = random_.choice(TYPES)
    if kind == "ref":
        return {"$ref": f"#/$defs/{random_.choice(refs)}"} if refs else {"type": "boolean"}
    if kind == "object" and depth > 0:
        return _object(random_, depth, refs)
    if kind == "array" and depth > 0:
        least = random_.randrange(3)
        found: dict[str, Any] = {"type": "array", "items": _value(random_, depth - 1, refs), "minItems": least}
        if random_.random() < 0.7:
            found["maxItems"] = least + random_.randrange(4)
        if random_.random() < 0.2:
            found["prefixItems"] = [_value(random_, 0, refs)]
        return found
    if kind == "any_of" and depth > 0:
        return {"anyOf": [_value(random_, depth - 1, refs) for _ in range(random_.randrange(1, 4))]}
    if kind == "types":
        return {"type": random_.sample(("string", "integer", "boolean", "null"), 2)}
    if kind == "enum":
        return {
            "enum": random_.sample(["a", 'say "x"', "Ü", 1, 2.5, None, True, [1], {"k": "v"}], random_.randrange(1, 4))
        }
    if kind in ("integer", "number"):
        found = {"type": kind}
        if random_.random() < 0.5:
            found["minimum"] = random_.randrange(-50, 50)
            found[random_.choice(("maximum", "exclusiveMaximum"))] = found["minimum"] + random_.randrange(1, 1000)
        elif random_.random() < 0.3:
            found["multipleOf"] = random_.choice((2, 5, 10))
        return found
    if kind in ("boolean", "null"):
        return {"type": kind}
    found = {"type": "string"}
    chance = random_.random()
    if chance < 0.3:
        found["minLength"] = random_.randrange(4)
        found["maxLength"] = found["minLength"] + random_.randrange(20)
    elif chance < 0.5:
        found["pattern"] = random_.choice(PATTERNS)
    elif chance < 0.7:
        found["format"] = random_.choice(FORMATS)
    return found


def wrong(schema: dict[str, Any], text: str) -> str | None:
    """What is wrong with an answer, None if nothing is."""
    import jsonschema

    formats = jsonschema.FormatChecker(("date", "uuid", "email", "ipv4"))
    for name, kind in (("time", datetime.time), ("date-time", datetime.datetime)):
        formats.checks(name, raises=ValueError)(
            lambda value, kind=kind: not isinstance(value, str) or kind.fromisoformat(value).tzinfo is not None
        )
    try:
        jsonschema.Draft202012Validator(schema, format_checker=formats).validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError) as error:
        return str(error).splitlines()[0]
    return None


async def ask_all(model: Model, schemas: Sequence[dict[str, Any]], most: int | None) -> list[tuple[str, str, int]]:
    """Of each schema: how its answer ended (or `refused`), the answer (or why), and its tokens."""
    # quotes and closing brackets are made likelier, so that a model that knows nothing comes to an end
    bias = {id: 3.0 for mark in '"}]' if (id := model.tokenizer.id_of(mark)) is not None}
    prompt = model.tokenizer.ids("answer:")
    gate = asyncio.Semaphore(2 * model.settings.rows)

    async def one(number: int, schema: dict[str, Any]) -> tuple[str, str, int]:
        how = Picking(temperature=1.0, seed=number, logit_bias=bias)
        async with gate:
            try:
                pieces = [p async for p in model.answer(Ask(prompt, most, how, grammar=grammar.of_schema(schema)))]
            except GrammarError as error:
                return "refused", error.message, 0
        return pieces[-1].finish or "", "".join(piece.text for piece in pieces), len(pieces)

    return await asyncio.gather(*(one(number, schema) for number, schema in enumerate(schemas)))


def validity(folder: Path, count: int, context: int | None = None, most: int | None = None) -> dict[str, Any]:
    """How the answers to so many random schemas ended, and what was wrong with those that did."""
    random_ = random.Random(7)
    schemas = [schema_of(random_) for _ in range(count)]

    async def run() -> list[tuple[str, str, int]]:
        model = Model(Settings(folder, "model", rows=8, context=context))
        try:
            return await ask_all(model, schemas, most)
        finally:
            await model.stop()

    begin = time.perf_counter()
    found = asyncio.run(run())
    faults = [
        f"{number}: {said}: {text[:80]} for {json.dumps(schema)}"
        for number, (schema, (finish, text, _)) in enumerate(zip(schemas, found, strict=True))
        if finish == "stop" and (said := wrong(schema, text))
    ]
    refused = Counter(text for finish, text, _ in found if finish == "refused")
    ends, tokens = Counter(finish for finish, _, _ in found), sum(n for _, _, n in found)
    return {
        "ends": dict(ends), "invalid": faults, "refused": dict(refused), "tokens": tokens,
        "seconds": round(time.perf_counter() - begin, 1),
    }  # fmt: skip


def overhead(folder: Path, rows: int, tokens: int, limited: str) -> float:
    """Seconds of processor time of a step that gives each of so many answers a token. `limited`: `no`; or masks are worked out
    `beside` the model, `before` the pick, or in either way, as it pays, as `served`."""
    from slmops.serve.engines.onnx import OnnxRows

    engine = OnnxRows(folder, rows=rows, context=tokens + 16)
    grammars = grammar.Grammars(folder, engine.vocabulary, engine.end_ids)
    item = {"type": "object", "properties": {"name": {"type": "string"}, "count": {"type": "integer"}}}
    text = grammar.of_schema({"type": "array", "items": item, "minItems": 4 * tokens})  # has no end that soon
    scheduler = Scheduler(engine)
    for row in range(rows):
        limit = grammars.limit(text) if limited != "no" else None
        grammar.SLOW_S = {"beside": 0.0, "before": 1e9}.get(limited, SLOW_S)
        how = Picking(temperature=1.0, seed=row)
        scheduler.submit(Request(row, tuple(range(5, 13)), tokens, how, ignore_end=True, limit=limit))
    for _ in range(rows + 3):
        scheduler.step()
    begin, steps = time.process_time(), 0
    while scheduler.busy == rows:
        scheduler.step()
        steps += 1
    spent = (time.process_time() - begin) / steps
    engine.close()
    return spent


def masks(folder: Path, count: int) -> list[float]:
    """Seconds of processor time of each mask over answers drawn from random schemas, all tokens that may come alike."""
    import numpy as np

    from slmops.serve.engines.onnx import OnnxRows

    engine = OnnxRows(folder, rows=1)
    grammars = grammar.Grammars(folder, engine.vocabulary, engine.end_ids)
    random_, draws = random.Random(7), np.random.default_rng(0)
    spent = []
    for _ in range(count):
        try:
            limit = grammars.limit(grammar.of_schema(schema_of(random_)))
        except GrammarError:
            continue
        for _ in range(200):
            begin = time.thread_time()
            allowed = limit.mask()
            spent.append(time.thread_time() - begin)
            token = int(draws.choice(np.flatnonzero(allowed)))
            limit.take(token)
            if limit.ended or token in engine.end_ids:
                break
    engine.close()
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL_FOLDER")
    parser.add_argument("--schemas", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=200, help="of an answer in the measurement of steps (200)")
    options = parser.parse_args()
    found: dict[str, Any] = validity(options.model, options.schemas)
    spent = sorted(masks(options.model, min(options.schemas, 200)))
    found["mask_us"] = {
        "p50": round(1e6 * statistics.median(spent), 1), "p99": round(1e6 * spent[int(len(spent) * 0.99)], 1),
        "most": round(1e6 * spent[-1], 1), "masks": len(spent),
    }  # fmt: skip
    for rows in (1, 8):
        runs: dict[str, list[float]] = {"no": [], "beside": [], "before": [], "served": []}
        for _ in range(5):  # in turn, so that what else the machine does hits all alike
            for limited, times in runs.items():
                times.append(overhead(options.model, rows, options.tokens, limited))
        found[f"step_us_{rows}"] = {limited: round(1e6 * min(times), 1) for limited, times in runs.items()}
    print(json.dumps(found, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
