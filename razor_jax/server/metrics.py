"""Metrics of the server for Prometheus. Names are those of vLLM, with our prefix."""

from __future__ import annotations

import time
from collections.abc import Iterator

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .generation import Delta, Engine, Finished

PREFIX = "razor_jax:"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """All metrics of a server."""

    def __init__(self, engine: Engine, model: str):
        self._registry = prometheus_client.CollectorRegistry()
        self._registry.register(_EngineMetrics(engine, model))
        self._model = model
        self._first = self._histogram("time_to_first_token_seconds", "Time from a request to its first token.")
        self._gap = self._histogram("inter_token_latency_seconds", "Time between two growths of an answer, per token.")
        self._whole = self._histogram("e2e_request_latency_seconds", "Time from a request to the end of its answer.")

    def text(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        return prometheus_client.generate_latest(self._registry)

    def times(self) -> RequestTimes:
        """Return the clock of a request that arrives now."""
        return RequestTimes(self._first, self._gap, self._whole)

    def _histogram(self, name: str, help: str) -> prometheus_client.Histogram:
        name = PREFIX + name
        histogram = prometheus_client.Histogram(name, help, ["model_name"], buckets=_SECONDS, registry=self._registry)
        return histogram.labels(self._model)


class RequestTimes:
    """Clock of one request. Each answer is observed from the engine's thread."""

    def __init__(self, *histograms: prometheus_client.Histogram):
        self._first, self._gap, self._whole = histograms
        self._start = time.monotonic()
        self._latest: dict[int, float] = {}

    def hear(self, index: int, news: Delta | Finished, now: float) -> None:
        """Observe growth or end of an answer."""
        if isinstance(news, Finished):
            self._whole.observe(now - self._start)
        elif news.tokens:
            if index not in self._latest:
                self._first.observe(now - self._start)
            else:
                self._gap.observe((now - self._latest[index]) / len(news.tokens))
            self._latest[index] = now


class _EngineMetrics(Collector):
    """Metrics read from the engine's snapshot when Prometheus asks."""

    def __init__(self, engine: Engine, model: str):
        self._engine, self._model = engine, model

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        used = max((u / p for u, p in zip(stats.pages_used, stats.pages, strict=True)), default=0.0)
        for name, help, value in (
            ("num_requests_running", "Answers that have a slot.", stats.running),
            ("num_requests_waiting", "Answers in the queue.", stats.waiting),
            ("num_slots", "Answers that can run at once.", stats.slots),
            ("kv_cache_usage_perc", "Share of the pages in use, of the fullest head group: 1 is all.", used),
            ("kv_cache_bytes", "Bytes of the pool.", stats.cache_bytes),
            ("kv_cache_used_bytes", "Bytes that the tokens in the cache take.", stats.used_bytes),
            ("kv_cache_dense_bytes", "Bytes that they would take if every head kept them.", stats.dense_bytes),
            ("kv_cache_saved_bytes", "Dense bytes less used bytes.", max(0, stats.dense_bytes - stats.used_bytes)),
            ("dropped_tokens", "Prompt tokens that windowed heads of running answers dropped.", stats.dropped_tokens),
            ("last_tick_age_seconds", "Seconds since the last tick.", stats.last_tick_age),
        ):
            yield self._filled(GaugeMetricFamily(PREFIX + name, help, labels=["model_name"]), value)
        for name, help, value in (
            ("prompt_tokens", "Prompt tokens.", stats.prompt_tokens),
            ("generation_tokens", "Generated tokens.", stats.completion_tokens),
            ("prefix_cache_queries", "Prompt tokens that could have been in a checkpoint.", stats.prompt_tokens),
            ("prefix_cache_hits", "Prompt tokens whose prefill was reused.", stats.cached_tokens),
            ("compilations", "Programs compiled since the engine was ready: 0 is right.", stats.compilations),
            ("ticks", "Ticks.", stats.ticks),
        ):
            yield self._filled(CounterMetricFamily(PREFIX + name, help, labels=["model_name"]), value)
        pages = GaugeMetricFamily(PREFIX + "kv_pages", "Pages per head group.", labels=["model_name", "group", "state"])
        for group, (taken, count) in enumerate(zip(stats.pages_used, stats.pages, strict=True)):
            pages.add_metric([self._model, str(group), "used"], taken)
            pages.add_metric([self._model, str(group), "free"], count - taken)
        yield pages
        labels = ["model_name", "finished_reason"]
        ends = CounterMetricFamily(PREFIX + "request_success", "Answers by how they ended.", labels=labels)
        for reason in sorted({"stop", "length", "cancelled", "error", *stats.finished}):
            ends.add_metric([self._model, reason], stats.finished.get(reason, 0))
        yield ends

    def _filled(self, family: GaugeMetricFamily | CounterMetricFamily, value: float) -> Metric:
        family.add_metric([self._model], value)
        return family
