"""Prometheus metrics: what waits and runs, what the cache holds, how fast it is, what it costs.

Counters are moved when a request ends; gauges are read from the engines at the moment of the scrape.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tael.serve.answer import Counts
from tael.serve.store import Served

if TYPE_CHECKING:
    from tael.serve.service import Service

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_RATES = (1, 3, 10, 30, 100, 300, 1000)


class Metrics:
    """All metrics of one server, in a registry of their own."""

    def __init__(self, service: Service) -> None:
        self.registry = CollectorRegistry()
        made = self.registry

        def counter(name: str, meaning: str, *labels: str) -> Counter:
            return Counter(name, meaning, labels, registry=made)

        def histogram(name: str, meaning: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, meaning, buckets=buckets, registry=made)

        self._requests = counter("tael_requests", "Requests by how they ended.", "endpoint", "status")
        self._tokens = counter("tael_tokens", "Tokens: hit and miss of prompts, output, drafted, accepted.", "kind")
        self._dollars = counter("tael_dollars", "What was charged for.", "model")
        self._first = histogram("tael_first_token_seconds", "Time to the first token.", _SECONDS)
        self._whole = histogram("tael_request_seconds", "Time to the last token.", _SECONDS)
        self._rate = histogram("tael_tokens_per_second", "Of one answer, after its first token.", _RATES)
        self.registry.register(_Engines(service))

    def served(self, served: Served, counts: Counts) -> None:
        """A request that the engine answered, or began to."""
        self._requests.labels(served.endpoint, str(served.status)).inc()
        kinds = {
            "hit": counts.cached,
            "miss": counts.prompt - counts.cached,
            "output": counts.completion,
            "drafted": counts.drafted,
            "accepted": counts.accepted,
        }
        for kind, tokens in kinds.items():
            self._tokens.labels(kind).inc(tokens)
        self._dollars.labels(served.model).inc(served.dollars)
        self._whole.observe(served.seconds)
        if served.first_token_seconds is not None:
            self._first.observe(served.first_token_seconds)
            after = served.seconds - served.first_token_seconds
            if counts.completion > 1 and after > 0:
                self._rate.observe((counts.completion - 1) / after)

    def refused(self, endpoint: str, status: int) -> None:
        """A request that never reached the engine."""
        self._requests.labels(endpoint, str(status)).inc()

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)


class _Engines(Collector):
    """Gauges of every loaded model."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        gauges = {
            "tael_queued": ("Requests that wait for a place in the batch.", lambda pool: len(pool.scheduler.waiting)),
            "tael_running": ("Requests in the batch.", lambda pool: len(pool.scheduler.running)),
            "tael_cache_blocks": ("Blocks of the cache.", lambda pool: pool.blocks.usable),
            "tael_cache_blocks_free": (
                "Blocks nobody uses; they may hold prefixes.",
                lambda pool: pool.blocks.available,
            ),
            "tael_cache_bytes": ("Bytes of the cache.", lambda pool: pool.runner.cache_bytes),
        }
        loaded = self._service.host.loaded()
        for name, (meaning, read) in gauges.items():
            family = GaugeMetricFamily(name, meaning, labels=["model"])
            for hosted in loaded:
                family.add_metric([hosted.spec.name], read(hosted.engine.pool))
            yield family
        visits = GaugeMetricFamily("tael_requests_open", "Requests in the house.")
        visits.add_metric([], len(self._service.visits))
        yield visits
