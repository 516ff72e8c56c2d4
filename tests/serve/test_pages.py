"""Where a model's process has its weights and its keys and values."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from slmops.engines.minimal import write_minimal
from slmops.serve.pages import environment, zeros
from tests.serve.live import live


def test_the_users_own_tunables_stay() -> None:
    assert environment({"A": "b"}) == {"A": "b", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    own = "glibc.malloc.arena_max=2"
    assert environment({"GLIBC_TUNABLES": own})["GLIBC_TUNABLES"] == f"{own}:glibc.malloc.hugetlb=1"
    off = {"GLIBC_TUNABLES": f"glibc.malloc.hugetlb=0:{own}"}
    assert environment(off) == off


def test_zeros_are_zeros_that_can_be_written() -> None:
    found = zeros((3, 5, 7), "float16")
    assert found.shape == (3, 5, 7) and found.dtype == np.float16 and not found.any()
    found[1, 2] = 4
    assert found.sum() == 28 and zeros((0, 4), "float32").shape == (0, 4)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_is_not_touched_is_not_resident() -> None:
    script = (
        "from slmops.serve.pages import zeros\n"
        "def resident(): return int(open('/proc/self/statm').read().split()[1]) * 4096\n"
        "import numpy; before, found = resident(), zeros((64, 1 << 20), 'float32')\n"
        "found[:, :100] = 1\n"
        "print(resident() - before)"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert int(said) < 4 << 20  # of 256 MiB; in large pages it would be 128 MiB


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_models_process_has_large_pages(tmp_path: Path) -> None:
    write_minimal(tmp_path, "onnx_genai")
    with live(tmp_path) as server:
        assert b"glibc.malloc.hugetlb=1" in Path(f"/proc/{server.model.pid}/environ").read_bytes()
