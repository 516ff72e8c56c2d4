"""The client against a stand-in that fails on purpose: clear errors, nothing lost, nothing paid twice."""

from __future__ import annotations

import asyncio
import json
import time
from email.utils import formatdate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmops.core.engine import Sampling
from slmops.engines.answer_store import AnswerStore, StoredAnswer
from slmops.engines.endpoint import Clock, EndpointTeacher
from slmops.engines.endpoint_address import address, api_key, check_endpoint
from slmops.engines.endpoint_pace import Backoff, Pace, duration, exhausted_for, retry_after
from slmops.engines.endpoint_reply import Failure, Success, read_reply
from slmops.engines.stand_in import Fault, StandIn
from slmops.errors import BudgetError, EndpointError, IntegrityError, ResourceError, UsageError

ASK = Sampling(max_new_tokens=20)
KEY = "sk-very-secret-123456"


def prompts(count):
    return [[{"role": "user", "content": f"message {n}"}] for n in range(count)]


def echo(messages):
    return "about " + messages[-1]["content"]


class FakeTime:
    """A clock that sleeping moves forward at once; remembers how long it was asked to sleep."""

    def __init__(self):
        self.now, self.slept = 1000.0, []

    async def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)

    def clock(self):
        return Clock(lambda: self.now, self.sleep)


def client(endpoint, ctx, desk, *, fake=None, environ=None, backoff=None):
    return EndpointTeacher(
        endpoint,
        ctx,
        transport=desk.transport(),
        environ=environ or {},
        backoff=backoff or Backoff(0.001, 0.01),
        clock=fake.clock() if fake else None,
    )


def texts(answers):
    return [[a.text if a else None for a in row] for row in answers]


def test_answers_come_in_order_and_are_counted(ctx, endpoint):
    desk = StandIn(echo, delay_s=0.001)
    teacher = client(endpoint(price={"input_per_million": 1.0, "output_per_million": 2.0}), ctx, desk)
    answers = teacher.answers(prompts(20), ASK, samples=2)
    assert texts(answers) == [[f"about message {n}"] * 2 for n in range(20)]
    facts = teacher.facts()
    assert (facts["requests"], facts["answered"]) == (40, 40)
    assert facts["cost"] == pytest.approx(40 * (2 * 1.0 + 3 * 2.0) / 1e6)
    assert desk.requests[0].body["max_tokens"] == 20 and desk.requests[0].body["temperature"] == 0.0


def test_a_second_client_pays_nothing(ctx, endpoint):
    desk = StandIn(echo)
    client(endpoint(), ctx, desk).answers(prompts(5), ASK)
    again = client(endpoint(), ctx, desk)
    assert texts(again.answers(prompts(6), ASK))[5] == ["about message 5"]
    assert len(desk.requests) == 6 and again.facts()["cached"] == 5


def test_what_can_change_the_answer_asks_anew(ctx, endpoint):
    desk = StandIn(echo)
    teacher = client(endpoint(), ctx, desk)
    for sampling in (ASK, Sampling(21), Sampling(20, 0.5), Sampling(20, top_p=0.5)):
        teacher.answers(prompts(1), sampling)
    teacher.answers(prompts(1), ASK, first=1)
    client(endpoint(model="other"), ctx, desk).answers(prompts(1), ASK)
    assert len(desk.requests) == 6
    client(endpoint(price={"input_per_million": 9.0}, concurrency=1), ctx, desk).answers(prompts(1), ASK)
    assert len(desk.requests) == 6


def test_equal_prompts_are_asked_once(ctx, endpoint):
    desk = StandIn(echo)
    assert len(client(endpoint(), ctx, desk).answers(prompts(1) * 9, ASK)) == 9
    assert len(desk.requests) == 1


