"""Training speed and memory of slmops, TRL and LLaMA-Factory, side by side on the CPU or a GPU: a table and JSON.

    python benchmarks/training.py            # three rounds of each case
    python benchmarks/training.py --quick    # one round of a few steps
    python benchmarks/training.py --llamafactory .venv-llamafactory/bin/python
    python benchmarks/training.py --cuda     # larger models on a GPU, in bf16, without LLaMA-Factory

It promises that all train the same model from the same first weights on the same token ids, batch size, epochs,
optimiser, learning rates, precision and threads, each in a fresh process, in turns (slmops, TRL, slmops, TRL, …), and
it stops if their tokens or steps differ. README.md beside it says what the columns mean and how the others are set up.

The first process imports nothing heavy: it starts workers, which are this same file with `--worker`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import wraps
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

BUILD = Path(__file__).resolve().parent.parent / "build" / "bench"
NAMES = {"slmops": "slmops", "trl": "TRL", "llamafactory": "LLaMA-Factory", "trainer": "transformers Trainer"}
SHAPES: dict[str, dict[str, int]] = {  # the decoders, llama, vocabulary 2,048
    "0.7M": {"layers": 2, "hidden": 128, "heads": 4},
    "5M": {"layers": 6, "hidden": 256, "heads": 8},
    "11M": {"layers": 6, "hidden": 384, "heads": 8},
    "41M": {"layers": 12, "hidden": 512, "heads": 8},
    "304M": {"layers": 24, "hidden": 1024, "heads": 16},
}
VOCABULARY, BATCH, VALIDATION, LONGEST = 2048, 64, 256, 256


@dataclass(frozen=True)
class Case:
    """A comparison: `student` learns `examples` for `epochs`; with a `teacher` from its distributions alone.

    Attributes:
        method: sft, logits, on_policy, dpo, orpo.
        tuning: full, lora, dora, qlora.
        taught: the student is not fresh: it learned the teachers' examples first.
        rate: learning rate; None: the default of sft.
    """

    name: str
    student: str
    examples: int
    epochs: int
    teacher: str | None = None
    method: str = "sft"
    tuning: str = "full"
    taught: bool = False
    rate: float | None = None

    @property
    def start(self) -> str:
        """The folder of its first weights."""
        return f"{'taught' if self.taught else 'student'}-{self.student}"


def tuned(count: int, epochs: int, large: str = "5M", small: str = "0.7M") -> tuple[Case, ...]:
    """The tunings and the other methods, from a model that knows something already."""
    return (
        *(Case(f"{t} {large}", large, count, epochs, tuning=t, taught=True) for t in ("lora", "dora", "qlora")),
        Case(f"on_policy {large} to {small}", small, count, epochs, large, "on_policy", taught=True, rate=5e-4),
        Case(f"dpo {large}", large, count, epochs, method="dpo", taught=True, rate=1e-4),
        Case(f"orpo {large}", large, count, epochs, method="orpo", taught=True, rate=1e-4),
    )


FULL = (
    Case("sft 0.7M", "0.7M", 2048, 3),
    Case("sft 5M", "5M", 512, 2),
    Case("logits 5M to 0.7M", "0.7M", 512, 5, "5M", "logits"),
    *tuned(512, 2),
)
LARGE = (Case("logits 11M to 0.7M", "0.7M", 512, 5, "11M", "logits"),)  # with `--large`: its teacher takes minutes
QUICK = (
    Case("sft 0.7M", "0.7M", 512, 3),
    Case("sft 5M", "5M", 256, 1),
    Case("logits 5M to 0.7M", "0.7M", 256, 5, "5M", "logits"),
    *tuned(256, 1),
)
CUDA = (
    Case("sft 304M", "304M", 2048, 1),
    Case("logits 304M to 41M", "41M", 2048, 2, "304M", "logits"),
    *tuned(2048, 1, "304M", "41M"),
)
RANK, NEW_TOKENS = 16, 64
SAME = Case("one batch", "0.7M", BATCH, 20)  # one batch an epoch: the order of the data cannot matter
TEACHER = {False: (1024, 3), True: (512, 1)}  # examples and epochs of the teachers, by `--quick`


@dataclass(frozen=True)
class Job:
    """What a worker is told; `python` is the interpreter of LLaMA-Factory's environment, where that is asked for."""

    system: str
    case: Case
    inputs: str
    out: str
    threads: int
    precision: str
    seed: int
    python: str = ""
    device: str = "cpu"


# -- inputs: data, tokenizer, first weights of the students, teachers ------------------------------------------------


