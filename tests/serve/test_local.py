"""A model in this process says what the server's engine says, piece by piece."""

from __future__ import annotations

import pytest

from slmops.core.engine import Sampling
from slmops.engines import open_engine
from slmops.serve.local import Local, talker
from slmops.serve.model import Ask
from slmops.serve.sampling import Picking
from slmops.serve.scheduler import RequestError
from tests.serve.conftest import Converted

HELLO = [{"role": "user", "content": "hello"}]


@pytest.mark.slow
def test_a_model_in_this_process_answers_as_the_engine_alone(converted: Converted) -> None:
    folder = converted("qwen3", "fp32")
    engine = open_engine(folder, threads=1)
    with Local(folder) as model:
        prompt = model.encode(HELLO)
        alone = engine.generate([prompt], Sampling(max_new_tokens=20))[0]
        pieces = list(model.chat(HELLO, most=20))
        assert tuple(piece.token for piece in pieces) == alone.tokens and pieces[-1].finish
        assert "".join(piece.text for piece in pieces) == model.tokenizer.decode(alone.tokens)
        next(model.answer(Ask(prompt, 20)))  # left early: the next one begins anew
        assert next(model.answer(Ask(prompt, 20))).token == alone.tokens[0]
        drawn = [list(model.answer(Ask(prompt, 20, Picking(temperature=1.0, seed=5)))) for _ in range(2)]
        assert [piece.token for piece in drawn[0]] == [piece.token for piece in drawn[1]]
        whole = "".join(piece.text for piece in drawn[0])
        stop = whole[len(whole) // 2 :][:2]
        cut = list(model.answer(Ask(prompt, 20, Picking(temperature=1.0, seed=5), [stop])))
        assert "".join(piece.text for piece in cut) == whole[: whole.index(stop)] and cut[-1].finish == "stop"
        with pytest.raises(RequestError, match="the context holds"):
            next(model.answer(Ask([5] * model.context_length)))
        assert sum(piece.tokens for piece in model.say(prompt, 3, 0.0)) == 3
    with Local(folder) as again:
        assert [piece.token for piece in again.chat(HELLO, most=20)] == list(alone.tokens)
    spoken = talker(folder, 1)
    assert isinstance(spoken, Local)
    spoken.close()
    engine.close()
