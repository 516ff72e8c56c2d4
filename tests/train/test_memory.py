"""The memory estimate: what it counts against what torch keeps, its laws, and the refusal."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from slmops.core.spec import Architecture, Lora, Training
from slmops.errors import ResourceError
from slmops.train import activations, memory, network, pass_memory, tuning
from slmops.train.available import available, resident
from slmops.train.batches import Part
from slmops.train.fit import Plan
from slmops.train.memory import Load
from slmops.train.pass_memory import PassPlan, Settings
from slmops.train.shape import Shape
from tests.train import bases

ROOT = Path(__file__).resolve().parents[2]


class Words:
    """A tokenizer as far as `network.build` looks."""

    pad_token_id, eos_token_id = 0, 1

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size


def kept_by_torch(net: network.Network, rows: int, width: int, losses: int, training: Training) -> int:
    """Bytes of all tensors that the forward pass saves, weights and their copies left out."""
    ids = torch.arange(rows * width).reshape(rows, width) % net.vocabulary
    where = torch.arange(losses) * (rows * width // losses)
    packed = training.batching == "pack"
    mask = torch.ones(width, width, dtype=torch.bool).tril().expand(rows, 1, width, width) if packed else None
    positions = torch.arange(width).expand(rows, width) if packed else None
    part = Part(ids, positions, mask, where, where, where.float(), where, where, rows * width)
    own = {w.untyped_storage().data_ptr() for w in net.weights.values()}
    sizes = {tuple(sorted(w.shape)) for w in net.weights.values() if w.ndim == 2}
    found: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        weight = tensor.ndim == 2 and tuple(sorted(tensor.shape)) in sizes
        if storage.data_ptr() not in own and not weight:
            found[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    net.learn(True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net.hidden(net.weights, part, training.dropout)
    return sum(found.values())


def tuned(model: Any, training: Training, own: bool = False) -> network.Network:
    """The network that `train.sft` makes of a model; with `own`, as the model's own code computes it."""
    handle = tuning.apply(model, training, 0)
    inner = model if training.tuning in ("full", "adapter") else handle.get_base_model()
    net = network.Network(inner, bf16=training.precision == "bf16")
    net.path = "head" if own else net.path
    return net


def check_activations(model: Any, training: Training, own: bool = False, within: float = 0.05) -> None:
    net = tuned(model, training, own)
    rows, width, losses = 8, 40, 128
    shape = Shape.of_config(net.model.config.to_dict())
    assert own or shape.written_out == (net.path == "fast")
    load = Load(rows * width, losses, width, 8, 320)
    counted = activations.activations(shape, training, load, training.precision == "bf16", own or None)
    assert counted == pytest.approx(kept_by_torch(net, rows, width, losses, training), rel=within)


LORAS = [{"tuning": "lora"}, {"tuning": "lora", "lora": {"rank": 8, "dropout": 0.1}}, {"tuning": "dora"},
         {"tuning": "lora", "lora": {"targets": ("q_proj", "v_proj")}}]  # fmt: skip
