"""Traces for OpenTelemetry: a span for each request that a model was asked for, and one below it for each answer.

The caller's `traceparent` is the parent. Spans are made when a request is over, from the times that were noted, so that nothing
is added to an answer's way; a thread of the SDK sends them. They have no text of prompts or answers.
"""

from __future__ import annotations

from typing import Any

from slmops import __version__
from slmops.errors import MissingExtraError
from slmops.serve.metrics import PROVIDER, error_of, operation
from slmops.serve.record import Record, Watch


class Traces:
    """Spans to an exporter.

    Args:
        endpoint: base address of a collector that takes OTLP over HTTP; empty: as OpenTelemetry's own variables say.
        exporter: instead of one to the endpoint.

    Raises:
        MissingExtraError: OpenTelemetry is not installed.
    """

    def __init__(self, endpoint: str = "", exporter: Any = None) -> None:
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

            if exporter is None:
                from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        except ImportError as error:
            raise MissingExtraError("What sends traces", "otel") from error
        # shutdown at exit would wait for a collector that is away; `stop` is called with the server
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": "slmops", "service.version": __version__}), shutdown_on_exit=False
        )
        if exporter is not None:
            self._provider.add_span_processor(SimpleSpanProcessor(exporter))
        else:
            sent = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces") if endpoint else OTLPSpanExporter()
            self._provider.add_span_processor(BatchSpanProcessor(sent))
        self._tracer = self._provider.get_tracer("slmops.serve", __version__)
        self._parents = TraceContextTextMapPropagator()

    def tell(self, record: Record) -> None:
        """Make the spans of a request that is over."""
        from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context

        if not record.answers:
            return
        failure = error_of(record)
        shared = {
            "gen_ai.operation.name": operation(record.route), "gen_ai.provider.name": PROVIDER, "gen_ai.request.model": record.model,
        }  # fmt: skip
        span = self._tracer.start_span(
            f"{record.method} {record.route}", self._parents.extract(record.parent), SpanKind.SERVER,
            {
                **shared, "http.request.method": record.method, "http.route": record.route,
                "http.response.status_code": record.status, "slmops.request.id": record.id,
                "gen_ai.usage.input_tokens": record.prompt_tokens, "gen_ai.usage.output_tokens": record.tokens,
            }, start_time=_at(record, record.began),
        )  # fmt: skip
        if record.key:
            span.set_attribute("slmops.key", record.key)
        if failure:
            span.set_attribute("error.type", failure)
            span.set_status(StatusCode.ERROR)
        inside = set_span_in_context(span)
        for watch in record.answers:
            self._answer(record, watch, shared, inside)
        span.end(_at(record, record.ended))

    def _answer(self, record: Record, watch: Watch, shared: dict[str, str], inside: Any) -> None:
        from opentelemetry.trace import SpanKind

        span = self._tracer.start_span(
            f"{shared['gen_ai.operation.name']} {watch.model}", inside, SpanKind.INTERNAL,
            {
                **shared, "gen_ai.usage.input_tokens": watch.prompt, "gen_ai.usage.output_tokens": watch.tokens,
                "gen_ai.response.finish_reasons": [watch.finish or "cut"], "slmops.cached_tokens": watch.cached,
            }, start_time=_at(record, watch.began),
        )  # fmt: skip
        if watch.waited is not None:
            span.add_event("row", timestamp=_at(record, watch.began + watch.waited))
        if watch.tokens:
            span.add_event("first token", timestamp=_at(record, watch.first))
        span.end(_at(record, watch.last if watch.tokens else record.ended))

    def stop(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


def _at(record: Record, moment: float) -> int:
    """Nanoseconds since 1970 of a moment of a request."""
    return int((record.time + moment - record.began) * 1e9)
