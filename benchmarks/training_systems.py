"""What the training benchmark compares: the cases, their inputs, and one training by each system, measured.

It promises that every system starts from the same files and is measured the same way; `training.py` starts each of these in
a process of its own, and README.md says how the others are set up.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, int]] = {  # the decoders, llama, vocabulary 2,048
    "0.7M": {"layers": 2, "hidden": 128, "heads": 4},
    "5M": {"layers": 6, "hidden": 256, "heads": 8},
    "11M": {"layers": 6, "hidden": 384, "heads": 8},
    "41M": {"layers": 12, "hidden": 512, "heads": 8},
    "304M": {"layers": 24, "hidden": 1024, "heads": 16},
}
RANK, NEW_TOKENS = 16, 64
TEACHER = {False: (1024, 3), True: (512, 1)}  # examples and epochs of the teachers, by `--quick`
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