def make_inputs(job: Job, cases: list[Case], quick: bool) -> None:
    """Everything that all sides read, made once."""
    from slmops.core.example import Example, Message
    from slmops.core.spec import Architecture, Training
    from slmops.templates import support_desk
    from slmops.train import encode, network, sft, tokenizer

    folder, data = Path(job.inputs), Path(job.inputs) / "data"
    data.mkdir(parents=True)
    taught, epochs = TEACHER[quick]
    most = max(taught, *(case.examples for case in cases))
    rows = []
    for row in support_desk.generate(most + VALIDATION, job.seed):
        user, answer = row["messages"]
        rows.append(Example((Message("user", user["content"]),), answer["content"], "gold").to_json())

    def write(name: str, some: list[dict[str, Any]]) -> None:
        (data / name).write_text("".join(json.dumps(row) + "\n" for row in some), "utf-8")

    write("validation.jsonl", rows[-VALIDATION:])
    for count in {case.examples for case in cases}:
        write(f"train-{count}.jsonl", rows[:count])
        write(
            f"pairs-{count}.jsonl", [row | {"rejected": other(rows, place)} for place, row in enumerate(rows[:count])]
        )
    write("teacher.jsonl", rows[:taught])
    ctx = context(job)
    (folder / "tokenizer").mkdir()
    tokenizer.run(tokenizer.Params(vocabulary=VOCABULARY), {"data": data}, folder / "tokenizer", ctx)
    words = encode.load_tokenizer(folder / "tokenizer")
    for size in {case.student for case in cases}:
        out = folder / f"student-{size}"
        network.save(network.build(Architecture(**SHAPES[size]), words, job.seed), folder / "tokenizer", out)
    taught_sizes = {f"teacher-{case.teacher}" for case in cases if case.teacher}
    for name in sorted(taught_sizes | {case.start for case in cases if case.taught}):
        size, out = name.partition("-")[2], folder / name
        out.mkdir()
        shutil.rmtree(ctx.scratch, ignore_errors=True)
        training = Training(
            epochs=epochs, batch_size=BATCH, learning_rate=1e-3, precision="auto", holdout=0.0, evaluations=1
        )
        params = sft.Params(training=training, architecture=Architecture(**SHAPES[size]), files=("data/teacher.jsonl",))
        sft.run(params, {"data": data, "tokenizer": folder / "tokenizer"}, out, ctx)
    shutil.rmtree(ctx.scratch, ignore_errors=True)


def other(rows: list[dict[str, Any]], place: int) -> str:
    """The answer of the next example that has another one: what the pairs reject."""
    own = rows[place]["messages"][-1]["content"]
    texts = (rows[(place + n) % len(rows)]["messages"][-1]["content"] for n in range(1, len(rows)))
    return next(text for text in texts if text != own)


def context(job: Job) -> Any:
    """A method's context whose scratch is new."""
    from slmops.core.method import Context

    scratch = Path(job.out).with_suffix(".scratch")
    return Context(job.seed, scratch, scratch, threads=job.threads)


# -- one training ------------------------------------------------------------------------------------------------------


def train_slmops(job: Job, out: Path) -> dict[str, Any]:
    """Through the methods themselves: what `slmops run` does, without validation on the way."""
    import torch  # noqa: F401
    from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: F401  (loaded before the clock starts, as for TRL)

    from slmops.core.spec import Lora, OnPolicy, Train
    from slmops.train import batches, cache_logits, dpo, encode, logits, loop, network, on_policy, orpo, pairs, sft  # noqa: F401

    imported = peak_mb()
    folder, case, ctx = Path(job.inputs), job.case, context(job)
    begun, cpu = time.perf_counter(), time.process_time()
    common: dict[str, Any] = {
        "epochs": case.epochs, "batch_size": BATCH, "precision": job.precision, "holdout": 0.0, "evaluations": 1,
        "tuning": case.tuning, "lora": Lora(rank=RANK),
    }  # fmt: skip
    if case.rate:
        common["learning_rate"] = case.rate
    kind = "pairs" if case.method in ("dpo", "orpo") else "train"
    files = (f"data/{kind}-{case.examples}.jsonl",)
    inputs = {"data": folder / "data", "base": folder / case.start}
    cached = 0.0
    if case.method == "logits":
        training = Train(method="logits", logit_weight=1.0, temperature=1.0, **common)
        cache = out.with_suffix(".cache")
        cache.mkdir()
        kept = cache_logits.Params(files=files, samples=training.logit_samples, precision=training.precision)
        cache_logits.run(kept, {"data": folder / "data", "teacher": folder / f"teacher-{case.teacher}"}, cache, ctx)
        cached = time.perf_counter() - begun
        facts = logits.run(logits.Params(training=training, files=files), {**inputs, "logits": cache}, out, ctx)
    elif case.method == "on_policy":
        writing = OnPolicy(share=1.0, beta=0.5, refresh=1, max_new_tokens=NEW_TOKENS)
        training = Train(method="on_policy", on_policy=writing, **common)
        taught = inputs | {"teacher": folder / f"teacher-{case.teacher}"}
        facts = on_policy.run(on_policy.Params(training=training, files=files), taught, out, ctx)
    elif case.method == "dpo":
        taken = timed(dpo, "reference")
        facts = dpo.run(dpo.Params(training=Train(method="dpo", **common), files=files), inputs, out, ctx)
        cached = sum(taken)
    elif case.method == "orpo":
        facts = orpo.run(orpo.Params(training=Train(method="orpo", **common), files=files), inputs, out, ctx)
    else:
        facts = sft.run(sft.Params(training=Train(**common), files=files), inputs, out, ctx)
    whole, cpu = time.perf_counter() - begun, time.process_time() - cpu
    measured = {
        "train_s": facts["seconds"], "cache_s": cached, "whole_s": whole, "whole_cpu_s": cpu, "peak_mb": peak_mb(),
        "imports_mb": imported, "steps": facts["steps"], "gpu_mb": gpu_mb(job),
    }  # fmt: skip
    if case.method == "on_policy":
        return {**measured, "tokens": ""}
    data = encode.encode(encode.read(inputs, files), encode.load_tokenizer(inputs["base"]), LONGEST)
    if kind == "pairs":
        data = pairs.with_rejected(data, inputs["base"], LONGEST)
    each = zip(data.ids, data.answer_tokens.tolist(), strict=True)
    return {**measured, "tokens": fingerprint((ids.tolist(), count) for ids, count in each)}


