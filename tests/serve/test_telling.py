"""What the server tells of itself: metrics, logs and traces, and that no prompt is in them."""

from __future__ import annotations

import http.server
import io
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families

from slmops.engines.minimal import write_minimal
from slmops.serve.gate import Rules
from slmops.serve.limits import Accounts, Limits
from slmops.serve.log import Log, LogFile
from slmops.serve.record import Counts
from slmops.serve.traces import Traces
from tests.serve.live import ENDLESS, Live, live, write_long

pytestmark = pytest.mark.slow
SECRET = "zyxwvu"
PROMPT = [{"role": "user", "content": SECRET}]
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    write_minimal(folder, "onnx_genai")
    return folder


Told = tuple[Live, io.StringIO, InMemorySpanExporter]


@pytest.fixture
def told(folder: Path) -> Iterator[Told]:
    log, spans = io.StringIO(), InMemorySpanExporter()
    with live(folder, Rules(), [Log(log).tell, Traces(exporter=spans).tell], rows=2, queue=2) as server:
        yield server, log, spans


def metrics(server: Live) -> dict[tuple[str, ...], float]:
    """Values by name and labels."""
    text = server.client.get("/metrics").text
    rows = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(row.name, *sorted(row.labels.values())): row.value for row in rows}


def lines(log: io.StringIO, count: int, path: str = "") -> list[dict[str, Any]]:
    """The requests of a path, or all. One is told of after its last byte was sent."""
    deadline = time.monotonic() + 10
    while len(found := [line for line in map(json.loads, log.getvalue().splitlines()) if path in line["path"]]) < count:
        assert time.monotonic() < deadline, found
        time.sleep(0.01)
    return found


def test_numbers_are_those_of_the_answers(told: Told) -> None:
    server, log, _ = told
    whole = server.chat(**ENDLESS, messages=PROMPT, max_tokens=6, n=2).json()["usage"]
    body = {"model": "tiny", "messages": PROMPT, "stream": True, "max_tokens": 5} | ENDLESS
    with server.client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert [line for line in response.iter_lines() if line][-1] == "data: [DONE]"
    assert server.chat(model="other").status_code == 404
    first, second, third = lines(log, 3)

    assert first["status"] == second["status"] == 200 and third["status"] == 404
    assert (first["prompt_tokens"], first["completion_tokens"], first["answers"]) == (2 * whole["prompt_tokens"], 12, 2)
    assert second["completion_tokens"] == 5 and second["finish"] == ["length"]
    assert 0 <= second["queue"] <= second["first_token"] <= second["duration"]
    assert first["model"] == "tiny" and "model" not in third  # what a client made up is in no label

    found = metrics(server)
    model = ("chat", "slmops", "tiny")
    assert found[("gen_ai_server_time_to_first_token_seconds_count", *model)] == 3
    assert found[("gen_ai_server_time_per_output_token_seconds_count", *model)] == 3
    assert found[("gen_ai_server_request_duration_seconds_count", "", *model)] == 2
    assert found[("gen_ai_client_token_usage_sum", *sorted((*model, "output")))] == 17
    assert found[("gen_ai_client_token_usage_sum", *sorted((*model, "input")))] == 3 * whole["prompt_tokens"]
    assert found[("slmops_inter_token_seconds_count", "tiny")] == 17 - 3
    assert found[("slmops_queue_seconds_count", "tiny")] == 3
    assert found[("http_server_request_duration_seconds_count", "/v1/chat/completions", "200", "POST")] == 2
    assert found[("slmops_rows", "tiny")] == 2 and found[("slmops_rows_busy", "tiny")] == 0
    assert found[("slmops_model_ready", "tiny")] == 1 and found[("slmops_waiting", "tiny")] == 0


