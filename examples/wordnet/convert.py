"""Turn WordNet's database files into messages that teach a small model English.

    python convert.py SOURCE TARGET      # SOURCE/data.{noun,verb,adj,adv} -> TARGET/wordnet.jsonl

Each set of synonyms gives up to three rows: the definition, answered by the words; a word, answered by the definition; an
example sentence, answered by the words. The layout of the files is that of wndb(5WN).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

FILES = ("data.noun", "data.verb", "data.adj", "data.adv")
EXAMPLE = re.compile(r'"([^"]{12,})"')


def rows(line: str) -> Iterator[tuple[str, str]]:
    """Questions and answers of one line of a data file."""
    fields, _, gloss = line.partition(" | ")
    parts = fields.split(" ")
    names = parts[4 : 4 + 2 * int(parts[3], 16) : 2]
    words = [re.sub(r"\((a|p|ip)\)$", "", name).replace("_", " ") for name in names]
    definition = gloss.partition('; "')[0].strip()
    answer = ", ".join(words)
    yield f"which words mean: {definition}", answer
    yield f"what does {words[0]} mean", definition
    example = EXAMPLE.search(gloss)
    if example:
        yield example[1], answer


def main(source: Path, target: Path) -> None:
    """Convert all four files."""
    target.mkdir(parents=True, exist_ok=True)
    count = 0
    with (target / "wordnet.jsonl").open("w", encoding="utf-8") as out:
        for name in FILES:
            for line in (source / name).read_text(encoding="utf-8").splitlines():
                if line.startswith("  "):  # the licence
                    continue
                for question, answer in rows(line):
                    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                    out.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")
                    count += 1
    print(f"{target / 'wordnet.jsonl'}: {count} messages")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python convert.py SOURCE TARGET")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
