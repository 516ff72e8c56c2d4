"""Several answers at once: each runtime answers in company as it does alone, and what it cannot do is refused before it runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from slmops.cli.main import main
from slmops.core.engine import Generation, Sampling
from slmops.core.runtimes import Named
from slmops.engines import AT_ONCE, open_engine, refuse_at_once
from slmops.engines.minimal import write_minimal
from slmops.errors import ModelError
from tests.train import bases
from tests.train.conftest import data as data
from tests.train.conftest import tokenizer as tokenizer

NEW = 24
NEAR = 1e-4
"""A token may differ where its logit is that close to the best: a runtime sums in another order when there are more rows."""


def convert(runtime: str, source: Path, data: Path, out: Path) -> Path:
    """A model in float32 for a runtime."""
    from slmops.convert import gguf, mlx, onnx_genai, openvino
    from slmops.core.method import Context

    if runtime == "torch":
        return source
    method: Any = {"onnx_genai": onnx_genai, "llama_cpp": gguf, "mlx": mlx, "openvino": openvino}[runtime]
    params = method.Params(precision="fp32", fidelity_prompts=1)
    method.run(params, {"model": source, "data": data}, out, Context(0, out, out))
    return out


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in AT_ONCE if name != "torch"]


@pytest.fixture(scope="module", params=["torch", *SLOW])
def engine(
    request: pytest.FixtureRequest, tokenizer: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    base = bases.save("gemma3", tokenizer, tmp_path_factory.mktemp("base"))  # some of its layers see 16 tokens back
    engine = open_engine(convert(request.param, base, data, tmp_path_factory.mktemp(request.param)))
    yield engine
    engine.close()


def same(engine: Any, prompt: list[int], alone: Generation, together: Generation) -> bool:
    """Whether answers have the same tokens, up to the first near tie, after which they may go different ways."""
    for place, (one, other) in enumerate(zip(alone.tokens, together.tokens, strict=True)):
        if one != other:
            row = engine.logits([*prompt, *alone.tokens[:place]])[-1]
            return bool(row[one] - row[other] < NEAR)
    return alone.text == together.text


@pytest.mark.parametrize("length", [1, 9, 70])
@pytest.mark.parametrize("count", [2, 3, 8])
def test_answers_in_company_are_those_alone(engine: Any, count: int, length: int) -> None:
    prompts = np.random.default_rng(count).integers(5, 260, (count, length)).tolist()
    alone = [engine.generate([p], Sampling(NEW, ignore_end=True))[0] for p in prompts]
    engine.at_once(prompts[::-1], 3)  # leaves nothing behind
    together = engine.at_once(prompts, NEW)
    assert all(same(engine, *each) for each in zip(prompts, alone, together, strict=True))
    assert len({a.tokens for a in alone}) > 1, "equal answers would prove nothing"
    assert {(a.first_token_s, a.total_s) for a in together} == {(together[0].first_token_s, together[0].total_s)}
    assert 0 < together[0].first_token_s < together[0].total_s
    after = [engine.generate([p], Sampling(NEW, ignore_end=True))[0].tokens for p in prompts]
    assert after == [a.tokens for a in alone], "answers alone must not change by what was answered at once"


def test_they_go_on_after_an_end_token(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[7, 8, 9], [9, 8, 7]]
    monkeypatch.setattr(engine, "end_ids", frozenset(range(300)))  # any token would end an answer
    assert [len(a.tokens) for a in engine.at_once(prompts, 20)] == [20, 20]
    assert [len(a.tokens) for a in engine.at_once(prompts, 1)] == [1, 1]


def test_what_cannot_be_answered_at_once_is_refused(engine: Any) -> None:
    context = engine.context_length
    engine.at_once([[5] * (context - 4)] * 2, 4)
    for prompts, new, message in (
        ([[5] * (context - 4)] * 2, 5, f"its answer of 5 tokens have {context + 1} tokens, .* holds {context}"),
        ([[5], [5] * context], 1, f"prompt 1 has {context} tokens"),
        ([[5, 6], [5, 6, 7]], 1, "prompt 1 has 3 tokens and prompt 0 has 2"),
        ([[], []], 1, "prompt 0 has 0 tokens"),
        ([], 1, "nothing to answer"),
        ([[5]], 0, "nothing to answer"),
    ):
        with pytest.raises(ModelError, match=message) as caught:
            engine.at_once(prompts, new)
        assert caught.value.hint
    most = AT_ONCE[engine.name]
    if most:
        assert len(engine.at_once([[5]] * most, 2)) == most
        with pytest.raises(ModelError, match=f"at most {most} prompts at once, not {most + 1}"):
            engine.at_once([[5]] * (most + 1), 2)


@pytest.mark.slow
def test_each_sequence_of_llama_cpp_has_a_quantised_cache(tmp_path: Path, tokenizer: Path, data: Path) -> None:
    base = bases.save("llama", tokenizer, tmp_path / "base", hidden=128)
    (tmp_path / "gguf").mkdir()
    engine: Any = open_engine(convert("llama_cpp", base, data, tmp_path / "gguf"), kv_cache="q8_0")
    prompts = [[10, 11, 12, 13], [20, 21, 22, 23], [30, 31, 32, 33]]
    alone = [engine.generate([p], Sampling(8, ignore_end=True))[0].tokens for p in prompts]
    assert [a.tokens for a in engine.at_once(prompts, 8)] == alone
    engine.close()


def test_a_runtime_that_answers_one_by_one_is_refused_by_name() -> None:
    for runtime in get_args(Named):
        refuse_at_once(Path("folder"), runtime, 1)
        if runtime in AT_ONCE:
            refuse_at_once(Path("folder"), runtime, 8)
        else:
            with pytest.raises(ModelError, match=f"runs {runtime} with one answer at a time"):
                refuse_at_once(Path("folder"), runtime, 8)
    with pytest.raises(ModelError, match="runs other with one answer at a time") as caught:
        refuse_at_once(Path("folder"), "other", 2)
    assert "llama_cpp" in caught.value.hint


def test_bench_refuses_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    from slmops.evaluate import bench

    monkeypatch.setattr(bench, "fresh", lambda *_: pytest.fail("a process was started"))
    write_minimal(tmp_path, "onnx_genai")
    assert main(["bench", str(tmp_path), "--batch", "1", "33"]) == 1
    assert "onnx_genai takes at most 32 answers at once, not 33" in capsys.readouterr().err
    monkeypatch.setattr("slmops.engines.AT_ONCE", {"torch": None})
    assert main(["bench", str(tmp_path), "--batch", "2"]) == 1
    said = capsys.readouterr().err
    assert "runs onnx_genai with one answer at a time" in said and "hint: " in said