def test_rows_queues_refusals_and_clients_that_leave(tmp_path: Path) -> None:
    write_long(tmp_path)
    log = io.StringIO()
    with live(tmp_path, Rules(), [Log(log).tell], rows=2, queue=2) as server:
        body = {"model": "tiny", "messages": PROMPT, "stream": True, "n": 4} | ENDLESS
        with server.client.stream("POST", "/v1/chat/completions", json=body) as response:
            rest = response.iter_lines()  # which closes the response when nothing holds it any more
            next(rest)
            deadline = time.monotonic() + 20
            while (during := metrics(server))[("slmops_rows_busy", "tiny")] < 2:  # the second comes a step later
                assert time.monotonic() < deadline
            assert server.chat(n=2).status_code == 503
            del rest
        assert during[("slmops_rows_busy", "tiny")] == during[("slmops_waiting", "tiny")] == 2
        assert during[("slmops_requests_open",)] == 1
        by_status = {line["status"]: line for line in lines(log, 2, "completions")}
        assert by_status[503]["error"] == "overloaded" and by_status[200]["error"] == "cut"
        found = metrics(server)
    assert found[("slmops_rejections_total", "overloaded")] == 1
    assert (
        found[("slmops_rows_busy", "tiny")]
        == found[("slmops_waiting", "tiny")]
        == found[("slmops_requests_open",)]
        == 0
    )


def test_who_leaves_an_answer_that_is_not_streamed_ends_it_and_what_was_written_is_counted(tmp_path: Path) -> None:
    write_long(tmp_path, 32768)
    log = io.StringIO()
    with live(tmp_path, Rules(), [Log(log).tell], rows=2) as server:
        body = {"model": "tiny", "messages": PROMPT} | ENDLESS
        with pytest.raises(httpx.ReadTimeout):
            server.client.post("/v1/chat/completions", json=body, timeout=0.6)
        (line,) = lines(log, 1, "completions")
        assert line["error"] == "cut" and 1 < line["completion_tokens"] < 32000
        assert server.model.active == 0 and server.model.rows_busy == 0


