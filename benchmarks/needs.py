"""How near is the memory that `slmops needs` foresees for answering to its measured peak, by runtime?

Models of the catalogue's architectures get random weights, since memory does not depend on what they have learned. Each is converted
for its runtimes and answers one prompt in a fresh process; the peak of the process is compared with the prediction.

    .venv/bin/python benchmarks/needs.py                     # the cases of the guide
    .venv/bin/python benchmarks/needs.py --only qwen3-0.6b --runtimes llama_cpp
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from slmops.catalog import models
from slmops.catalog.needs import needs

WORK = Path("build/bench/needs")
RUNTIMES = ("llama_cpp", "onnx_genai", "openvino", "torch")
NEW = 8
"""Tokens of an answer: the last of its context."""
FITTED = ("smollm2-135m-instruct", "smollm2-360m-instruct", "gemma-3-270m-it")
"""Models from which the constants of `slmops.catalog.needs` were taken; others test them. Those of OpenVINO come from the first alone."""
CASES: list[tuple[str, str, str, int, int]] = [
    # model, runtime, form, context, batch
    ("smollm2-135m-instruct", "llama_cpp", "q4_0", 2048, 1),
    ("smollm2-135m-instruct", "onnx_genai", "int4", 2048, 1),
    ("smollm2-135m-instruct", "torch", "fp32", 512, 1),
    ("smollm2-135m-instruct", "torch", "fp32", 2048, 1),
    ("gemma-3-270m-it", "llama_cpp", "q8_0", 512, 1),
    ("gemma-3-270m-it", "onnx_genai", "int4", 512, 1),
    ("gemma-3-270m-it", "torch", "fp32", 512, 1),
    ("qwen3-0.6b", "llama_cpp", "q4_0", 512, 1),
    ("qwen3-0.6b", "onnx_genai", "int4", 512, 1),
    ("qwen3-0.6b", "torch", "fp32", 256, 1),
    ("smollm2-135m-instruct", "llama_cpp", "q4_0", 512, 4),
    ("smollm2-135m-instruct", "onnx_genai", "int4", 512, 4),
    ("smollm2-360m-instruct", "llama_cpp", "q4_0", 1024, 1),
    ("smollm2-360m-instruct", "onnx_genai", "int4", 1024, 1),
    ("smollm2-360m-instruct", "torch", "fp32", 512, 1),
    ("smollm2-135m-instruct", "torch", "fp32", 512, 4),
    ("qwen3-0.6b", "llama_cpp", "q8_0", 1024, 1),
    ("smollm2-135m-instruct", "llama_cpp", "fp16", 512, 1),
    ("smollm2-135m-instruct", "onnx_genai", "fp32", 512, 1),
    ("llama-3.2-1b-instruct", "llama_cpp", "q4_0", 512, 1),
    ("llama-3.2-1b-instruct", "onnx_genai", "int4", 256, 1),
    ("qwen3-1.7b", "llama_cpp", "q4_0", 512, 1),
    ("qwen3-1.7b", "onnx_genai", "int4", 256, 1),
    ("smollm2-135m-instruct", "openvino", "int4", 512, 1),
    ("smollm2-135m-instruct", "openvino", "int4", 2048, 1),
    ("smollm2-135m-instruct", "openvino", "int8", 512, 1),
    ("smollm2-135m-instruct", "openvino", "fp32", 512, 1),
    ("smollm2-360m-instruct", "openvino", "int4", 1024, 1),
]


def make(name: str, folder: Path) -> None:
    """A model folder with random weights in bfloat16 and a made-up tokenizer with as many entries as the model's vocabulary."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from slmops.engines.minimal import END, _write_tokenizer

    folder.mkdir(parents=True)
    config = dict(models.find(models.load(), name).config)
    kind = config.pop("model_type")
    settings = AutoConfig.for_model(kind, **config, bos_token_id=None, eos_token_id=END, pad_token_id=END)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = AutoModelForCausalLM.from_config(settings)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    _write_tokenizer(folder)
    grow(folder / "tokenizer.json", config["vocab_size"])


