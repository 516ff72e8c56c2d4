from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slmops.core.engine import Engine, Sampling
from slmops.engines import detect, open_engine
from slmops.engines.memory_engine import MemoryEngine
from slmops.engines.minimal import write_minimal
from slmops.engines.plain_tokenizer import PlainTokenizer
from slmops.errors import ModelError

MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("llama_cpp", "mlx", "openvino", "litert", "executorch")]


@pytest.fixture(scope="module", params=["torch", "onnx_genai", *SLOW])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp(request.param)
    write_minimal(folder, request.param)
    assert detect(folder) == request.param
    engine = open_engine(folder, threads=1)
    yield engine
    engine.close()


def texts(engine: Engine, *words: str) -> list[list[int]]:
    return [engine.encode([{"role": "user", "content": w}]) for w in words]


def test_a_folder_with_two_models_is_told_so(tmp_path: Path) -> None:
    for name in ("a-Q4_0.gguf", "a-Q8_0.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"several models: a-Q4_0.gguf, a-Q8_0.gguf"):
        detect(tmp_path)


def test_prompt_is_rendered_by_the_template(engine: Engine) -> None:
    ids = engine.encode(MESSAGES)
    assert ids[0] == 1 and ids[-1] == 3
    assert engine.decode(ids) == "be briefhello"


def test_greedy_answers_do_not_depend_on_their_company(engine: Engine) -> None:
    prompts = texts(engine, "a", "bb", "cc", "dddddd", "a")
    together = engine.generate(prompts, Sampling(max_new_tokens=6))
    alone = [engine.generate([p], Sampling(max_new_tokens=6))[0] for p in prompts]
    assert [g.tokens for g in together] == [g.tokens for g in alone]
    assert [g.text for g in together] == [g.text for g in alone]


def test_logits_lead_to_the_greedy_answer(engine: Engine) -> None:
    prompt = texts(engine, "hello")[0]
    answer = engine.generate([prompt], Sampling(max_new_tokens=5))[0]
    rows = engine.logits([*prompt, *answer.tokens])
    assert rows.dtype == np.float32 and rows.shape[0] == len(prompt) + len(answer.tokens)
    picked = rows.argmax(-1)[len(prompt) - 1 : -1]
    assert tuple(picked.tolist()) == answer.tokens


def test_times_and_counts(engine: Engine) -> None:
    done: list[int] = []
    answers = engine.generate(texts(engine, "a", "bb", "ccc"), Sampling(max_new_tokens=4), done.append)
    assert sum(done) == 3
    for answer in answers:
        assert 0 < answer.first_token_s <= answer.total_s
        assert 1 <= len(answer.tokens) <= 4
        assert answer.finished or len(answer.tokens) == 4


def test_a_prompt_without_room_is_named(engine: Engine) -> None:
    with pytest.raises(ModelError, match="prompt 1 has 64 tokens") as caught:
        engine.generate([[5, 6], [5] * engine.context_length], Sampling())
    assert caught.value.hint


def test_an_answer_stops_at_the_context(engine: Engine) -> None:
    answer = engine.generate([[5] * (engine.context_length - 2)], Sampling(max_new_tokens=50))[0]
    assert len(answer.tokens) <= 2


def test_sampling_is_seeded(engine: Engine) -> None:
    prompts = texts(engine, *["same"] * 6)
    one = [g.tokens for g in engine.generate(prompts, Sampling(8, temperature=1.0, seed=1))]
    again = [g.tokens for g in engine.generate(prompts, Sampling(8, temperature=1.0, seed=1))]
    other = [g.tokens for g in engine.generate(prompts, Sampling(8, temperature=1.0, seed=2))]
    assert one == again
    assert one != other
    assert len(set(one)) > 1, "equal prompts must get different samples"


def test_greedy_after_sampling_is_the_same(engine: Engine) -> None:
    prompts = texts(engine, "hello")
    before = engine.generate(prompts, Sampling(6))[0].tokens
    engine.generate(prompts, Sampling(6, temperature=1.5, seed=3))
    assert engine.generate(prompts, Sampling(6))[0].tokens == before


def test_torch_samples_do_not_depend_on_the_batch(minimal_torch: Path) -> None:
    engine = open_engine(minimal_torch)
    prompts = texts(engine, "aaa", "bbb", "ccc", "dd")
    sampling = Sampling(8, temperature=1.0, top_p=0.95, top_k=40, seed=5)
    together = [g.tokens for g in engine.generate(prompts, sampling)]
    assert together == [engine.generate([p], sampling)[0].tokens for p in prompts]


def test_end_token_finishes_and_is_left_out_of_the_text(minimal_torch: Path, tmp_path: Path) -> None:
    plain = open_engine(minimal_torch)
    prompt = texts(plain, "hello")[0]
    tokens = plain.generate([prompt], Sampling(8))[0].tokens
    folder = tmp_path / "model"
    shutil.copytree(minimal_torch, folder)
    config = json.loads((folder / "generation_config.json").read_text())
    config["eos_token_id"] = tokens[2]
    (folder / "generation_config.json").write_text(json.dumps(config))
    answer = open_engine(folder).generate([prompt, texts(plain, "world")[0]], Sampling(8))[0]
    stop = tokens.index(tokens[2])
    assert answer.finished and answer.tokens == tokens[: stop + 1]


def test_picking_follows_the_distribution() -> None:
    torch = pytest.importorskip("torch")
    from slmops.engines.torch_engine import pick

    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(4000, 1)
    uniform = torch.arange(4000, dtype=torch.float64) / 4000
    counts = torch.bincount(pick(logits, Sampling(temperature=1.0), uniform), minlength=4) / 4000
    assert torch.allclose(counts, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.002)
    counts = torch.bincount(pick(logits, Sampling(temperature=1.0, top_k=2), uniform), minlength=4) / 4000
    assert torch.allclose(counts, torch.tensor([0.625, 0.375, 0.0, 0.0]), atol=0.002)
    counts = torch.bincount(pick(logits, Sampling(temperature=1.0, top_p=0.6), uniform), minlength=4) / 4000
    assert torch.allclose(counts, torch.tensor([0.625, 0.375, 0.0, 0.0]), atol=0.002)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=40))