@pytest.mark.parametrize(
    "fault",
    [
        Fault("status", status=429),
        Fault("status", status=500),
        Fault("status", status=503, body="<h1>down</h1>"),
        Fault("garbage"),
        Fault("html"),
        Fault("no_choices"),
        Fault("error_object"),
        Fault("empty"),
        Fault("blank"),
        Fault("cut"),
        Fault("stream"),
        Fault("refused"),
    ],
    ids=lambda fault: f"{fault.kind}{fault.status if fault.kind == 'status' else ''}",
)
def test_a_passing_fault_costs_one_more_try(ctx, endpoint, fault):
    desk = StandIn(echo, [None, fault, None, fault])
    teacher = client(endpoint(concurrency=2), ctx, desk)
    assert texts(teacher.answers(prompts(6), ASK)) == [[f"about message {n}"] for n in range(6)]
    assert len(desk.requests) == 8
    assert any("trying again" in line for line in ctx.progress.lines)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault("status", status=429), "HTTP 429 (rate limit)"),
        (Fault("status", status=500), "HTTP 500: stand-in says 500"),
        (Fault("status", status=503), "HTTP 503 (overloaded or starting)"),
        (Fault("garbage"), "a reply that is not JSON"),
        (Fault("html"), "an HTML page instead of an answer"),
        (Fault("no_choices"), "a reply without choices"),
        (Fault("error_object"), "an error in a reply of status 200: the model is having a moment"),
        (Fault("empty"), "an empty reply"),
        (Fault("blank"), "an empty answer"),
        (Fault("cut"), "the reply was cut off"),
        (Fault("stream"), "a stream although none was asked for"),
        (Fault("refused"), "no connection"),
        (Fault("never"), "no answer in time"),
        (Fault("trickle"), "no answer in time"),
    ],
    ids=lambda value: value.kind + str(value.status) if isinstance(value, Fault) else "",
)
def test_a_lasting_fault_is_a_clear_error_and_loses_nothing(ctx, endpoint, fault, words):
    desk = StandIn(echo, lambda request: None if request.number < 10 else fault)
    with pytest.raises(EndpointError) as caught:
        client(endpoint(timeout_s=0.1, concurrency=4, retries=1), ctx, desk).answers(prompts(40), ASK)
    assert words in str(caught.value) and "http://desk.test/v1" in str(caught.value)
    assert "Every answer that came is kept" in caught.value.hint
    healthy = StandIn(echo)
    assert texts(client(endpoint(), ctx, healthy).answers(prompts(40), ASK))[39] == ["about message 39"]
    assert len(healthy.requests) == 30


def test_an_endpoint_that_never_answered_is_not_waited_for_long(ctx, endpoint):
    desk = StandIn(echo, lambda _request: Fault("never"))
    with pytest.raises(EndpointError, match="no answer in time"):
        client(endpoint(timeout_s=0.1, concurrency=2, retries=6), ctx, desk).answers(prompts(400), ASK)
    assert len(desk.requests) <= 2 * 8 + 2


@pytest.mark.parametrize(
    ("status", "hint"),
    [(401, "api_key_env"), (403, "api_key_env"), (404, "/v1"), (400, "teacher.endpoint.model"), (302, "final URL")],
)
def test_what_cannot_get_better_fails_at_once(ctx, endpoint, status, hint):
    desk = StandIn(echo, lambda _request: Fault("status", status=status))
    with pytest.raises(EndpointError) as caught:
        client(endpoint(concurrency=3), ctx, desk).answers(prompts(50), ASK)
    assert len(desk.requests) <= 3
    assert f"HTTP {status}" in str(caught.value) and hint in caught.value.hint


def test_no_quota_left_is_not_retried(ctx, endpoint):
    body = '{"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}}'
    desk = StandIn(echo, lambda _request: Fault("status", status=429, body=body))
    with pytest.raises(EndpointError, match="no quota left"):
        client(endpoint(concurrency=1), ctx, desk).answers(prompts(5), ASK)
    assert len(desk.requests) == 1


def test_one_refused_prompt_is_not_the_end(ctx, endpoint):
    body = '{"error": {"message": "filtered", "code": "content_filter"}}'

    def faults(request):
        return Fault("status", status=400, body=body) if request.messages[0]["content"] == "message 3" else None

    desk = StandIn(echo, faults)
    answers = client(endpoint(), ctx, desk).answers(prompts(40), ASK)
    assert answers[3] == [None] and all(row[0] for n, row in enumerate(answers) if n != 3)
    assert len(desk.requests) == 40
    with pytest.raises(EndpointError, match="1 of 40 requests"):
        client(endpoint(min_success_ratio=1.0), ctx, desk).answers(prompts(40), ASK)
    assert len(desk.requests) == 41