def train_trl(job: Job, out: Path) -> dict[str, Any]:
    """The trainer of TRL that README.md names for the case.

    For the system `trainer`: the plain Trainer of transformers, on the same ids.
    """
    import torch
    from datasets import Dataset, disable_progress_bars
    from peft import LoraConfig
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import (  # noqa: F401
        AutoModelForCausalLM,
        AutoTokenizer,
        BitsAndBytesConfig,
        LlamaForCausalLM,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )
    from trl import DistillationConfig, DistillationTrainer, DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
    from trl.experimental.gkd import GKDConfig, GKDTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from slmops.core.spec import Training
    from slmops.train.loop import Schedule

    class Clock(TrainerCallback):  # type: ignore[misc]
        """Seconds from the first batch to the last step."""

        begun = seconds = 0.0

        def on_train_begin(self, *_args: Any, **_more: Any) -> None:
            self.begun = time.perf_counter()

        def on_train_end(self, *_args: Any, **_more: Any) -> None:
            if job.device == "cuda":
                torch.cuda.synchronize()
            self.seconds = time.perf_counter() - self.begun

    imported = peak_mb()
    disable_progress_bars()
    torch.set_num_threads(job.threads)
    folder, case = Path(job.inputs), job.case
    ours = Training(epochs=case.epochs, batch_size=BATCH)
    ours = ours.model_copy(update={"learning_rate": case.rate or ours.learning_rate})
    begun, cpu = time.perf_counter(), time.process_time()
    student = folder / case.start
    tokenizer = AutoTokenizer.from_pretrained(student)

    def load(path: Path, **more: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa", **more)

    settings: dict[str, Any] = {
        "output_dir": str(out.with_suffix(".trl")), "num_train_epochs": case.epochs, "seed": job.seed,
        "per_device_train_batch_size": BATCH, "gradient_accumulation_steps": 1, "gradient_checkpointing": False,
        "optim": "adamw_torch_fused", "weight_decay": ours.weight_decay, "adam_beta2": 0.98, "max_grad_norm": ours.clip,
        "learning_rate": ours.learning_rate, "bf16": job.precision == "bf16", "use_cpu": job.device == "cpu",
        "train_sampling_strategy": "group_by_length", "dataloader_num_workers": 0, "dataloader_pin_memory": False,
        "eval_strategy": "no", "save_strategy": "no", "logging_strategy": "no", "report_to": "none",
        "disable_tqdm": True,
    }  # fmt: skip
    kind = "pairs" if case.method in ("dpo", "orpo") else "train"
    rows = [json.loads(line) for line in (folder / "data" / f"{kind}-{case.examples}.jsonl").open(encoding="utf-8")]
    clock = Clock()
    taken: list[float] = []
    common: dict[str, Any] = {"processing_class": tokenizer, "callbacks": [clock]}
    if case.tuning == "qlora":
        low = torch.bfloat16 if job.device == "cuda" else torch.float32
        four = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=low
        )
        common["model"] = load(student, quantization_config=four, device_map={"": job.device})
    else:
        common["model"] = load(student)
    if case.tuning != "full":
        common["peft_config"] = LoraConfig(
            r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, use_dora=case.tuning == "dora", task_type="CAUSAL_LM",
            target_modules="all-linear",
        )  # fmt: skip
    trainer: Any
    if case.method == "logits":
        # GKDTrainer renders and tokenises each batch in every epoch unless the ids are there: so they are.
        trainer = GKDTrainer(
            teacher_model=load(folder / f"teacher-{case.teacher}"),
            args=GKDConfig(**settings, max_length=LONGEST, lmbda=0.0, beta=0.0, temperature=1.0),
            train_dataset=Dataset.from_list(tokenise(rows, tokenizer)),
            data_collator=DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id),
            **common,
        )
    elif case.method == "on_policy":
        del settings["train_sampling_strategy"]
        trainer = DistillationTrainer(
            teacher_model=load(folder / f"teacher-{case.teacher}"),
            args=DistillationConfig(**settings, max_completion_length=NEW_TOKENS, beta=0.5, temperature=1.0),
            train_dataset=Dataset.from_list([{"prompt": row["messages"][:-1]} for row in rows]),
            **common,
        )
    elif case.method in ("dpo", "orpo"):
        del settings["train_sampling_strategy"]
        pairs = [
            {
                "prompt": row["messages"][:-1],
                "chosen": row["messages"][-1:],
                "rejected": [{"role": "assistant", "content": row["rejected"]}],
            }
            for row in rows
        ]
        taken = timed(DPOTrainer, "_precompute_ref_logps")
        made: Any = (DPOTrainer, DPOConfig) if case.method == "dpo" else (ORPOTrainer, ORPOConfig)
        more = {"precompute_ref_log_probs": True, "precompute_ref_batch_size": BATCH} if case.method == "dpo" else {}
        trainer = made[0](
            args=made[1](**settings, max_length=LONGEST, beta=0.1, **more),
            train_dataset=Dataset.from_list(pairs),
            **common,
        )
    elif job.system == "trainer":
        trainer = Trainer(
            args=TrainingArguments(**settings),
            train_dataset=Dataset.from_list(tokenise(rows, tokenizer)),
            data_collator=DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id),
            **common,
        )
    else:
        asked = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in rows]
        trainer = SFTTrainer(
            args=SFTConfig(**settings, max_length=LONGEST, completion_only_loss=True),
            train_dataset=Dataset.from_list(asked),
            **common,
        )
    schedule = Schedule.of(ours, case.examples)
    trainer.create_optimizer()
    trainer.lr_scheduler = LambdaLR(trainer.optimizer, lambda step: schedule.learning_rate(step) / ours.learning_rate)
    trainer.train()
    if case.tuning == "full":
        trainer.save_model(str(out))
    else:
        trainer.model.save_pretrained(str(out / "adapter"))
    whole, cpu = time.perf_counter() - begun, time.process_time() - cpu
    measured = {
        "train_s": clock.seconds, "cache_s": sum(taken), "whole_s": whole, "whole_cpu_s": cpu, "peak_mb": peak_mb(),
        "imports_mb": imported, "steps": trainer.state.global_step, "gpu_mb": gpu_mb(job),
    }  # fmt: skip
    if case.tuning != "full":
        merge(student, out)
    if case.method == "on_policy":  # tokenised on the way: only the steps are compared
        return {**measured, "tokens": ""}
    return {**measured, "tokens": fingerprint(learned(trainer.train_dataset))}


