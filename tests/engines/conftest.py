"""Minimal models for each runtime, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from slmops.engines.minimal import write_minimal


@pytest.fixture(scope="session")
def minimal_torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("minimal-torch")
    write_minimal(folder, "torch")
    return folder


@pytest.fixture(scope="session")
def minimal_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("minimal-onnx")
    write_minimal(folder, "onnx_genai")
    return folder
