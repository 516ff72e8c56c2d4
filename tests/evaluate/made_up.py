"""Made-up inputs of `evaluate.report` with known answers: a task of intents that models of different skill label."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

LABELS = [
    "card_lost", "card_arrival", "balance", "transfer", "exchange_rate", "top_up", "refund", "pin_change", "fees",
    "close_account", "atm_limit", "direct_debit", "statement", "fraud", "mobile_app", "out_of_scope",
]  # fmt: skip
SKILL = {
    "teacher-torch": 0.94, "teacher-fp32": 0.94, "student-fp32": 0.925, "student-int4": 0.92, "few-int4": 0.58,
    "all-int4": 0.915,
}  # fmt: skip
SIZE = {"teacher-fp32": 21_000_000, "student-fp32": 1_000_000, "student-int4": 141_000}
SPEED = {"teacher-torch": 0.060, "teacher-fp32": 0.030, "student-fp32": 0.0042, "student-int4": 0.0035}
MEMORY = {"teacher-torch": 48e6, "teacher-fp32": 34e6, "student-fp32": 1.9e6, "student-int4": 1.1e6}


def write(folder: Path, name: str, value: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = value if isinstance(value, str) else json.dumps(value)
    (folder / name).write_text(text, encoding="utf-8")
    return folder


def predictions(folder: Path, rows: list[dict[str, Any]]) -> Path:
    return write(folder, "predictions.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def classification(root: Path, n: int = 900, seed: int = 5, skill: dict[str, float] | None = None) -> dict[str, Path]:
    """Inputs with everything that a report can hold. Easy examples are easy for all, as with real models."""
    rng = random.Random(seed)
    skill = SKILL if skill is None else skill
    examples = []
    for i in range(n):
        gold = LABELS[min(int(rng.random() ** 1.3 * len(LABELS)), len(LABELS) - 1)]
        prompt = f"please help with <{gold.replace('_', ' ')}> & such, message {i}"
        examples.append((f"{rng.getrandbits(64):016x}", prompt, gold, rng.random()))
    inputs: dict[str, Path] = {}
    for variant, level in skill.items():
        noise = random.Random(f"{seed}{variant.split('-')[0]}")
        rows = []
        for id_, prompt, gold, hardness in examples:
            near = LABELS[(LABELS.index(gold) + 1) % len(LABELS)]
            right = 0.85 * hardness + 0.15 * noise.random() < level
            if variant.endswith("int4") and random.Random(id_ + variant).random() < 0.004:
                right = not right
            answer = gold if right else near
            rows.append({"id": id_, "prompt": prompt, "gold": gold, "answer": answer, "finished": True, "tokens": 4})
        inputs[f"predictions.{variant}"] = predictions(root / f"predict-{variant}", rows)
    inputs["data"] = write(
        root / "data",
        "info.json",
        {
            "files": {
                "teacher": {"examples": 3600}, "gold": {"examples": 160}, "pool": {"examples": 7040},
                "oracle": {"examples": 7200}, "validation": {"examples": 800}, "test": {"examples": n},
            },
            "labels": LABELS,
            "removed": {"train_exact": {"count": 12, "examples": []}, "train_near": {"count": 31, "examples": []}},
        },
    )  # fmt: skip
    inputs["measurement"] = write(root / "measure", "measurement.json", measurement(seed))
    for variant, size in SIZE.items():
        folder = write(root / variant, "model.onnx", "g" * 40_000)
        (folder / "model.onnx.data").write_bytes(b"\0" * (size - 40_000))
        write(folder, "tokenizer.json", "t" * 90_000)
        write(
            folder,
            "fidelity.json",
            {"token_agreement": 0.998, "mean_kl": 0.0004, "prompts": 32, "first_divergence": None},
        )
        inputs[f"converted.{variant}"] = folder
    for name, floor in (("teacher", 0.12), ("student", 0.2), ("few", 0.6), ("all", 0.22)):
        points = [
            {
                "step": step,
                "train_loss": floor + 3.2 / (1 + step / 25) + rng.random() * 0.05,
                "validation_loss": floor + 0.1 + 3.3 / (1 + step / 25) if step % 100 == 0 else None,
            }
            for step in range(20, 1001, 20)
        ]
        facts = {"steps": 1000, "best_step": 900, "points": points, "parameters": 240_000, "precision": "fp32"}
        inputs[f"training.{name}"] = write(root / f"model-{name}", "training.json", facts)
    odd = {"prompt": "what is <b>love</b>", "answer": "poetry", "reason": "invalid", "detail": "no known label"}
    filters = {
        "valid": {"dropped": 41, "examples": [odd, odd | {"prompt": "sing me a song"}]},
        "duplicate": {"dropped": 377, "examples": [{"prompt": "please help with fees", "answer": "fees"}]},
        "contamination": {"dropped": 9, "examples": []},
    }
    inputs["synthetic"] = write(root / "synthetic", "stats.json", {"seen": 7040, "kept": 6613, "filters": filters})
    check = {"answer_cross_entropy": 0.11, "teacher_entropy": 0.08, "vocabulary_overlap": 1.0}
    inputs["logits"] = write(root / "logits", "self_check.json", check)
    return inputs


def measurement(seed: int = 5, rounds: int = 3, prompts: int = 50) -> dict[str, Any]:
    rng = random.Random(seed)
    length = [rng.uniform(0.7, 1.5) for _ in range(prompts)]
    variants = {}
    for variant, speed in SPEED.items():
        variants[variant] = {
            "rounds": [
                {
                    "first_token_s": [0.3 * speed * f * rng.lognormvariate(0, 0.05) for f in length],
                    "total_s": [speed * f * rng.lognormvariate(0, 0.08) for f in length],
                    "tokens": [4] * prompts,
                    "peak_bytes": 180e6 + MEMORY[variant] * rng.uniform(0.98, 1.02),
                    "baseline_bytes": 180e6,
                }
                for _ in range(rounds)
            ]
        }
    return {
        "threads": 2,
        "prompt_ids": [f"{i:016x}" for i in range(prompts)],
        "environment": {"cpu": "made up", "system": "Linux"},
        "variants": variants,
    }
