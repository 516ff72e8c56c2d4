"""A base is read without two copies of its weights being there at once; measured by the system, in fresh processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from slmops.core.spec import Architecture
from slmops.train import network
from slmops.train.shape import Shape, lower_bytes
from tests.train.test_memory import Words

ASK = """
import sys, json
from pathlib import Path
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from slmops.train import network, tuning
what, folder = sys.argv[1], Path(sys.argv[2])
LlamaForCausalLM(LlamaConfig(vocab_size=99, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1))
if what == "load_4bit":
    import bitsandbytes
def memory(name):
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name + ":"))
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before = memory("VmRSS")
model = tuning.load_4bit(folder) if what == "load_4bit" else network.load(folder)
peak, loaded = memory("VmHWM") - before, memory("VmRSS") - before
with torch.no_grad():
    for weight in model.parameters():
        if weight.is_floating_point():
            weight.add_(1)  # every page is there, and is this process's own
print(json.dumps({"peak": peak, "loaded": loaded, "touched": memory("VmHWM") - before}))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 200 MB in float32."""
    folder = tmp_path_factory.mktemp("base")
    model = network.build(Architecture(layers=6, hidden=768, heads=12), Words(12000), 0)
    model.save_pretrained(folder)
    return folder


def found(what: str, folder: Path) -> dict[str, int]:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux, whose /proc tells the peak")
    done = subprocess.run([sys.executable, "-c", ASK, what, str(folder)], capture_output=True, text=True, check=True)
    numbers: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return numbers


@pytest.mark.slow
def test_a_float32_base_lies_in_its_files_pages_once(base: Path) -> None:
    size = 4 * Shape.of(Architecture(layers=6, hidden=768, heads=12), 12000).parameters
    numbers = found("load", base)
    assert lower_bytes(base) == 0
    assert numbers["loaded"] < 0.3 * size  # not read before it is looked at
    assert 0.95 * size < numbers["touched"] < 1.3 * size


@pytest.mark.slow
def test_a_bf16_base_is_there_beside_its_file_only_while_it_is_read(base: Path, tmp_path: Path) -> None:
    import torch

    low = {name: weight.to(torch.bfloat16) for name, weight in load_file(base / "model.safetensors").items()}
    save_file(low, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((base / "config.json").read_text())
    size = 4 * Shape.of(Architecture(layers=6, hidden=768, heads=12), 12000).parameters
    assert lower_bytes(tmp_path) == pytest.approx(size / 2, rel=0.01)
    numbers = found("load", tmp_path)
    assert numbers["peak"] < 1.7 * size  # the float32 weights, and the file's pages
    assert numbers["loaded"] < 1.2 * size


@pytest.mark.slow
def test_a_base_in_4_bits_gives_its_files_pages_back(base: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs the extra [qlora]")
    shape = Shape.of(Architecture(layers=6, hidden=768, heads=12), 12000)
    numbers = found("load_4bit", base)
    assert numbers["peak"] < 1.7 * 4 * shape.parameters
    assert numbers["loaded"] < 4 * (shape.parameters - shape.in_blocks) + 4 * shape.in_blocks / 2
