"""The training benchmark: what keeps it from comparing what is not the same, without a single training."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from benchmarks import training
from benchmarks.training import check_same, covers

from training_systems import Case, Job, fingerprint, learned, llamafactory_arguments, write_for_llamafactory

PAIR = Case("dpo", "5M", 2, 1, method="dpo")


def test_a_trainer_s_columns_do_not_change_the_fingerprint() -> None:
    ours = [([1, 2, 3, 4], 2), ([1, 5, 6], 1), ([1, 2, 7], 1), ([1, 5, 8, 9], 2)]
    apart = [
        {"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [7]},
        {"prompt_ids": [1, 5], "chosen_ids": [6], "rejected_ids": [8, 9]},
    ]
    whole = [
        {
            f"{side}_{what}": [-100] * (len(row["prompt_ids"]) if what == "labels" else 0)
            + (row["prompt_ids"] if what == "input_ids" else [])
            + row[f"{side}_ids"]
            for side in ("chosen", "rejected")
            for what in ("input_ids", "labels")
        }
        for row in apart
    ]
    plain = [{"input_ids": ids, "labels": [-100] * (len(ids) - n) + ids[len(ids) - n :]} for ids, n in ours]
    assert {fingerprint(learned(rows)) for rows in (apart, whole, plain)} == {fingerprint(ours)}
    plain[1]["labels"][1] = 5  # one more answer token
    assert fingerprint(learned(plain)) != fingerprint(ours)


@pytest.mark.parametrize(
    ("name", "value", "said"), [("tokens", "b", "tokens"), ("steps", 9, "steps"), ("loss", 1.1, "learn the same")]
)
def test_nothing_is_compared_that_differs(name: str, value: Any, said: str) -> None:
    same = {"tokens": "a", "steps": 8, "loss": 1.0}
    check_same(PAIR, {"slmops": same, "trl": same}, 1e-3)
    with pytest.raises(SystemExit, match=said):
        check_same(PAIR, {"slmops": same, "trl": same, "llamafactory": same | {name: value}}, 1e-3)


def test_each_system_is_asked_for_what_it_has() -> None:
    asked = {s: [c.name for c in training.FULL if covers(s, c)] for s in ("slmops", "trl", "llamafactory", "trainer")}
    every = [c.name for c in training.FULL]
    assert asked["slmops"] == asked["trl"] == every
    assert [name for name in every if name not in asked["llamafactory"]] == [
        "logits 5M to 0.7M",
        "on_policy 5M to 0.7M",
    ]
    assert asked["trainer"] == ["sft 0.7M", "sft 5M"]


def test_llamafactory_is_given_the_same_pairs_and_settings(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "where is it?"}, {"role": "assistant", "content": "on its way"}]
    rows = [{"messages": messages, "source": "gold", "rejected": "no"}] * 2
    (tmp_path / "pairs-2.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_for_llamafactory(tmp_path, PAIR, tmp_path)
    told = json.loads((tmp_path / "dataset_info.json").read_text())["bench"]
    written = [json.loads(line) for line in Path(told["file_name"]).read_text().splitlines()]
    assert told["ranking"] and len(written) == 2
    assert written[0][told["columns"]["messages"]] == messages[:1]
    assert written[0][told["columns"]["chosen"]] == messages[1]
    assert written[0][told["columns"]["rejected"]]["content"] == "no"

    job = Job("llamafactory", PAIR, str(tmp_path), "", threads=1, precision="fp32", seed=3)
    found = llamafactory_arguments(job, tmp_path, tmp_path, 1e-4, 0.05, 1.0)
    said = (found["stage"], found["pref_loss"], found["finetuning_type"], found["seed"], found["bf16"])
    assert said == ("dpo", "sigmoid", "full", 3, False)
    tuned = Job("llamafactory", Case("q", "5M", 2, 1, tuning="qlora"), str(tmp_path), "", 1, "bf16", 3)
    found = llamafactory_arguments(tuned, tmp_path, tmp_path, 1e-4, 0.05, 1.0)
    assert (found["stage"], found["finetuning_type"], found["quantization_bit"], found["bf16"]) == (
        "sft",
        "lora",
        4,
        True,
    )


@pytest.mark.skipif(os.name != "posix", reason="needs process groups, which POSIX systems have")
def test_an_interrupted_benchmark_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, noted = tmp_path / "python", tmp_path / "pid"
    script.write_text(f"#!/bin/sh\nsleep 60 &\necho $! > {noted}.half\nmv {noted}.half {noted}\nwait\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))

    def interrupt(*_: Any) -> None:
        if noted.exists():
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    try:
        with pytest.raises(KeyboardInterrupt):
            training.start(Job("llamafactory", PAIR, "", "", 1, "fp32", 0), [], 1, tmp_path / "log")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    child, deadline = int(noted.read_text()), time.monotonic() + 10
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(child)


def alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and that nobody has asked after does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except FileNotFoundError:  # it has ended just now, or the system has no /proc
        return not Path("/proc/self").exists()