def test_a_dead_endpoint_is_given_up_early(ctx, endpoint):
    desk = StandIn(echo, lambda _request: Fault("refused"))
    with pytest.raises(EndpointError, match="8 of 8 requests"):
        client(endpoint(concurrency=4), ctx, desk).answers(prompts(5000), ASK)
    assert len(desk.requests) <= 60


def test_a_missing_key_is_named_before_any_request(ctx, endpoint):
    desk = StandIn(echo, key=KEY)
    with pytest.raises(UsageError) as caught:
        client(endpoint(api_key_env="DESK_KEY"), ctx, desk).answers(prompts(1), ASK)
    assert "DESK_KEY" in str(caught.value) and "export DESK_KEY" in caught.value.hint
    assert not desk.requests


def test_answers_that_are_there_need_no_key(ctx, endpoint):
    desk = StandIn(echo, key=KEY)
    made = endpoint(api_key_env="DESK_KEY")
    client(made, ctx, desk, environ={"DESK_KEY": KEY}).answers(prompts(1), ASK)
    assert client(made, ctx, desk).answers(prompts(1), ASK)[0][0].text == "about message 0"


def test_no_key_is_ever_shown_or_stored(ctx, endpoint):
    desk = StandIn(echo, key="another")  # its 401 repeats the key that it was given
    made = endpoint(api_key_env="DESK_KEY", url="http://desk.test/v1?token=hidden")
    with pytest.raises(EndpointError) as caught:
        client(made, ctx, desk, environ={"DESK_KEY": KEY}).answers(prompts(1), ASK)
    client(made, ctx, StandIn(echo, [Fault("garbage")], key=KEY), environ={"DESK_KEY": KEY}).answers(prompts(1), ASK)
    said = str(caught.value) + caught.value.hint + "".join(ctx.progress.lines)
    stored = b"".join(path.read_bytes() for path in ctx.shared.rglob("*") if path.is_file())
    for secret in (KEY, "hidden"):
        assert secret not in said and secret.encode() not in stored


@pytest.mark.parametrize("value", ["", "  ", "sk-ключ", "two words"])
def test_keys_that_no_header_can_carry(endpoint, value):
    with pytest.raises(UsageError, match="DESK_KEY"):
        api_key(endpoint(api_key_env="DESK_KEY"), {"DESK_KEY": value})


def test_without_a_key_no_authorization_is_sent(ctx, endpoint):
    desk = StandIn(echo)
    client(endpoint(url="http://localhost:11434"), ctx, desk).answers(prompts(1), ASK)
    assert desk.requests[0].path == "/v1/chat/completions"
    assert "authorization" not in desk.requests[0].headers


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"url": "https://api.openai.com/v1"}, "https://api.openai.com/v1/chat/completions"),
        ({"url": "http://host:8000/v1/chat/completions/"}, "http://host:8000/v1/chat/completions"),
        (
            {"api": "azure", "url": "https://r.openai.azure.com", "api_version": "2025-01-01"},
            "https://r.openai.azure.com/openai/deployments/big/chat/completions?api-version=2025-01-01",
        ),
        (
            {"api": "azure", "url": "https://r.openai.azure.com/openai/"},
            "https://r.openai.azure.com/openai/deployments/big/chat/completions?api-version=2024-10-21",
        ),
        (
            {"api": "azure", "url": "https://r.openai.azure.com/openai/v1"},
            "https://r.openai.azure.com/openai/v1/chat/completions",
        ),
        (
            {"api": "azure", "url": "https://r.services.ai.azure.com/models", "api_version": "2024-05-01-preview"},
            "https://r.services.ai.azure.com/models/chat/completions?api-version=2024-05-01-preview",
        ),
    ],
)
def test_addresses(endpoint, values, expected):
    assert address(endpoint(**values)) == expected


