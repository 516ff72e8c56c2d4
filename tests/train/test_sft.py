"""What training promises: it learns, resumes exactly, saves what others load, and refuses bad data clearly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slmops.core.example import Example, Message
from slmops.core.method import Context, SilentProgress
from slmops.core.spec import Training
from slmops.errors import DataError, ModelError, TrainingError
from slmops.train import sft
from tests.train.conftest import FAST, TINY, examples, write_rows


def params(kind: str = "llama", **training: object) -> sft.Params:
    return sft.Params(
        training=FAST.model_copy(update=training),
        architecture=TINY[kind],
        files=("data/teacher.jsonl",),
        validation="data/validation.jsonl",
    )


def train(p: sft.Params, inputs: dict[str, Path], out: Path, seed: int = 3) -> dict:
    out.mkdir(parents=True)
    scratch = out.parent / (out.name + "-scratch")
    return sft.run(p, inputs, out, Context(seed=seed, scratch=scratch, shared=scratch))


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_learns_and_loads_in_transformers(kind: str, data: Path, tokenizer: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "model"
    facts = train(params(kind, epochs=30), {"data": data, "tokenizer": tokenizer}, out)
    record = json.loads((out / "training.json").read_text())
    losses = [p["validation_loss"] for p in record["points"] if p["validation_loss"] is not None]
    assert record["points"][0]["train_loss"] > 2
    assert min(losses) < 0.1
    assert facts["best_validation_loss"] == record["best_validation_loss"] == min(losses)
    model, tok = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    right = 0
    for example in examples(24, 3):
        ids = tok.apply_chat_template(example.prompt_messages(), add_generation_prompt=True, return_tensors="pt")[
            "input_ids"
        ]
        with torch.no_grad():
            new = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        right += tok.decode(new, skip_special_tokens=True) == example.answer and new[-1] == tok.eos_token_id
    assert right >= 20


def test_existing_model_goes_on(data: Path, tokenizer: Path, tmp_path: Path) -> None:
    train(params(epochs=3), {"data": data, "tokenizer": tokenizer}, tmp_path / "first")
    p = params(epochs=1, learning_rate=1e-3).model_copy(update={"architecture": None})
    train(p, {"data": data, "base": tmp_path / "first"}, tmp_path / "second")
    first, second = (json.loads((tmp_path / n / "training.json").read_text()) for n in ("first", "second"))
    assert second["points"][0]["train_loss"] < first["points"][0]["train_loss"]


def test_same_twice_and_other_with_another_seed(data: Path, tokenizer: Path, tmp_path: Path) -> None:
    inputs = {"data": data, "tokenizer": tokenizer}
    p = params(epochs=1, dropout=0.1)
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train(p, inputs, tmp_path / name, seed)
    a, b, c = ((tmp_path / n / "model.safetensors").read_bytes() for n in "abc")
    assert a == b != c
    assert (tmp_path / "a/training.json").read_bytes() == (tmp_path / "b/training.json").read_bytes()


CHILD = """
import sys, json
from pathlib import Path
from slmops.core.method import Context
from slmops.train import sft, loop
loop.EVERY_S = float(sys.argv[5])
out = Path(sys.argv[3]); out.mkdir(exist_ok=True)
class P:
    def start(self, *a, **k): print("start", flush=True)
    def advance(self, done=1, note=""): print(done, flush=True)
    def stop(self): pass
    def point(self, *a, **k): pass
    def log(self, text): print(text, flush=True)
