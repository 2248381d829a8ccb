"""OpenTelemetry traces: a span for each request, and below it one for each hop of each choice.

All spans are made when the request has ended, from the times that came with its events, so that a token costs
nothing more. The hops: `tokenize` (submission to the tokenizer's answer), `queue` (to the first slot in the scheduler),
`prefill` (to the first token here) and `decode` (to the last). The packages are an extra, imported only if traces are
wanted.
"""

import time

from starlette.datastructures import Headers

import ramet
from ramet.frontend.generation import ChoiceRecord
from ramet.frontend.request_log import RequestRecord

# The collector must not hold up the end of the server.
_EXPORT_TIMEOUT_S = 2.0


class Tracer:
    """Sends to an OTLP endpoint over HTTP, from a thread of the library's, and at the end of the process."""

    def __init__(self, endpoint: str) -> None:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        resource = Resource.create({"service.name": "ramet", "service.version": ramet.__version__})
        provider = TracerProvider(resource=resource)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint, timeout=_EXPORT_TIMEOUT_S)))
        self._tracer = provider.get_tracer("ramet")
        self._propagator = TraceContextTextMapPropagator()
        self._trace = trace

    def __call__(self, record: RequestRecord) -> None:
        """Probes and scrapes are left out, unless they belong to a trace."""
        headers = Headers(scope=record.scope)
        if record.scope["method"] != "POST" and "traceparent" not in headers:
            return
        offset_s = time.time() - time.monotonic()  # spans bear the time of day
        generation = record.generation
        usage = record.usage()
        attributes = {
            "http.request.method": record.scope["method"],
            "http.route": record.route,
            "http.response.status_code": record.status,
            "ramet.request_id": record.request_id,
            **{f"gen_ai.usage.{new}_tokens": usage[old] for old, new in _USAGE if old in usage},
        }
        span = self._tracer.start_span(
            f"{record.scope['method']} {record.route}",
            self._propagator.extract(dict(headers)),
            self._trace.SpanKind.SERVER,
            attributes,
            start_time=_ns(record.began_at + offset_s),
        )
        if record.status >= 500:
            span.set_status(self._trace.StatusCode.ERROR)
        context = self._trace.set_span_in_context(span)
        for index, choice in enumerate(generation.records if generation is not None else ()):
            for name, begin, end in _hops(choice):
                attributes, start = {"ramet.choice": index}, _ns(begin + offset_s)
                hop = self._tracer.start_span(name, context, attributes=attributes, start_time=start)
                hop.end(_ns(end + offset_s))
        span.end(_ns(record.ended_at + offset_s))


_USAGE = (("prompt_tokens", "input"), ("completion_tokens", "output"))


def _hops(choice: ChoiceRecord) -> list[tuple[str, float, float]]:
    """Name, begin and end of those that the choice has come through."""
    times = [choice.submitted_at, choice.tokenized_at, choice.scheduled_at, choice.first_at, choice.last_at]
    names = ("tokenize", "queue", "prefill", "decode")
    return [(name, times[i], times[i + 1]) for i, name in enumerate(names) if times[i] and times[i + 1]]


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
