"""`/metrics` in Prometheus' form, with the names of OpenTelemetry's conventions for generative models and HTTP where there are any.

Labels have few values: names of served models, patterns of paths, methods, statuses, reasons. What comes with every token is counted
where it happens (`slmops.serve.record`), and read only when somebody asks.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

from slmops import __version__
from slmops.errors import MissingExtraError
from slmops.serve.pool import Pool
from slmops.serve.record import Counts, Record

if TYPE_CHECKING:
    from slmops.serve.gate import State

FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 30.0)
EACH = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
WHOLE = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
OPERATIONS = (
    ("/chat", "chat"), ("/responses", "chat"), ("/completions", "text_completion"), ("/generate", "text_completion"),
    ("/embed", "embeddings"),
)  # fmt: skip
PROVIDER = "slmops"


def operation(route: str) -> str:
    """OpenTelemetry's name of what a path does."""
    return next((name for part, name in OPERATIONS if part in route), "chat")


class Metrics:
    """Counts what `tell` is given and what the models say of themselves.

    Raises:
        MissingExtraError: prometheus_client is not installed.
    """

    def __init__(self, pool: Pool, state: State) -> None:
        try:
            from prometheus_client import CollectorRegistry, Counter, Histogram, Info
        except ImportError as error:
            raise MissingExtraError("What makes metrics", "serve") from error
        self._registry = CollectorRegistry()
        self._of = cache(lambda metric, *labels: metric.labels(*labels))
        model = ("gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model")

        def histogram(name: str, text: str, labels: tuple[str, ...], buckets: tuple[float, ...]) -> Any:
            return Histogram(name, text, labels, buckets=buckets, registry=self._registry)

        self._http = histogram(
            "http_server_request_duration_seconds", "Requests of all paths",
            ("http_request_method", "http_route", "http_response_status_code"), WHOLE,
        )  # fmt: skip
        self._whole = histogram(
            "gen_ai_server_request_duration_seconds", "Requests that a model was asked for, from the first byte to the last",
            (*model, "error_type"), WHOLE,
        )  # fmt: skip
        self._first = histogram(
            "gen_ai_server_time_to_first_token_seconds",
            "From the request to the first token of an answer",
            model,
            FIRST,
        )
        self._each = histogram(
            "gen_ai_server_time_per_output_token_seconds",
            "Of an answer that came to its end, after its first token",
            model,
            EACH,
        )
        self._tokens = histogram(
            "gen_ai_client_token_usage", "Tokens of a request", (*model, "gen_ai_token_type"), TOKENS
        )
        self._refused = Counter("slmops_rejections", "Requests that were refused", ("reason",), registry=self._registry)
        self._cached = Counter(
            "slmops_cached_tokens", "Tokens of prompts that had not to be read", ("model",), registry=self._registry
        )
        Info("slmops_build", "The version", registry=self._registry).info({"version": __version__})
        self._registry.register(_Models(pool, state))

    def tell(self, record: Record) -> None:
        """Count a request that is over."""
        method = record.method if record.method in METHODS else "_OTHER"
        self._of(self._http, method, record.route or "none", str(record.status)).observe(record.duration)
        if record.reason or record.status in (429, 503, 504):
            reason = record.reason or {429: "limit", 503: "overloaded", 504: "deadline"}[record.status]
            self._of(self._refused, reason).inc()
        if not record.answers:
            return
        labels = (operation(record.route), PROVIDER, record.model)
        self._of(self._whole, *labels, error_of(record)).observe(record.duration)
        self._of(self._tokens, *labels, "input").observe(record.prompt_tokens)
        self._of(self._tokens, *labels, "output").observe(record.tokens)
        for watch in record.answers:
            if watch.tokens:
                self._of(self._first, *labels).observe(watch.first - record.began)
            if watch.tokens > 1 and watch.finish:
                self._of(self._each, *labels).observe((watch.last - watch.first) / (watch.tokens - 1))
            if watch.cached:
                self._of(self._cached, watch.model).inc(watch.cached)

    def text(self) -> bytes:
        """All of it, in Prometheus' text form."""
        from prometheus_client import generate_latest

        return bytes(generate_latest(self._registry))


def error_of(record: Record) -> str:
    """OpenTelemetry's `error.type`: empty where there is none."""
    if record.reason:
        return record.reason
    if record.failed or record.status >= 500:
        return str(record.status or "_OTHER")
    return "cut" if record.cut else ""


class _Models:
    """What the models say of themselves when somebody asks."""

    def __init__(self, pool: Pool, state: State) -> None:
        self._pool, self._state = pool, state

    def describe(self) -> Iterator[Any]:
        """Nothing: names are known when they are read."""
        return iter(())

    def collect(self) -> Iterator[Any]:
        """See prometheus_client."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        def each(kind: Any, name: str, text: str, value: Any) -> Any:
            family = kind(name, text, labels=["model"])
            for model in self._pool:
                family.add_metric([model.settings.name], value(model))
            return family

        def histogram(name: str, text: str, counts: Any) -> Any:
            family = HistogramMetricFamily(name, text, labels=["model"])
            for model in self._pool:
                found: Counts = counts(model)
                family.add_metric([model.settings.name], found.buckets(), found.sum)
            return family

        yield histogram("slmops_queue_seconds", "From a request to its row", lambda model: model.told.waits)
        yield histogram("slmops_inter_token_seconds", "Between two tokens of an answer", lambda model: model.told.gaps)
        yield each(GaugeMetricFamily, "slmops_rows", "Answers at a time", lambda model: model.settings.rows)
        yield each(GaugeMetricFamily, "slmops_rows_busy", "Answers that have a row", lambda model: model.rows_busy)
        yield each(
            GaugeMetricFamily, "slmops_waiting", "Answers without a row", lambda model: model.active - model.rows_busy
        )
        yield each(GaugeMetricFamily, "slmops_model_ready", "1: it can be asked", lambda model: float(model.ready))
        yield each(CounterMetricFamily, "slmops_model_deaths", "Ends of its process", lambda model: model.told.deaths)
        yield GaugeMetricFamily("slmops_requests_open", "Requests that are being answered", value=self._state.open)
        yield GaugeMetricFamily("slmops_draining", "1: about to end", value=float(self._state.draining))