def test_azure_uses_its_own_header(ctx, endpoint):
    desk = StandIn(echo, key=KEY)
    made = endpoint(api="azure", url="http://r.test", api_key_env="K")
    client(made, ctx, desk, environ={"K": KEY + "\n"}).answers(prompts(1), ASK)
    assert desk.requests[0].headers["api-key"] == KEY and "authorization" not in desk.requests[0].headers
    with pytest.raises(UsageError, match="Azure needs a key"):
        check_endpoint(endpoint(api="azure"))


@pytest.mark.parametrize(
    "url", ["desk.test/v1", "ftp://desk.test", "https://", "file:///etc", "https://user:pass@desk.test/v1"]
)
def test_urls_that_are_none(endpoint, url):
    with pytest.raises(UsageError, match=r"teacher\.endpoint\.url"):
        address(endpoint(url=url))


def test_models_that_want_another_name_for_the_limit(ctx, endpoint):
    body = '{"error": {"message": "Unsupported parameter: \'max_tokens\'. Use \'max_completion_tokens\' instead."}}'
    desk = StandIn(echo, lambda r: Fault("status", status=400, body=body) if "max_tokens" in r.body else None)
    answers = client(endpoint(retries=0, concurrency=3), ctx, desk).answers(prompts(9), ASK)
    assert all(row[0] for row in answers)
    assert len(desk.requests) <= 9 + 3


def test_cut_answers_say_so(ctx, endpoint):
    answers = client(endpoint(), ctx, StandIn(echo, finish_reason="length")).answers(prompts(1), ASK)
    assert answers[0][0].finished is False


def test_a_thinking_model_without_room_says_what_to_raise(ctx, endpoint):
    desk = StandIn(lambda _messages: "", finish_reason="length")
    with pytest.raises(EndpointError) as caught:
        client(endpoint(), ctx, desk).answers(prompts(1), ASK)
    assert "max_output_tokens" in caught.value.hint and len(desk.requests) == 1


# --- budget ---------------------------------------------------------------------------------------------------------


def test_the_budget_is_never_broken_and_nothing_is_lost(ctx, endpoint):
    price = {"input_per_million": 0.0, "output_per_million": 1e5}  # a token costs 0.1; an answer of 3 words 0.3
    desk = StandIn(echo, delay_s=0.001)
    ctx.budget = 5.0
    teacher = client(endpoint(price=price, concurrency=8), ctx, desk)
    with pytest.raises(BudgetError) as caught:
        teacher.answers(prompts(100), ASK)  # at worst 20 tokens each: 2.0
    spent = teacher.facts()["cost"]
    assert 3.0 < spent <= 5.0 and "answers are missing" in str(caught.value)
    ctx.budget = None
    before = len(desk.requests)
    assert all(row[0] for row in client(endpoint(price=price), ctx, desk).answers(prompts(100), ASK))
    assert before + (100 - before) == len(desk.requests)


def test_a_budget_below_one_request_sends_none(ctx, endpoint):
    desk = StandIn(echo)
    ctx.budget = 0.5
    with pytest.raises(BudgetError):
        client(endpoint(price={"output_per_million": 1e5}), ctx, desk).answers(prompts(3), ASK)
    assert not desk.requests


def test_tries_that_may_have_been_charged_count_against_the_budget(ctx, endpoint):
    desk = StandIn(echo, lambda _request: Fault("cut"))
    ctx.budget = 5.0
    teacher = client(endpoint(price={"output_per_million": 1e5}, concurrency=1, retries=9), ctx, desk)
    with pytest.raises(BudgetError):
        teacher.answers(prompts(1), ASK)
    assert len(desk.requests) == 2 and teacher.facts()["unsure"] == pytest.approx(4.0)


def test_a_budget_without_prices_is_refused_for_a_paid_endpoint(ctx, endpoint):
    ctx.budget = 1.0
    with pytest.raises(UsageError, match="prices"):
        client(endpoint(api_key_env="K"), ctx, StandIn(echo), environ={"K": KEY}).answers(prompts(1), ASK)
    client(endpoint(), ctx, StandIn(echo)).answers(prompts(1), ASK)