def grow(file: Path, entries: int) -> None:
    """Merges of random pieces in a tokenizer of bytes, until it has so many entries: runtimes keep tables of them."""
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    chance = random.Random(0)
    letters = [piece for piece in vocabulary if len(piece) == 1]
    pieces, merges = list(letters), []
    taken = set(vocabulary) | {token["content"] for token in tokenizer.get("added_tokens", [])}
    number = 1 + max([*vocabulary.values(), *(token["id"] for token in tokenizer.get("added_tokens", []))])
    while number < entries:
        left, right = chance.choice(pieces), chance.choice(letters if chance.random() < 0.6 else pieces)
        if left + right not in taken and len(left + right) <= 12:
            taken.add(left + right)
            vocabulary[left + right] = number
            pieces.append(left + right)
            merges.append([left, right])
            number += 1
    tokenizer["model"]["merges"] = merges
    file.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


def convert(source: Path, runtime: str, form: str, out: Path) -> None:
    """Without the comparison with torch, which is not what is measured."""
    from slmops.core.method import Context

    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    scratch = Path(tempfile.mkdtemp(prefix="scratch-", dir=WORK))
    ctx = Context(seed=0, scratch=scratch, shared=scratch)
    if runtime == "llama_cpp":
        from slmops.convert import gguf

        gguf.run(gguf.Params(precision=form), {"model": source}, part, ctx)
    elif runtime == "onnx_genai":
        from slmops.convert import onnx_genai

        onnx_genai.build(source, scratch)
        onnx_genai.write(source, scratch, part, onnx_genai.Params(precision=form, rounding="plain"), None)
    elif runtime == "openvino":
        from slmops.convert import openvino
        from slmops.engines import read_json

        asked = openvino.Params.model_validate({"precision": form, "rounding": "plain"})
        openvino.write(source, read_json(source / "config.json"), part, asked)
    shutil.rmtree(scratch)
    part.rename(out)


def answer(folder: str, runtime: str, context: int, batch: int) -> dict[str, Any]:
    """In a process of its own: prompts of almost the context, and the tokens that fill it. Bytes."""
    import os

    from slmops.core.engine import Sampling
    from slmops.engines import open_engine
    from slmops.engines.worker import LIBRARIES, passage, peak_bytes

    for library in LIBRARIES[runtime]:
        __import__(library)
    imported = peak_bytes()
    threads = len(os.sched_getaffinity(0))
    engine = open_engine(Path(folder), threads=threads, kind=runtime)
    loaded = peak_bytes()
    prompt = passage(engine, context - NEW)
    if batch == 1 or runtime == "torch":
        engine.generate([prompt] * batch, Sampling(max_new_tokens=NEW, ignore_end=True))
    elif runtime in BATCHES:
        BATCHES[runtime](engine, prompt, context, batch)
    else:
        engine.at_once([prompt] * batch, NEW)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "imported": imported,
        "loaded": loaded,
        "peak": peak_bytes(),
        "anon": int(status["RssAnon"].split()[0]) * 1024,
        "file": int(status["RssFile"].split()[0]) * 1024,
    }


def _genai(engine: Any, prompt: list[int], context: int, batch: int) -> None:
    og, np = engine._og, engine._np
    params = og.GeneratorParams(engine._model)
    params.set_search_options(batch_size=batch, max_length=context, min_length=context, do_sample=False)
    generator = og.Generator(engine._model, params)
    generator.append_tokens(np.array([prompt] * batch, np.int32))
    while not generator.is_done():
        generator.generate_next_token()


