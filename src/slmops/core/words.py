"""Words and numbers that options of the command line are written with. They are here and not beside the code that they belong to,
as `slmops --help` reads them and must start fast: this module imports no pydantic, as nearly all others of `core` do."""

from __future__ import annotations

from typing import Literal

Expect = Literal["exact", "rounded", "learned"]
"""What a hop may change; `core.fidelity` says what each means."""
EXACT = 0.99
"""Share of equal next tokens that an exact hop must reach by default."""
ROUNDED = 0.85
"""Share of the probability of its choices that a rounded hop must keep by default (`Meeting.kept`). Int4 of models with random
weights, whose next tokens are all about as likely, kept 0.89 to 0.95; with one matrix transposed 0.11 to 0.78."""

Prefer = Literal["smallest", "fastest", "best"]
"""What `slmops fit` wants of a model within its budgets."""