def test_tokens_that_are_not_counted_are_estimated(ctx, endpoint):
    teacher = client(endpoint(price={"output_per_million": 1.0}), ctx, StandIn(echo, usage=False))
    teacher.answers(prompts(1), ASK)
    facts = teacher.facts()
    assert facts["uncounted"] == 1 and facts["completion_tokens"] > 0


# --- pace -----------------------------------------------------------------------------------------------------------


def test_retry_after_is_honoured_by_all(ctx, endpoint):
    fake = FakeTime()
    desk = StandIn(echo, [Fault("status", status=429, headers={"Retry-After": "17"})])
    client(endpoint(concurrency=1), ctx, desk, fake=fake).answers(prompts(3), ASK)
    assert 17.0 <= sum(fake.slept) < 18.0


def test_retry_after_as_a_date(ctx, endpoint):
    fake, now = FakeTime(), time.time()
    headers = {"Retry-After": formatdate(now + 30, usegmt=True), "Date": formatdate(now, usegmt=True)}
    client(
        endpoint(concurrency=1), ctx, StandIn(echo, [Fault("status", status=503, headers=headers)]), fake=fake
    ).answers(prompts(1), ASK)
    assert 29.0 <= sum(fake.slept) < 32.0


def test_a_wait_of_a_day_is_an_error(ctx, endpoint):
    desk = StandIn(echo, [Fault("status", status=429, headers={"Retry-After": "86400"})])
    with pytest.raises(EndpointError, match="1440 minutes"):
        client(endpoint(concurrency=1), ctx, desk).answers(prompts(3), ASK)


def test_rate_limit_headers_hold_requests_back(ctx, endpoint):
    fake = FakeTime()
    headers = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1m2s"}
    client(endpoint(concurrency=1), ctx, StandIn(echo, headers=headers), fake=fake).answers(prompts(3), ASK)
    assert sum(fake.slept) == pytest.approx(124.0)


def test_concurrency_is_held_and_falls_when_crowded(ctx, endpoint):
    desk = StandIn(echo, delay_s=0.005)
    client(endpoint(concurrency=3), ctx, desk).answers(prompts(30), ASK)
    assert desk.most_at_once == 3

    async def halved():
        pace = Pace(8, lambda: 0.0, asyncio.sleep)
        burst = [await pace.enter() for _ in range(3)]
        for entered in burst:
            await pace.leave(entered, crowded=True)
        return pace.limit

    assert asyncio.run(halved()) == 4


def test_too_many_at_once_settles(ctx, endpoint):
    """An endpoint that takes two at a time: everything is answered in the end."""
    desk = StandIn(echo, delay_s=0.002)
    desk._faults = lambda _request: Fault("status", status=429) if desk._active > 2 else None
    made = endpoint(concurrency=16, retries=12)
    assert all(row[0] for row in client(made, ctx, desk, backoff=Backoff(0.002, 0.02)).answers(prompts(60), ASK))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1s", 1),
        ("350ms", 0.35),
        ("6m0s", 360),
        ("1h2m3.5s", 3723.5),
        ("12.5", 12.5),
        ("soon", None),
        ("", None),
        ("3x", None),
    ],
)
def test_durations(text, seconds):
    assert duration(text) == (None if seconds is None else pytest.approx(seconds))


def test_headers_that_say_how_long():
    assert retry_after({"retry-after-ms": "250"}, 0) == 0.25
    assert retry_after({"retry-after": "tomorrow"}, 0) is None
    assert retry_after({"retry-after": formatdate(1000, usegmt=True)}, 990.0) == 10.0
    assert retry_after({"retry-after": formatdate(1000, usegmt=True)}, 2000.0) == 0.0
    assert exhausted_for({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "2s"}) == 2.0
    assert exhausted_for({"x-ratelimit-remaining-tokens": "5", "x-ratelimit-reset-tokens": "2s"}) is None


@given(st.integers(0, 60), st.text(max_size=8))
def test_backoff_is_bounded_and_repeatable(tried, seed):
    backoff = Backoff(0.5, 30.0)
    delay = backoff.delay(tried, seed)
    assert 0 <= delay <= min(30.0, 0.5 * 2.0**tried) and delay == backoff.delay(tried, seed)


