"""One training by LLaMA-Factory, measured: `training.py` starts it with the interpreter of LLaMA-Factory's environment.

    PYTHON benchmarks/llamafactory_peer.py TOLD.json MEASURED.json

It promises to run what `llamafactory-cli train` runs, with the arguments in TOLD.json and three things added: a clock from
the first batch to the last step, the learning rate of every step, and a look at the token ids that were learned. What it
is told, and how the model is judged afterwards, is for `training_systems.py`, which shares its fingerprint and its measure of memory.
"""

from __future__ import annotations

import importlib.machinery
import json
import sys
import time
import types
from importlib.metadata import version
from pathlib import Path
from typing import Any

from training_systems import fingerprint, learned, peak_mb

PACKAGES = ("llamafactory", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes")


def main() -> None:
    told = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    import bitsandbytes  # noqa: F401  (so that memory after the imports means the same in every case)
    import torch
    import transformers
    from transformers import LlamaForCausalLM, TrainerCallback  # noqa: F401

    # LLaMA-Factory imports torchaudio, whatever it trains; the package index has it for CUDA alone. Text needs none.
    sound = types.ModuleType("torchaudio")
    sound.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
    sys.modules.setdefault("torchaudio", sound)
    from llamafactory.train.tuner import run_exp

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(told["threads"])
    rates: list[float] = told["rates"]

    class Watch(TrainerCallback):  # type: ignore[misc]
        """Seconds from the first batch to the last step; sets the learning rates; keeps the data."""

        begun = seconds = 0.0
        steps = 0
        data: Any = None

        def on_train_begin(self, _args: Any, _state: Any, _control: Any, **parts: Any) -> None:
            schedule, self.data = parts["lr_scheduler"], parts["train_dataloader"].dataset
            peak = schedule.base_lrs[0]
            schedule.lr_lambdas = [lambda step: rates[min(step, len(rates) - 1)] / peak for _ in schedule.lr_lambdas]
            for group in schedule.optimizer.param_groups:
                group["lr"] = rates[0]
            self.begun = time.perf_counter()

        def on_train_end(self, _args: Any, state: Any, _control: Any, **_parts: Any) -> None:
            self.seconds, self.steps = time.perf_counter() - self.begun, state.global_step

    watch, imported = Watch(), peak_mb()
    begun, cpu = time.perf_counter(), time.process_time()
    run_exp(told["arguments"], [watch])
    whole, cpu = time.perf_counter() - begun, time.process_time() - cpu
    measured = {
        "train_s": watch.seconds, "cache_s": 0.0, "whole_s": whole, "whole_cpu_s": cpu, "peak_mb": peak_mb(),
        "imports_mb": imported, "gpu_mb": 0.0, "steps": watch.steps, "tokens": fingerprint(learned(watch.data)),
        "packages": {name: version(name) for name in PACKAGES},
    }  # fmt: skip
    Path(sys.argv[2]).write_text(json.dumps(measured), "utf-8")


if __name__ == "__main__":
    main()