TUNINGS = [{}, *LORAS, {"tuning": "adapter", "adapter_width": 24}]


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("shared", [None, 2])
@pytest.mark.parametrize("how", [*TUNINGS, {"dropout": 0.1}, {"batching": "pack"}], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_what_torch_keeps(kind: Any, shared: int | None, how: dict[str, Any], precision: str) -> None:
    architecture = Architecture(type=kind, layers=3, hidden=64, heads=4, kv_heads=shared, ffn=96)
    training = Training.model_validate({**how, "precision": precision})
    check_activations(network.build(architecture, Words(300), 0), training)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3", "gemma3"])
@pytest.mark.parametrize("how", [*TUNINGS, {"batching": "pack"}], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_of_a_models_own_code_too(kind: str, how: dict[str, Any], precision: str) -> None:
    if kind == "phi3" and "lora" in how and how["lora"].get("targets"):
        how = {**how, "lora": {"targets": ("qkv_proj",)}}
    training = Training.model_validate({**how, "precision": precision})
    check_activations(bases.build(kind, 300, layers=3), training, own=True, within=0.1)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_the_shape_of_a_folder_is_that_of_its_architecture(kind: Any, tmp_path: Path) -> None:
    architecture = Architecture(type=kind, layers=2, hidden=64, heads=4, kv_heads=2, tie_embeddings=False)
    model = network.build(architecture, Words(300), 0)
    model.save_pretrained(tmp_path)
    shape = Shape.of_folder(tmp_path)
    assert shape == Shape.of(architecture, 300)
    assert shape is not None and shape.parameters == sum(p.numel() for p in model.parameters())
    (tmp_path / "config.json").write_text("{}")
    assert Shape.of_folder(tmp_path) is None


def shape_of(layers: int = 4, hidden: int = 256, vocabulary: int = 4000) -> Shape:
    return Shape.of(Architecture(layers=layers, hidden=hidden, heads=4), vocabulary)


def peak(shape: Shape, training: Training, examples: int = 500, tokens: int = 60) -> int:
    return memory.memory(shape, training, Load.guess(training, examples, tokens * 0.7, tokens * 0.3)).peak


def crosses(shape: Shape, larger: Shape) -> bool:
    """Whether a matrix grows out of the heap, into pages of its own that are given back: only so can more need less."""
    mapped = memory.MAPPED // 4
    before, after = ([*one.linears.values(), (one.vocabulary, one.hidden)] for one in (shape, larger))
    return any(a * b < mapped <= c * d for (a, b), (c, d) in zip(before, after, strict=True))


@given(
    st.integers(1, 24),
    st.sampled_from([64, 256, 1024]),
    st.integers(300, 60_000),
    st.integers(1, 128),
    st.integers(10, 400),
)
@example(1, 256, 26_215, 2, 245)
@settings(deadline=None, max_examples=60)
def test_more_of_anything_never_needs_less(layers: int, hidden: int, vocabulary: int, batch: int, tokens: int) -> None:
    training = Training(batch_size=batch)
    base = peak(shape_of(layers, hidden, vocabulary), training, tokens=tokens)
    assert peak(shape_of(layers + 1, hidden, vocabulary), training, tokens=tokens) > base
    assert peak(shape_of(layers, hidden + 64, vocabulary), training, tokens=tokens) > base or crosses(
        shape_of(layers, hidden, vocabulary), shape_of(layers, hidden + 64, vocabulary)
    )
    assert peak(shape_of(layers, hidden, vocabulary + 64), training, tokens=tokens) > base or crosses(
        shape_of(layers, hidden, vocabulary), shape_of(layers, hidden, vocabulary + 64)
    )
    assert peak(shape_of(layers, hidden, vocabulary), Training(batch_size=batch + 8), tokens=tokens) >= base
    assert peak(shape_of(layers, hidden, vocabulary), training, tokens=tokens + 20) > base
    assert peak(shape_of(layers, hidden, vocabulary), training, examples=600, tokens=tokens) >= base


def test_what_saves_memory_is_foreseen_to() -> None:
    shape, training = shape_of(12, 512, 8000), Training(batch_size=64)
    base = peak(shape, training, tokens=200)
    for change in ({"accumulate": 8}, {"checkpointing": True}, {"max_length": 64}):
        changed = training.model_copy(update=change)
        less = memory.memory(shape, changed, Load.guess(changed, 500, min(140, changed.max_length or 140), 60))
        assert less.peak < base, change
    small = Training(batch_size=2)
    assert peak(shape, small.model_copy(update={"tuning": "lora"})) < 0.8 * peak(shape, small)


def test_tunings_train_as_many_weights_as_peft() -> None:
    peft = pytest.importorskip("peft")
    architecture = Architecture(layers=3, hidden=64, heads=4, kv_heads=2, ffn=96)
    for targets in (None, ("q_proj", "down_proj")):
        names = targets or ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        for how in ("lora", "dora"):
            training = Training(tuning=how, lora=Lora(rank=4, targets=targets))  # type: ignore[arg-type]
            config = peft.LoraConfig(r=4, target_modules=list(names), use_dora=how == "dora", task_type="CAUSAL_LM")
            model = peft.get_peft_model(network.build(architecture, Words(300), 0), config)
            moved = sum(p.numel() for p in model.parameters() if p.requires_grad)
            assert memory.trained(Shape.of(architecture, 300), training) == moved


def test_the_load_is_that_of_the_largest_part() -> None:
    lengths, answers = np.array([11, 21, 31, 41]), np.array([6, 11, 16, 36])
    whole = Load.of(lengths, answers, Training(batch_size=4), 0)
    assert (whole.tokens, whole.losses, whole.width) == (4 * 40, 5 + 10 + 15 + 5, 40)
    assert Load.of(lengths, answers, Training(batch_size=4, accumulate=2), 0).tokens == 2 * 40
    assert Load.of(lengths, answers, Training(batch_size=4, max_length=21), 0).width == 20
    assert Load.of(lengths, answers, Training(batch_size=4, prompt_weight=0.1), 0).losses == 100
    held = Load.of(lengths, answers, Training(), 0, np.array([9]))
    assert (held.examples, held.all_tokens, held.held, whole.held) == (5, 113, 1, 0)


def plan(scratch: bool = True, **changes: Any) -> Plan:
    training = Training.model_validate({"batch_size": 64, **changes})

    def load(t: Training) -> Load:
        width = min(300, t.max_length or 300)
        return Load.guess(t, 1000, width * 0.7, width * 0.3)

    return Plan("student", "train.", shape_of(8, 512, 8000), training, load, scratch, False)


def test_every_way_out_really_fits() -> None:
    full = plan(scratch=False)
    needed = full.memory().peak
    bound = needed // 2
    ways = full.ways_out(bound)
    assert [way.partition(" (")[0].partition(":")[0] for way in ways] == [
        "train.accumulate", "train.checkpointing", "train.max_length"
    ]  # fmt: skip
    parts = int(ways[0].split()[1])
    assert full.memory(accumulate=parts).peak <= bound < full.memory(accumulate=parts // 2).peak
    assert full.memory(checkpointing=True).peak <= bound
    assert full.memory(tuning="lora").peak > bound  # so it is not named
    assert any("tuning: lora" in way for way in full.ways_out(full.memory(tuning="lora").peak))
    assert not any("lora" in way for way in plan().ways_out(full.memory(tuning="lora").peak))


def test_where_one_setting_is_not_enough_all_are_named_together() -> None:
    tight = plan()
    least = tight.memory(accumulate=64, checkpointing=True).peak
    (way,) = tight.ways_out(least)
    assert way.startswith("train.accumulate: 64 with train.checkpointing: true (")
    assert tight.ways_out(least - 1) == []
    with pytest.raises(ResourceError, match=r"needs about .* GB of memory \(.*\), 100 MB are available") as error:
        tight.require(100_000_000)
    assert "smaller model" in error.value.hint
    tight.require(None)
    tight.require(tight.memory().peak)


def teacher_pass(**settings: Any) -> PassPlan:
    """A pass over 5,000 examples of 60 tokens, of a teacher with a large vocabulary."""

    def load(changed: Settings) -> pass_memory.Load:
        return pass_memory.Load.guess(changed.batch_size, 5000, min(120, changed.max_length or 120), 45, 15)

    return PassPlan("logits", "train.", Settings("logits", **settings), load, (shape_of(8, 512, 50_000),), False)


def test_the_load_of_a_pass_is_that_of_its_largest_batch() -> None:
    lengths, answers = np.array([41, 11, 31, 21]), np.array([36, 6, 16, 11])
    load = pass_memory.Load.of(lengths, answers, 2)
    assert (load.tokens, load.losses, load.width) == (2 * 40, 5 + 15, 41)  # [11, 21] and [31, 41]
    assert (load.examples, load.all_tokens, load.answers) == (4, 104, 35)


def test_a_pass_needs_more_for_more() -> None:
    base = teacher_pass().memory().peak
    assert teacher_pass(batch_size=128).memory().peak > base > teacher_pass(batch_size=16).memory().peak
    assert teacher_pass(samples=64).memory().peak > base > teacher_pass(samples=2).memory().peak
    assert teacher_pass(max_length=40).memory().peak < base
    two = replace(teacher_pass(), teachers=(shape_of(8, 512, 50_000),) * 2)
    assert two.memory().peak > base + 4 * shape_of(8, 512, 50_000).parameters


def test_what_makes_a_pass_fit_does_and_where_nothing_does_it_says_so() -> None:
    plan = teacher_pass()
    bound = (plan.memory().needed + plan.memory(batch_size=16).needed) // 2
    ways = plan.ways_out(bound)
    assert ways[0].startswith("train.teacher_batch: ")
    assert plan.memory(batch_size=int(ways[0].split()[1])).needed <= bound
    with pytest.raises(ResourceError, match=r"the teacher's pass logits needs about .* are available") as caught:
        plan.require(bound)
    assert ways[0] in caught.value.hint
    with pytest.raises(ResourceError) as caught:
        plan.require(400_000_000)
    assert "smaller teacher" in caught.value.hint and "method: sequence" in caught.value.hint
    plan.require(plan.memory().needed)
    plan.require(None)


@pytest.mark.parametrize("version", [1, 2])
def test_control_groups_bound_what_is_available(version: int, tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000000 kB\nMemAvailable:  8000000 kB\n")
    assert available(tmp_path) == 8_000_000 * 1024
    line, base = ("0::/a/b", "") if version == 2 else ("5:cpu,memory:/a/b", "memory")
    (tmp_path / "proc/self/cgroup").write_text(f"9:name=systemd:/\n{line}\n")
    limit, used = (
        ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    )
    cache = "inactive_file" if version == 2 else "total_inactive_file"
    for name, most in (("a/b", "max"), ("a", "3000000000")):
        group = tmp_path / "sys/fs/cgroup" / base / name
        group.mkdir(parents=True, exist_ok=True)
        (group / limit).write_text(f"{most}\n")
        (group / used).write_text("1000000000\n")
        (group / "memory.stat").write_text(f"anon 5\n{cache} 400000000\n")
    assert available(tmp_path) == 3_000_000_000 - 600_000_000
    assert resident() > 50_000_000


@pytest.mark.slow
def test_the_measured_peak_is_near(tmp_path: Path) -> None:
    out = tmp_path / "memory.json"
    words = [
        sys.executable,
        str(ROOT / "benchmarks/memory.py"),
        "--only",
        "1M llama",
        "5M qwen3",
        "pass, 3M",
        "--json",
        str(out),
    ]
    subprocess.run(words, check=True, cwd=ROOT)
    for case in json.loads(out.read_text())["cases"]:
        assert case["ratio"] == pytest.approx(1, abs=0.25), case


HELD = """
import ctypes
from slmops.train import heap
from slmops.train.available import resident
library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes, library.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
pieces = [library.malloc(100_000) for _ in range(1000)]
for piece in pieces:
    ctypes.memset(piece, 1, 100_000)
for piece in pieces[:-1]:
    library.free(piece)
before = resident()
heap.give_back()
print(before - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc, whose heap this is")
def test_what_is_free_below_a_piece_in_use_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 80_000_000