sft.run(sft.Params.model_validate_json(sys.argv[1]), {"data": Path(sys.argv[2]), "tokenizer": Path(sys.argv[6])},
        out, Context(seed=3, scratch=Path(sys.argv[4]), shared=out, progress=P()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("extra", [{"dropout": 0.1, "accumulate": 2}, {"quantization_aware": "int4", "patience": 1}])
def test_killed_anywhere_resumes_to_the_same_bytes(
    extra: dict[str, object], data: Path, tokenizer: Path, tmp_path: Path
) -> None:
    p = params(epochs=8, **extra)
    train(p, {"data": data, "tokenizer": tokenizer}, tmp_path / "whole")
    out, kills, resumed = tmp_path / "cut", 0, 0
    for attempt in range(40):
        child = subprocess.Popen(
            [
                sys.executable,
                "-c",
                CHILD,
                p.model_dump_json(),
                str(data),
                str(out),
                str(tmp_path / "scratch"),
                "0.01",
                str(tokenizer),
            ],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert child.stdout is not None
        for lines, line in enumerate(child.stdout, 1):
            resumed += line.startswith("going on")
            if (attempt < 6 or resumed < 3) and lines == 3 + 5 * attempt % 11:
                time.sleep(0.003 * attempt)
                child.send_signal(signal.SIGKILL)
                kills += 1
                break
        child.stdout.close()
        if child.wait() == 0:
            break
    assert kills >= 4
    assert resumed >= 3
    for name in ("model.safetensors", "training.json", "config.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_checkpoint_of_other_data_is_not_taken(data: Path, tokenizer: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_rows(other / "teacher.jsonl", examples(60, 9))
    write_rows(other / "validation.jsonl", examples(10, 8))
    scratch, p = tmp_path / "scratch", params(epochs=1)
    for name, folder in (("one", data), ("two", other)):
        (tmp_path / name).mkdir()
        progress = SilentProgress()
        sft.run(p, {"data": folder, "tokenizer": tokenizer}, tmp_path / name, Context(3, scratch, scratch, 1, progress))
        assert not any("going on" in line for line in progress.lines)


def test_best_weights_are_kept_and_patience_stops(data: Path, tokenizer: Path, tmp_path: Path) -> None:
    few = tmp_path / "few"
    write_rows(few / "teacher.jsonl", examples(12, 5))
    (few / "validation.jsonl").write_bytes((data / "validation.jsonl").read_bytes())
    facts = train(
        params(epochs=200, learning_rate=2e-2, evaluations=40, patience=3),
        {"data": few, "tokenizer": tokenizer},
        tmp_path / "model",
    )
    assert facts["stopped_early"]
    assert facts["steps"] < facts["planned_steps"]
    points = json.loads((tmp_path / "model/training.json").read_text())["points"]
    looks = {p["step"]: p["validation_loss"] for p in points if p["validation_loss"] is not None}
    assert looks[facts["best_step"]] == min(looks.values())
    again = train(  # the saved weights are the best ones: a look before anything is learned gives the same loss
        params(epochs=1, learning_rate=1e-12, evaluations=1).model_copy(update={"architecture": None}),
        {"data": few, "base": tmp_path / "model"},
        tmp_path / "again",
    )
    assert again["best_validation_loss"] == pytest.approx(facts["best_validation_loss"], abs=1e-4)


def test_divergence_names_step_and_batch(data: Path, tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(
        TrainingError, match=r"at step \d+ of \d+ \(epoch \d+, batch \d+ of 8, with data/teacher.jsonl:\d+"
    ) as error:
        train(
            params(learning_rate=1e9, warmup=0.0, clip=1e9), {"data": data, "tokenizer": tokenizer}, tmp_path / "model"
        )
    assert "learning_rate" in error.value.hint


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no examples"),
        ([Example((Message("user", f"m {i}"),), "yes") for i in range(5)], "has the answer 'yes'"),
        (
            [*examples(4), Example((Message("user", "word " * 90),), "x")],
            r"teacher.jsonl:5: the prompt is longer than the model's",
        ),
        (
            [*examples(4), Example((Message("user", "hi"),), "word " * 90)],
            r"teacher.jsonl:5: prompt and answer are longer",
        ),
        ([*examples(4), Example((Message("user", "hi"),))], r"teacher.jsonl:5: the example has no answer"),
        (
            [*examples(4), Example((Message("user", "hi <|end|> you"),), "x")],
            r"teacher.jsonl:5: the text holds the control mark",
        ),
    ],
)
def test_bad_data_is_refused(rows: list[Example], message: str, data: Path, tokenizer: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "data/teacher.jsonl", rows)
    (tmp_path / "data/validation.jsonl").write_bytes((data / "validation.jsonl").read_bytes())
    with pytest.raises(DataError, match=message) as error:
        train(params(), {"data": tmp_path / "data", "tokenizer": tokenizer}, tmp_path / "model")
    assert error.value.hint


def test_missing_inputs_are_named(data: Path, tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="tokenizer"):
        train(params(), {"data": data}, tmp_path / "a")
    p = params().model_copy(update={"files": ("data/nothing.jsonl",)})
    with pytest.raises(DataError, match="no such file"):
        train(p, {"data": data, "tokenizer": tokenizer}, tmp_path / "b")
    with pytest.raises(ModelError, match="cannot be loaded"):
        train(params().model_copy(update={"architecture": None}), {"data": data, "base": data}, tmp_path / "c")


def test_holdout_goes_by_content() -> None:
    from slmops.train.encode import Row

    rows = [Row(e, "f", i) for i, e in enumerate(examples(300))]
    kept, held = sft.hold_out(rows, 0.1)
    assert 10 <= len(held) <= 60
    assert len(kept) + len(held) == 300
    _, again = sft.hold_out(rows[::-1], 0.1)
    assert {r.example.id for r in held} == {r.example.id for r in again}
    assert sft.hold_out(rows, 0.0) == (rows, [])
    assert len(sft.hold_out(rows[:12], 0.001)[1]) == 1


def test_without_a_validation_split_examples_are_held_out(data: Path, tokenizer: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "teacher.jsonl").write_bytes((data / "teacher.jsonl").read_bytes())
    (folder / "validation.jsonl").write_text("")
    looked = {}
    for file in ("data/validation.jsonl", None):
        p = params(epochs=1, holdout=0.2).model_copy(update={"validation": file})
        facts = train(p, {"data": folder, "tokenizer": tokenizer}, tmp_path / f"m{file is None}")
        looked[file] = facts["validation_examples"]
        assert facts["examples"] + looked[file] == 120
    assert looked["data/validation.jsonl"] == looked[None] > 0


def test_training_without_validation_keeps_the_last_weights(data: Path, tokenizer: Path, tmp_path: Path) -> None:
    p = params(epochs=1, holdout=0.0).model_copy(update={"validation": None})
    facts = train(p, {"data": data, "tokenizer": tokenizer}, tmp_path / "m")
    assert facts["best_validation_loss"] is None
    assert facts["best_step"] == facts["steps"] == 8


def test_a_method_module_imports_nothing_heavy() -> None:
    code = (
        "import sys, slmops.train.sft, slmops.train.logits, slmops.train.cache_logits, slmops.train.tokenizer, slmops.train.estimate;"
        "assert not {'torch', 'numpy', 'transformers', 'tokenizers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})


def test_prompt_weight_teaches_messages(data: Path, tokenizer: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    train(params(epochs=30, prompt_weight=0.3), {"data": data, "tokenizer": tokenizer}, tmp_path / "m")
    model, tok = AutoModelForCausalLM.from_pretrained(tmp_path / "m"), AutoTokenizer.from_pretrained(tmp_path / "m")
    start = torch.tensor([[tok.convert_tokens_to_ids("<|user|>")]])
    text = tok.decode(model.generate(start, max_new_tokens=40, do_sample=False)[0], skip_special_tokens=False)
    assert text.endswith("<|end|>")
    assert text.split("|>")[1].split()[0] in {"hi", "hello", "please", "hey"}


def test_training_defaults_are_used() -> None:
    assert sft.Params(files=("data/gold.jsonl",)).training == Training()


def test_training_on_rounded_weights_survives_rounding(data: Path, tokenizer: Path, tmp_path: Path) -> None:
    """Rounded to 4 bits, the model that was trained for it keeps its loss; the saved weights are not rounded ones."""
    import torch

    from slmops.train import encode, network
    from slmops.train.objective import validation_loss
    from slmops.train.quantization_aware import fake_int4

    rows = encode.read({"data": data}, ("data/validation.jsonl",))
    held = encode.encode(rows, encode.load_tokenizer(tokenizer), 64)
    lost = {}
    for mode in ("off", "int4"):
        p = params(epochs=12, quantization_aware=mode, block_size=16, patience=0)
        facts = train(p, {"data": data, "tokenizer": tokenizer}, tmp_path / mode)
        net = network.Network(network.load(tmp_path / mode))
        rounded = {n: fake_int4(w, 16) if n in net.matrices else w for n, w in net.weights.items()}
        lost[mode] = validation_loss(net, rounded, held, p.training)
        assert not torch.equal(rounded[net.embedding], net.weights[net.embedding])
    assert lost["int4"] == pytest.approx(facts["best_validation_loss"], rel=1e-3)
    assert lost["int4"] < lost["off"]
    assert facts["rounding_from"] == int(0.6 * facts["planned_steps"])
    assert facts["best_step"] > facts["rounding_from"]
