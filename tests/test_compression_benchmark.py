"""`benchmarks/compression.py`: its arithmetic, and its own ways on a small model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmarks import compression

ROOT = Path(__file__).parents[1]


def way(same: str, work: list[float], right: list[int], wide: bool = False) -> dict[str, Any]:
    runs = [{"work_s": w, "command_s": w + 1, "cpu_s": w, "peak_bytes": 1e8} for w in work]
    middle = {"work_s": work[1], "command_s": work[1] + 1, "cpu_s": work[1], "peak_bytes": 1e8}
    told = {"bytes": 2e6, "mean_kl": 0.5, "token_agreement": 0.9, "right": right}
    return {"same": same, "wide": wide, "runs": runs} | told | middle


def test_rows_of_the_same_bits_are_compared_and_no_others() -> None:
    ways = {
        "slmops, each weight alone": way("int4", [1, 2, 4], [1, 1, 1, 0]),
        "slmops, each weight alone, embedding in 8 bits": way("int4", [2, 2, 2], [1, 0, 0, 0], wide=True),
        "Olive, Rtn": way("int4", [4, 4, 4], [1, 0, 0, 0]),
        "Olive, else": way("int4, fp32 embedding", [9, 9, 9], [0, 0, 0, 0]),
    }
    about = {"cpu": "x", "threads": 1, "load_before": 0.5}
    text = compression.table({"machine": about, "rounds": 3, "models": {"m": ways}})
    ours, wide, same, other = text.splitlines()[4:8]
    assert not any("×" in line for line in (ours, wide, other))
    assert (
        "4.0 (×0.50, 0.25–1.00)" in same
        and "+50.0 (" in same.split(" | ")[-2]
        and "+0.0 (" in same.split(" | ")[-1]
        and "75.0 % (" in ours
    )


def test_an_interrupted_or_failed_worker_is_said(tmp_path: Path) -> None:
    script = tmp_path / "s.py"
    script.write_text("import sys\nprint('what went wrong')\nsys.exit(3)")
    with pytest.raises(SystemExit, match=r"(?s)ended with 3:\nwhat went wrong"):
        compression.start([sys.executable, str(script)], {}, tmp_path / "log", os.environ)


@pytest.mark.slow
def test_one_of_our_own_ways_runs(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "compression.py"),
        "--quick",
        "--no-peers",
        "--threads",
        "1",
        "--only",
        "gptq",
        "--skip",
        "embedding",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "SLMOPS_BENCH": str(tmp_path)}
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "found.json")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (ways,) = json.loads((tmp_path / "found.json").read_text())["models"].values()
    assert list(ways) == ["slmops, GPTQ"]
    for found in ways.values():
        assert found["token_agreement"] > 0.5 and found["template_equal"] == 1.0
        assert found["peak_bytes"] > 1e8 and 0 < found["work_s"] < found["command_s"]
    whole = 4 * 5_000_000
    assert all(found["bytes"] < whole / 4 for found in ways.values())