def test_a_death_is_counted(told: Told) -> None:
    import os
    import signal

    server, _, _ = told
    assert server.model.pid is not None
    os.kill(server.model.pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while metrics(server)[("slmops_model_deaths_total", "tiny")] != 1:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_spans_have_the_callers_trace_and_the_times_of_the_answers(told: Told) -> None:
    server, log, spans = told
    server.chat({"traceparent": PARENT}, **ENDLESS, n=2, max_tokens=3)
    server.client.get("/v1/models")
    assert lines(log, 2)[0]["traceparent"] == PARENT
    *answers, request = spans.get_finished_spans()
    assert (
        f"{request.context.trace_id:032x}" == PARENT.split("-")[1]
        and f"{request.parent.span_id:016x}" == PARENT.split("-")[2]
    )
    assert request.name == "POST /v1/chat/completions" and request.kind.name == "SERVER"
    assert (
        request.attributes["gen_ai.request.model"] == "tiny" and request.attributes["gen_ai.usage.output_tokens"] == 6
    )
    assert [span.name for span in answers] == ["chat tiny"] * 2
    for span in answers:
        assert span.parent.span_id == request.context.span_id and span.attributes["gen_ai.response.finish_reasons"] == (
            "length",
        )
        row, token = span.events
        assert (row.name, token.name) == ("row", "first token")
        assert (
            request.start_time
            <= span.start_time
            <= row.timestamp
            <= token.timestamp
            <= span.end_time
            <= request.end_time
        )


def test_no_text_is_in_metrics_logs_or_traces(told: Told) -> None:
    server, log, spans = told
    said = server.chat(messages=PROMPT, temperature=1, seed=1, max_tokens=12, **ENDLESS).json()["choices"][0][
        "message"
    ]["content"]
    server.client.post("/v1/completions", json={"model": "tiny", "prompt": SECRET * 100})  # does not fit
    server.client.post("/v1/completions", json={"model": SECRET, "prompt": SECRET})
    server.client.post("/v1/completions", json={"model": "tiny", "prompt": SECRET, SECRET: 1})
    server.client.post("/v1/completions", content=SECRET)
    server.client.get(f"/v1/models?q={SECRET}")
    lines(log, 6)
    everything = (
        log.getvalue()
        + server.client.get("/metrics").text
        + "".join(span.to_json() for span in spans.get_finished_spans())
    )
    assert SECRET not in everything and json.dumps(said)[1:-1] not in everything and len(said) > 5


def test_texts_are_logged_where_they_are_asked_for(folder: Path) -> None:
    log = io.StringIO()
    with live(folder, Rules(texts=True), [Log(log).tell]) as server:
        said = server.chat(messages=PROMPT, **ENDLESS, max_tokens=6).json()["choices"][0]["message"]["content"]
    (line,) = lines(log, 1)
    assert SECRET in line["texts"][0] and line["texts"][1] == said


def test_refusals_are_counted_by_their_reason(folder: Path) -> None:
    log = io.StringIO()
    with live(folder, Rules(accounts=Accounts(Limits(requests_per_minute=1), lambda: 0.0)), [Log(log).tell]) as server:
        assert [server.chat().status_code for _ in range(3)] == [200, 429, 429]
        server.chat({"content-type": "text/plain"})
        found = metrics(server)
    assert found[("slmops_rejections_total", "limit")] == 2 and found[("slmops_rejections_total", "content_type")] == 1
    assert [line.get("error") for line in lines(log, 4)[:4]] == [None, "limit", "limit", "content_type"]


def test_a_log_that_cannot_be_written_ends_no_answer(folder: Path) -> None:
    closed = io.StringIO()
    closed.close()
    with live(folder, Rules(), [Log(closed).tell]) as server:
        assert server.chat().status_code == 200


def test_a_log_that_was_moved_away_is_begun_anew(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "logs" / "requests.jsonl"
    place.parent.mkdir()
    out = LogFile(place)
    with live(folder, Rules(), [Log(out).tell]) as server:
        for step in ("", "moved", "deleted", "moved with its folder"):
            if step == "moved":
                place.rename(tmp_path / "requests.jsonl.1")
            elif step == "deleted":
                place.unlink()
            elif step:
                place.parent.rename(tmp_path / "elsewhere")
            server.chat({"x-request-id": f"step {step}".replace(" ", "-")})
            now = tmp_path / "elsewhere" / place.name if "folder" in step else place
            until = time.monotonic() + 10
            while not (now.is_file() and f'"step-{step}"'.replace(" ", "-") in now.read_text()):
                assert time.monotonic() < until, step
                time.sleep(0.01)
    out.close()
    old = (tmp_path / "requests.jsonl.1").read_text().splitlines()
    assert [json.loads(line)["id"] for line in old] == ["step-"]
    kept = (tmp_path / "elsewhere" / place.name).read_text().splitlines()  # where there is no place for a new one
    assert [json.loads(line)["id"] for line in kept] == ["step-deleted", "step-moved-with-its-folder"]
    assert place.parent.exists() is False and (tmp_path / "elsewhere" / place.name).stat().st_mode & 0o777 == 0o600


def test_counts_are_those_of_a_plain_count() -> None:
    counts, values = Counts((0.1, 0.2, 1.0)), [0.05, 0.1, 0.15, 0.2, 0.5, 7.0]
    for value in values:
        counts.add(value)
    expected = [(repr(bound), float(sum(v <= bound for v in values))) for bound in (0.1, 0.2, 1.0)]
    assert counts.buckets() == [*expected, ("+Inf", 6.0)] and counts.sum == pytest.approx(sum(values))


class Collector(http.server.BaseHTTPRequestHandler):
    """Takes traces as a collector does."""

    taken: ClassVar[list[tuple[str, bytes]]] = []

    def do_POST(self) -> None:
        self.taken.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


def test_traces_go_to_a_collector(folder: Path) -> None:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    with http.server.HTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        traces = Traces(f"http://127.0.0.1:{collector.server_port}/")
        with live(folder, Rules(), [traces.tell]) as server:
            server.chat({"traceparent": PARENT})
        traces.stop()
        collector.shutdown()
    ((path, body),) = Collector.taken
    (resource,) = ExportTraceServiceRequest.FromString(body).resource_spans
    assert path == "/v1/traces" and {s.trace_id.hex() for s in resource.scope_spans[0].spans} == {PARENT.split("-")[1]}
    assert ("service.name", "slmops") in {(a.key, a.value.string_value) for a in resource.resource.attributes}


def test_a_collector_that_is_away_ends_no_answer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    traces = Traces("http://127.0.0.1:9")
    with live(folder, Rules(), [traces.tell]) as server:
        assert server.chat().status_code == 200
    began = time.monotonic()
    traces.stop()
    assert time.monotonic() - began < 20