@given(
    st.sampled_from([200, 201, 301, 400, 404, 418, 429, 500]),
    st.sampled_from(["", "text/html", "application/json"]),
    st.binary(),
)
def test_no_reply_is_too_strange(status, kind, body):
    assert isinstance(read_reply(status, kind, body), Failure)


_JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=3), lambda x: st.lists(x, max_size=3))


@given(
    st.fixed_dictionaries({}, optional={"choices": _JSON, "error": _JSON, "usage": _JSON, "message": _JSON}),
    st.integers(100, 599),
)
def test_no_json_is_too_strange(value, status):
    assert isinstance(read_reply(status, "application/json", json.dumps(value).encode()), Failure)


def test_content_in_parts_is_joined():
    body = b'{"choices": [{"message": {"content": [{"type": "text", "text": "a"}, {"text": "b"}]}}]}'
    outcome = read_reply(200, "application/json", body)
    assert isinstance(outcome, Success) and outcome.answer.text == "ab" and outcome.usage is None


# --- the store ------------------------------------------------------------------------------------------------------


def test_the_first_answer_stays_and_any_text_is_kept(tmp_path):
    with AnswerStore(tmp_path) as store:
        store.put("k", StoredAnswer("one\ud800\x00", True, 3, 4))
        store.put("k", StoredAnswer("two", True))
        assert store.get(["k", "other"]) == {"k": StoredAnswer("one\ud800\x00", True, 3, 4)}
        assert len(store.get([f"k{n}" for n in range(2000)] + ["k"])) == 1


def test_a_damaged_store_is_an_error_and_is_not_overwritten(tmp_path):
    (tmp_path / "answers.sqlite").write_bytes(b"this is no database" * 100)
    with pytest.raises(IntegrityError, match="damaged"):
        AnswerStore(tmp_path).get(["k"])
    assert (tmp_path / "answers.sqlite").read_bytes().startswith(b"this is no")


def test_nothing_is_asked_while_answers_cannot_be_kept(ctx, endpoint):
    ctx.shared.mkdir(parents=True)
    (ctx.shared / "answers").write_text("a file where the folder should be")
    desk = StandIn(echo)
    with pytest.raises(ResourceError):
        client(endpoint(), ctx, desk).answers(prompts(3), ASK)
    assert not desk.requests


def test_a_store_that_fails_halfway_stops_the_spending(ctx, endpoint, monkeypatch):
    desk = StandIn(echo)
    put, kept = AnswerStore.put, []

    def full(self, key, answer):
        if len(kept) == 5:
            raise ResourceError("the disk is full")
        kept.append(key)
        put(self, key, answer)

    monkeypatch.setattr(AnswerStore, "put", full)
    with pytest.raises(ResourceError, match="full"):
        client(endpoint(concurrency=2), ctx, desk).answers(prompts(100), ASK)
    assert len(desk.requests) <= 5 + 2


# --- a real server --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cut", "never", "trickle", "garbage"])
def test_faults_over_a_real_socket(ctx, endpoint, kind):
    desk = StandIn(echo, [None, Fault(kind), None])
    with desk.serve() as url:
        teacher = EndpointTeacher(
            endpoint(url=url, timeout_s=0.5, concurrency=1), ctx, environ={}, backoff=Backoff(0.001, 0.01)
        )
        assert all(row[0] for row in teacher.answers(prompts(4), ASK))
    assert len(desk.requests) == 5


def test_nobody_listens(ctx, endpoint):
    desk = StandIn(echo)
    with desk.serve() as url:
        pass
    with pytest.raises(EndpointError, match="no connection") as caught:
        EndpointTeacher(endpoint(url=url), ctx, environ={}, backoff=Backoff(0.001, 0.01)).answers(prompts(3), ASK)
    assert "is the server running" in caught.value.hint


def test_inside_a_running_loop(ctx, endpoint):
    async def notebook():
        return client(endpoint(), ctx, StandIn(echo)).answers(prompts(2), ASK)

    assert len(asyncio.run(notebook())) == 2
