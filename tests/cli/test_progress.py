"""What a run shows while it goes."""

from __future__ import annotations

import contextlib
import io

import pytest

from slmops.cli.progress import Terminal


def test_lines_are_shown_while_a_step_catches_what_a_library_prints(capsys: pytest.CaptureFixture[str]) -> None:
    with Terminal(1) as terminal, contextlib.redirect_stderr(io.StringIO()) as caught:
        terminal.line("warning: from another thread")
    assert capsys.readouterr().err == "warning: from another thread\n"
    assert caught.getvalue() == ""