def train_llamafactory(job: Job, out: Path) -> dict[str, Any]:
    """What `llamafactory-cli train` does, in a process of LLaMA-Factory's own interpreter (llamafactory_peer.py)."""
    from slmops.core.spec import Training
    from slmops.train.loop import Schedule

    folder, case, files = Path(job.inputs), job.case, out.with_suffix(".llamafactory")
    files.mkdir()
    ours = Training(epochs=case.epochs, batch_size=BATCH)
    ours = ours.model_copy(update={"learning_rate": case.rate or ours.learning_rate})
    schedule = Schedule.of(ours, case.examples)
    told = {
        "arguments": llamafactory_arguments(job, out, files, ours.learning_rate, ours.weight_decay, ours.clip),
        "rates": [schedule.learning_rate(step) for step in range(schedule.total)],
        "threads": job.threads,
    }
    write_for_llamafactory(folder / "data", case, files)
    (files / "told.json").write_text(json.dumps(told), "utf-8")
    peer = Path(__file__).with_name("llamafactory_peer.py")
    environment = os.environ | {"HF_HOME": str(files / "cache"), "USE_MODELSCOPE_HUB": "0"}
    command = [job.python, str(peer), str(files / "told.json"), str(files / "measured.json")]
    subprocess.run(command, env=environment, check=True)
    measured: dict[str, Any] = json.loads((files / "measured.json").read_text("utf-8"))
    if case.tuning != "full":
        merge(folder / case.start, out)
    return measured


