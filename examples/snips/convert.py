"""Turn SNIPS rows `{text, intent, slots}` into messages whose answer is a function call.

    python convert.py SOURCE TARGET      # SOURCE/{train,validate}.jsonl -> TARGET/{train,test}.jsonl

The intent is the function, the slots are its arguments in the order of the message. A slot that a message has more than
once becomes a list of its values in order; any other is a plain string. No row is dropped: messages of the test file
that also stand in the training file are taken out of training by slmops itself, which says how many.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

FILES = {"train": "train", "validate": "test"}


def convert(row: dict[str, Any]) -> dict[str, Any]:
    """One canonical row."""
    arguments: dict[str, str | list[str]] = {}
    for slot, value in row["slots"]:
        known = arguments.get(slot)
        if known is None:
            arguments[slot] = value
        else:
            arguments[slot] = [*known, value] if isinstance(known, list) else [known, value]
    call = {"name": row["intent"], "arguments": arguments}
    answer = json.dumps(call, ensure_ascii=False, separators=(",", ":"))
    return {"messages": [{"role": "user", "content": row["text"]}, {"role": "assistant", "content": answer}]}


def main(source: Path, target: Path) -> None:
    """Convert both files."""
    target.mkdir(parents=True, exist_ok=True)
    for name, split in FILES.items():
        with (source / f"{name}.jsonl").open(encoding="utf-8") as lines:
            rows = [convert(json.loads(line)) for line in lines if line.strip()]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (target / f"{split}.jsonl").write_text(text, encoding="utf-8")
        print(f"{target / split}.jsonl: {len(rows)} messages")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python convert.py SOURCE TARGET")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