def test_all_runtimes_read_the_same_ids(text: str, readers: tuple[Engine | PlainTokenizer, ...]) -> None:
    message = [{"role": "user", "content": text.encode("utf-8", "ignore").decode()}]
    first, *others = readers
    ids = first.encode(message)
    for other in others:
        assert other.encode(message) == ids
        assert other.decode(ids[1:-2]) == first.decode(ids[1:-2])


@pytest.fixture(scope="module")
def readers(minimal_torch: Path, minimal_onnx: Path) -> tuple[Engine | PlainTokenizer, ...]:
    return open_engine(minimal_torch), open_engine(minimal_onnx), PlainTokenizer(minimal_torch, "mlx")


def test_special_tokens_alone_decode_to_nothing(engine: Engine) -> None:
    assert engine.decode([4, 4]) == "" and engine.decode([]) == ""


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "is not a model"),
        ({"config.json": "{}"}, "no .safetensors"),
        ({"genai_config.json": "not json"}, "is not JSON"),
        ({"genai_config.json": "[1]"}, "does not hold a JSON object"),
        ({"genai_config.json": "{}"}, "cannot be loaded"),
        ({"config.json": "{}", "model.safetensors": "x"}, "cannot be loaded"),
    ],
)
def test_folders_that_are_no_model(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ModelError, match=message) as caught:
        open_engine(tmp_path)
    assert caught.value.hint


def test_wrong_runtime_and_missing_folder(minimal_onnx: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="for onnx_genai, not for torch"):
        open_engine(minimal_onnx, kind="torch")
    with pytest.raises(ModelError, match="no model folder"):
        open_engine(tmp_path / "nothing")


def test_memory_engine_answers_with_a_function() -> None:
    engine = MemoryEngine(lambda prompt, _: prompt.split("user: ")[1].split("\n")[0].upper(), context_length=40)
    prompt = engine.encode([{"role": "user", "content": "héllo"}])
    answer = engine.generate([prompt], Sampling())[0]
    assert answer.text == "HÉLLO" and answer.finished
    assert not engine.generate([prompt], Sampling(max_new_tokens=3))[0].finished
    rows = engine.logits([*prompt, *answer.tokens], len(prompt) - 1)
    assert tuple(rows.argmax(-1)[:-1].tolist()) == answer.tokens
    with pytest.raises(ModelError, match="prompt 0"):
        engine.generate([[1] * 40], Sampling())