def llamafactory_arguments(job: Job, out: Path, files: Path, rate: float, decay: float, clip: float) -> dict[str, Any]:
    """What its YAML file would say. Its template is the one that it reads from the tokenizer."""
    case, pairs = job.case, job.case.method in ("dpo", "orpo")
    found: dict[str, Any] = {
        "model_name_or_path": str(Path(job.inputs) / case.start), "dataset": "bench", "dataset_dir": str(files),
        "output_dir": str(out if case.tuning == "full" else out / "adapter"), "overwrite_cache": True,
        "stage": "dpo" if pairs else "sft", "finetuning_type": "full" if case.tuning == "full" else "lora",
        "do_train": True, "num_train_epochs": float(case.epochs), "seed": job.seed, "cutoff_len": LONGEST,
        "per_device_train_batch_size": BATCH, "gradient_accumulation_steps": 1, "disable_gradient_checkpointing": True,
        "flash_attn": "sdpa", "optim": "adamw_torch_fused", "weight_decay": decay, "adam_beta2": 0.98,
        "max_grad_norm": clip, "learning_rate": rate, "lr_scheduler_type": "cosine", "bf16": job.precision == "bf16",
        "use_cpu": True, "dataloader_num_workers": 0, "dataloader_pin_memory": False, "eval_strategy": "no",
        "save_strategy": "no", "logging_strategy": "no", "report_to": "none", "plot_loss": False, "disable_tqdm": True,
    }  # fmt: skip
    if pairs:
        found |= {"pref_beta": 0.1, "pref_loss": "sigmoid" if case.method == "dpo" else "orpo"}
    else:
        found |= {"train_sampling_strategy": "group_by_length"}  # its pairs have no column that it could group by
    if case.tuning != "full":
        found |= {"lora_rank": RANK, "lora_alpha": 2 * RANK, "lora_dropout": 0.0, "lora_target": "all"}
    if case.tuning == "dora":
        found |= {"use_dora": True}
    if case.tuning == "qlora":
        found |= {"quantization_bit": 4, "quantization_type": "nf4", "double_quantization": True}
    return found


def write_for_llamafactory(data: Path, case: Case, files: Path) -> None:
    """The training examples of a case in its format, and the file that describes them."""
    file, columns, pairs = (
        data / f"train-{case.examples}.jsonl",
        {"messages": "messages"},
        case.method in ("dpo", "orpo"),
    )
    if pairs:
        source = (data / f"pairs-{case.examples}.jsonl").read_text("utf-8").splitlines()
        rows = [
            {
                "messages": row["messages"][:-1],
                "chosen": row["messages"][-1],
                "rejected": {"role": "assistant", "content": row["rejected"]},
            }
            for row in map(json.loads, source)
        ]
        file, columns = files / "pairs.jsonl", columns | {"chosen": "chosen", "rejected": "rejected"}
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    tags = {"role_tag": "role", "content_tag": "content"}
    tags |= {"user_tag": "user", "assistant_tag": "assistant", "system_tag": "system"}
    told = {"file_name": str(file), "formatting": "sharegpt", "ranking": pairs, "columns": columns, "tags": tags}
    (files / "dataset_info.json").write_text(json.dumps({"bench": told}), "utf-8")


def merge(student: Path, out: Path) -> None:
    """Put the low-rank additions in `out/adapter` into the student and write it to `out`."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    PeftModel.from_pretrained(base, str(out / "adapter")).merge_and_unload().save_pretrained(str(out))


def tokenise(rows: list[dict[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
    """Rows of ids and labels; the prompt has no label."""
    found = []
    for row in rows:
        prompt = tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, tokenize=False)
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        head = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        found.append({"input_ids": ids, "labels": [-100] * head + ids[head:], "length": len(ids)})
    return found


def timed(owner: Any, name: str) -> list[float]:
    """From now on the seconds of each call of a function or method of `owner` go into the list that is returned."""
    function, taken = getattr(owner, name), list[float]()

    @wraps(function)
    def call(*args: Any, **more: Any) -> Any:
        begun = time.perf_counter()
        try:
            return function(*args, **more)
        finally:
            taken.append(time.perf_counter() - begun)

    setattr(owner, name, call)
    return taken


def learned(rows: Any) -> Iterator[tuple[list[int], int]]:
    """Token ids and number of answer tokens of each row of a trainer's data; of pairs all chosen, then all rejected.

    Args:
        rows: can be gone through twice; with ids and labels, or with the ids of prompt and answers apart.
    """
    first = next(iter(rows))
    for side in ("chosen", "rejected") if any("chosen" in name for name in first) else ("",):
        front = f"{side}_" if side else ""
        for row in rows:
            if "prompt_ids" in row:
                yield row["prompt_ids"] + row[f"{front}ids"], len(row[f"{front}ids"])
            else:
                yield row[f"{front}input_ids"], sum(label != -100 for label in row[f"{front}labels"])


def fingerprint(rows: Iterable[tuple[list[int], int]]) -> str:
    """Digest of the examples' token ids and numbers of answer tokens, in order."""
    return hashlib.sha256(json.dumps([[ids, answer] for ids, answer in rows]).encode()).hexdigest()[:16]


