"""How much processor time do the quick commands take? Each runs in fresh processes, offline; bounds are those that slmops promises.

.venv/bin/python benchmarks/commands.py --rounds 9
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys

CASES: dict[str, tuple[list[str], float | None]] = {
    "slmops --help": (["--help"], 0.15),
    "slmops catalog --json": (["catalog", "--json"], 0.3),
    "slmops catalog --fits this": (["catalog", "--fits", "this"], None),
    "slmops doctor": (["doctor"], None),
}


def seconds(words: list[str]) -> float:
    """Processor time of one run."""
    before = os.times()
    subprocess.run([sys.executable, "-m", "slmops.cli.main", *words], capture_output=True, check=True)
    after = os.times()
    return after.children_user - before.children_user + after.children_system - before.children_system


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, metavar="N")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = {}
    for name, (words, bound) in CASES.items():
        seconds(words)
        taken = [seconds(words) for _ in range(options.rounds)]
        found[name] = {"median_s": statistics.median(taken), "max_s": max(taken), "bound_s": bound}
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        print(f"{'command':28}  median     max   bound")
        for name, row in found.items():
            bound = f"{1000 * row['bound_s']:.0f} ms" if row["bound_s"] else "–"
            print(f"{name:28}  {1000 * row['median_s']:3.0f} ms  {1000 * row['max_s']:3.0f} ms  {bound:>6}")
    return int(any(row["bound_s"] and row["median_s"] > row["bound_s"] for row in found.values()))


if __name__ == "__main__":
    raise SystemExit(main())
