"""A template that a client wrote, run where it can do no harm: `python -m slmops.serve.jinja_child`, in a process of its own.

Jinja's sandbox keeps a template from Python, but not from loops without end or texts without bounds. Here the system ends it after
`SECONDS` of computing and refuses it more memory than `BYTES`. One line of JSON comes in, `{"template", "messages", "marks"}`, one
goes out, `{"text"}` or `{"wrong"}`. Whoever starts it has `slmops.serve.prompts` do so.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from pathlib import Path

SECONDS = 1
BYTES = 1 << 30
LONGEST = 1 << 20
TOO_MUCH = "the template needs more memory than it may have"


def bound() -> None:
    """Limit what this process may use, where the system can."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        until = math.ceil(time.process_time()) + SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (until, until))
        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))


def main() -> None:
    """Render what standard input says."""
    from slmops.engines.plain_tokenizer import compile_template, render
    from slmops.errors import SlmopsError

    job = json.loads(sys.stdin.readline())
    bound()
    try:
        text = render(compile_template(job["template"], Path("request")), job["messages"], job["marks"])
        said = (
            {"text": text} if len(text) <= LONGEST else {"wrong": f"the template writes more than {LONGEST} characters"}
        )
    except SlmopsError as error:
        greedy = isinstance(error.__cause__, (MemoryError, RecursionError, OverflowError))
        said = {"wrong": TOO_MUCH if greedy else error.message}
    except (MemoryError, RecursionError, OverflowError):
        said = {"wrong": TOO_MUCH}
    sys.stdout.write(json.dumps(said) + "\n")


if __name__ == "__main__":
    main()