def gpu_mb(job: Job) -> float:
    """The most GPU memory that tensors of this process have held at once, in MB (1e6 bytes); 0 on a CPU."""
    import torch

    return torch.cuda.max_memory_allocated() / 1e6 if job.device == "cuda" else 0.0


def peak_mb() -> float:
    """The most memory that this process has had at once, in MB (1e6 bytes)."""
    try:  # ru_maxrss would count the parent's memory too if that was larger when it forked
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6
    except (OSError, IndexError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def score(job: Job, out: Path) -> dict[str, float]:
    """Nats per answer token on the validation examples, by the models' own code: the same for all sides.

    Returns:
        `loss`: cross-entropy of the gold answers; with a teacher also `kl`: KL(teacher || student).
    """
    import torch
    from transformers import AutoModelForCausalLM

    from slmops.train import encode

    folder = Path(job.inputs)
    inputs = {"data": folder / "data"}
    tokenizer = encode.load_tokenizer(folder / "tokenizer")
    data = encode.encode(encode.read(inputs, ("data/validation.jsonl",)), tokenizer, LONGEST)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    teacher: Any = None
    if job.case.teacher:
        teacher = AutoModelForCausalLM.from_pretrained(
            folder / f"teacher-{job.case.teacher}", dtype=torch.float32
        ).eval()
    loss = kl = 0.0
    with torch.no_grad():
        for ids, start in zip(data.ids, data.answer_from.tolist(), strict=True):
            tokens = torch.from_numpy(ids)[None]
            logq = model(input_ids=tokens).logits[0, start - 1 : -1].log_softmax(-1)
            loss -= float(logq.gather(1, tokens[0, start:, None]).sum())
            if teacher is not None:
                logp = teacher(input_ids=tokens).logits[0, start - 1 : -1].log_softmax(-1)
                kl += float((logp.exp() * (logp - logq)).sum())
    count = int(data.answer_tokens.sum())
    return {"loss": loss / count, **({"kl": kl / count} if teacher is not None else {})}


def work(job: Job) -> dict[str, Any]:
    """Train, measure, then score."""
    trainers: dict[str, Callable[[Job, Path], dict[str, Any]]] = {
        "slmops": train_slmops, "trl": train_trl, "trainer": train_trl, "llamafactory": train_llamafactory,
    }  # fmt: skip
    out = Path(job.out)
    out.mkdir(parents=True)
    measured = trainers[job.system](job, out)
    measured |= score(job, out)
    seen = job.case.examples * job.case.epochs
    measured["examples_per_s"] = seen / (measured["train_s"] + measured["cache_s"])
    measured["whole_examples_per_s"] = seen / measured["whole_s"]
    return measured


# -- the rounds --------------------------------------------------------------------------------------------------------


def start(job: Job, more: list[str], threads: int, log: Path) -> dict[str, Any]:
    """Run a worker in a fresh process and read what it wrote."""
    result = log.with_suffix(".result.json")
    result.unlink(missing_ok=True)
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
    if job.device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, __file__, "--worker", json.dumps(asdict(job)), "--result", str(result), *more]
    with log.open("w", encoding="utf-8") as file:
        worker = subprocess.Popen(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = worker.wait()
        finally:
            if worker.poll() is None:  # interrupted: with all that the worker has started
                os.killpg(worker.pid, signal.SIGKILL)
    if code or not result.exists():
        tail = "\n".join(log.read_text("utf-8", errors="replace").splitlines()[-15:])
        raise SystemExit(f"the worker for {job.system}, {job.case.name} ended with {code}:\n{tail}\n(all of it: {log})")
    found: dict[str, Any] = json.loads(result.read_text("utf-8"))
    return found


def machine(threads: int, device: str) -> dict[str, Any]:
    """What the numbers belong to."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    packages = {name: version(name) for name in ("torch", "transformers", "trl", "accelerate", "datasets")}
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    return {
        "cpu": model, "cores": os.cpu_count(), "threads": threads, "load_before": load, "python": platform.python_version(),
        "packages": packages, "gpu": gpu_name() if device == "cuda" else None,
    }  # fmt: skip


def covers(system: str, case: Case) -> bool:
    """Whether a system can train the case: LLaMA-Factory has no distillation, the plain Trainer the cross-entropy alone."""
    if system == "llamafactory":
        return case.method in ("sft", "dpo", "orpo")
    return system != "trainer" or (case.method, case.tuning) == ("sft", "full")


def gpu_name() -> str:
    """The GPU, as a process of its own sees it: this one stays free of torch."""
    code = "import torch; print(torch.cuda.get_device_name())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def summary(case: Case, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians of all sides, the ratio of the medians and the lowest and highest ratio of a round."""
    middle: dict[str, dict[str, Any]] = {
        system: {k: median(r[k] for r in rows) for k, v in rows[0].items() if isinstance(v, float | int)}
        for system, rows in runs.items()
    }
    ratios: dict[str, Any] = {}
    for other in list(runs)[1:]:
        ratios[other] = {}
        for name in ("examples_per_s", "whole_s", "whole_cpu_s", "peak_mb", "gpu_mb"):
            if not middle["slmops"][name]:
                continue
            rounds = [a[name] / b[name] for a, b in zip(runs["slmops"], runs[other], strict=True)]
            value = middle["slmops"][name] / middle[other][name]
            ratios[other][name] = {"value": value, "low": min(rounds), "high": max(rounds)}
    return {**asdict(case), "batch_size": BATCH, "median": middle, "slmops_to": ratios, "rounds": runs}


def table(cases: list[dict[str, Any]]) -> str:
    """A Markdown table: for each case a row a system and the ratios to slmops."""
    lines = [
        "| case | system | examples/s | cache (s) | training (s) | whole job (s) | CPU (s) | peak MB | GPU MB | validation loss "
        "| KL to teacher |",
        "| --- | --- |" + " ---: |" * 9,
    ]
    for case in cases:
        for system, m in case["median"].items():
            cells = [
                f"{m['examples_per_s']:,.1f}", f"{m['cache_s']:.1f}" if m["cache_s"] else "", f"{m['train_s']:.1f}",
                f"{m['whole_s']:.1f}", f"{m['whole_cpu_s']:.1f}", f"{m['peak_mb']:,.0f}",
                f"{m['gpu_mb']:,.0f}" if m["gpu_mb"] else "", f"{m['loss']:.4f}",
                f"{m['kl']:.4f}" if "kl" in m else "",
            ]  # fmt: skip
            lines.append(
                f"| {case['name'] if system == 'slmops' else ''} | {NAMES[system]} | " + " | ".join(cells) + " |"
            )
        for other, ratio in case["slmops_to"].items():
            speed = ratio["examples_per_s"]
            cells = [f"**×{speed['value']:.2f}** ({speed['low']:.2f}–{speed['high']:.2f})", "", ""]
            for name in ("whole_s", "whole_cpu_s", "peak_mb", "gpu_mb"):
                cells.append(f"×{ratio[name]['value']:.2f}" if name in ratio else "")
            lines.append(f"| | slmops / {NAMES[other]} | " + " | ".join([*cells, "", ""]) + " |")
    return "\n".join(lines)


def check_same(case: Case, results: dict[str, dict[str, Any]], tolerance: float | None = None) -> None:
    """All sides must have made the same number of steps over the same tokens, and learned the same where that is due.

    Args:
        tolerance: how far the validation losses may lie apart; None: not looked at.
    """
    for name in ("steps", "tokens"):
        values = {system: result[name] for system, result in results.items()}
        if len(set(values.values())) > 1:
            raise SystemExit(f"{case.name}: the sides differ in {name}, so nothing can be compared: {values}")
    losses = {system: result["loss"] for system, result in results.items()}
    if tolerance is not None and max(losses.values()) - min(losses.values()) > tolerance:
        raise SystemExit(f"{case.name}: the sides do not learn the same: validation losses {losses}")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All rounds of all cases."""
    offered = CUDA if options.cuda else QUICK if options.quick else FULL
    device = "cuda" if options.cuda else "cpu"
    offered += LARGE if options.large else ()
    cases = [c for c in offered if not options.only or any(text in c.name for text in options.only)]
    if not cases:
        raise SystemExit(f"no case is called {options.only}; there are: {', '.join(c.name for c in offered)}")
    rounds = options.rounds or (1 if options.quick else 3)
    found: dict[str, Any] = {
        "machine": machine(options.threads, device),
        "precision": options.precision,
        "quick": options.quick,
    }
    BUILD.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()

    def say(text: str) -> None:
        print(f"{time.perf_counter() - begun:6.0f} s  {text}", file=sys.stderr, flush=True)

    made_of = json.dumps(
        [SHAPES, [asdict(c) for c in [*cases, SAME]], TEACHER[options.quick], options.seed, VOCABULARY]
    )
    inputs = BUILD / f"inputs-{hashlib.sha256(made_of.encode()).hexdigest()[:10]}"
    if not (inputs / "done").exists():
        say("making data, tokenizer, first weights and teachers (kept for the next time)")
        shutil.rmtree(inputs, ignore_errors=True)
        job = Job(
            "setup",
            cases[0],
            str(inputs),
            str(BUILD / "setup"),
            options.threads,
            options.precision,
            options.seed,
            device=device,
        )
        more = ["--setup", json.dumps([asdict(c) for c in [*cases, SAME]]), *(["--quick"] if options.quick else [])]
        start(job, more, options.threads, BUILD / "setup.log")
        (inputs / "done").touch()
    asked = {"trl": options.trl, "llamafactory": options.llamafactory, "trainer": options.trainer}
    systems = ("slmops", *(system for system, wanted in asked.items() if wanted))

    def one(system: str, case: Case, label: str) -> dict[str, Any]:
        shutil.rmtree(BUILD / "work", ignore_errors=True)
        out = str(BUILD / "work" / "model")
        python = str(options.llamafactory or "")
        job = Job(system, case, str(inputs), out, options.threads, options.precision, options.seed, python, device)
        result = start(job, [], options.threads, BUILD / f"{system}.log")
        if "packages" in result:
            found["machine"][f"{system}_packages"] = result.pop("packages")
        say(
            f"{label}  {case.name:<20} {NAMES[system]:<13} {result['examples_per_s']:8.1f} examples/s"
            f"  {result.get('gpu_mb') or result['peak_mb']:6.0f} MB  validation loss {result['loss']:.4f}"
        )
        return result

    same = {system: one(system, SAME, "check") for system in systems}
    check_same(SAME, same, 1e-3 if options.precision == "fp32" else 3e-2)
    found["same_batches_validation_loss"] = {system: result["loss"] for system, result in same.items()}
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {
        case.name: {system: [] for system in systems if covers(system, case)} for case in cases
    }
    for number in range(rounds):
        for case in cases:
            for system, results in runs[case.name].items():
                results.append(one(system, case, f"round {number + 1}/{rounds}"))
            check_same(case, {system: results[-1] for system, results in runs[case.name].items()})
    shutil.rmtree(BUILD / "work", ignore_errors=True)
    found["cases"] = [summary(case, runs[case.name]) for case in cases]
    found["seconds"] = round(time.perf_counter() - begun, 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of a few steps: does it work, roughly how fast")
    parser.add_argument("--rounds", type=int, help="default: 3, with --quick 1")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads of all sides")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: fp32, with --cuda bf16")
    parser.add_argument("--cuda", action="store_true", help="larger models, on a GPU")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="cases whose name holds one of these")
    parser.add_argument("--large", action="store_true", help="also distillation from an 11 M teacher")
    parser.add_argument("--no-trl", dest="trl", action="store_false", help="leave TRL out")
    parser.add_argument("--trainer", action="store_true", help="also the plain Trainer of transformers, for SFT")
    parser.add_argument(
        "--llamafactory", type=Path, metavar="PYTHON", help="also LLaMA-Factory, with the interpreter that has it"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=BUILD / "training.json", help="where the numbers go")
    for hidden in ("--worker", "--result", "--setup"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cuda and options.llamafactory:
        raise SystemExit("--cuda: LLaMA-Factory is run on the CPU alone; leave --llamafactory out")
    options.precision = options.precision or ("bf16" if options.cuda else "fp32")
    if options.worker:
        told = json.loads(options.worker)
        job = Job(**{**told, "case": Case(**told["case"])})
        result: dict[str, Any] = {}
        if options.setup:
            make_inputs(job, [Case(**c) for c in json.loads(options.setup)], options.quick)
        else:
            result = work(job)
        Path(options.result).write_text(json.dumps(result), "utf-8")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the worker is stopped too
    found = measure(options)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(table(found["cases"]))
    host, same = found["machine"], found["same_batches_validation_loss"]
    losses = ", ".join(f"{NAMES[system]} {loss:.6f}" for system, loss in same.items())
    print(f"\nValidation loss after {SAME.epochs} steps on one and the same batch: {losses}.")
    print(
        f"{host['gpu'] or host['cpu']}, {options.threads} threads, {options.precision}, load before {host['load_before']}"
    )
    print(f"wrote {options.json}")


if __name__ == "__main__":
    main()