def _llama_cpp(engine: Any, prompt: list[int], context: int, batch: int) -> None:
    lib = engine._lib
    params = lib.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = context * batch, 512, 512, batch
    params.n_threads = params.n_threads_batch = engine._threads
    made = lib.llama_init_from_model(engine._model, params)
    rows = lib.llama_batch_init(512, 0, 1)
    for row in range(batch):
        for start in range(0, len(prompt), 512):
            part = prompt[start : start + 512]
            rows.n_tokens = len(part)
            for i, token in enumerate(part):
                rows.token[i], rows.pos[i], rows.n_seq_id[i], rows.seq_id[i][0] = token, start + i, 1, row
                rows.logits[i] = i == len(part) - 1
            assert lib.llama_decode(made, rows) == 0
    for at in range(len(prompt), context):
        rows.n_tokens = batch
        for row in range(batch):
            rows.token[row], rows.pos[row], rows.n_seq_id[row], rows.seq_id[row][0], rows.logits[row] = (
                1,
                at,
                1,
                row,
                True,
            )
        assert lib.llama_decode(made, rows) == 0


BATCHES = {"onnx_genai": _genai, "llama_cpp": _llama_cpp}


def measure(case: tuple[str, str, str, int, int]) -> dict[str, Any]:
    """One case: convert what is not there yet, then answer in a fresh process."""
    name, runtime, form, context, batch = case
    source = WORK / name / "source"
    if not source.is_dir():
        subprocess.run([sys.executable, __file__, "--make", name], check=True)
    out = source if runtime == "torch" else WORK / name / f"{runtime}-{form}"
    if not out.is_dir():
        subprocess.run([sys.executable, __file__, "--convert", str(source), runtime, form, str(out)], check=True)
    words = [str(out), runtime, str(context), str(batch)]
    done = subprocess.run([sys.executable, __file__, "--answer", *words], check=True, capture_output=True, text=True)
    size = sum(
        file.stat().st_size
        for file in out.iterdir()
        if file.suffix in (".gguf", ".onnx", ".data", ".safetensors", ".bin", ".xml")
    )
    return {"case": case, "disk": size, **json.loads(done.stdout.splitlines()[-1])}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="MODEL")
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES)
    parser.add_argument(
        "--table", action="store_true", help="measure nothing, compare what is kept with the prediction"
    )
    parser.add_argument("--make", help=argparse.SUPPRESS)
    parser.add_argument("--convert", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--answer", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make(options.make, WORK / options.make / "source")
        return 0
    if options.convert:
        source, runtime, form, out = options.convert
        convert(Path(source), runtime, form, Path(out))
        return 0
    if options.answer:
        folder, runtime, context, batch = options.answer
        gc.collect()
        print(json.dumps(answer(folder, runtime, int(context), int(batch))))
        return 0
    saved = WORK / "measured.json"
    found = {json.dumps(row["case"]): row for row in (json.loads(saved.read_text()) if saved.is_file() else [])}
    for case in CASES if not options.table else []:
        if (options.only and case[0] not in options.only) or (options.runtimes and case[1] not in options.runtimes):
            continue
        print(*case, file=sys.stderr, flush=True)
        row = measure(case)
        found[json.dumps(case)] = row
        saved.write_text(json.dumps(list(found.values()), indent=1))
    print("| model | runtime | form | context | batch | foreseen | measured | off |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |")
    worst = 0.0
    for row in found.values():
        name, runtime, form, context, batch = row["case"]
        total = needs(models.find(models.load(), name).config, runtime, form, context, batch).total
        off = total / row["peak"] - 1
        worst = max(worst, abs(off))
        mark = "" if name in (FITTED[:1] if runtime == "openvino" else FITTED) else " *"
        cells = (f"{name}{mark}", runtime, form, context, batch, f"{total / 1e6:.0f} MB", f"{row['peak'] / 1e6:.0f} MB")
        print("|", " | ".join(map(str, cells)), f"| {100 * off:+.1f} % |")
    print(f"\n{len(found)} cases, the worst {100 * worst:.1f} % off; *: not a model that constants were taken from")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
