"""The metrics of a scoring server, on a Prometheus page or through Ray's metrics (under Ray Serve)."""

from typing import Protocol

NAMES = {
    "requests": ("metaalign_reward_requests", "requests answered, by path and status"),
    "rows": ("metaalign_reward_rows", "answers scored"),
    "tokens": ("metaalign_reward_tokens", "tokens scored"),
    "seconds": ("metaalign_reward_request_seconds", "seconds from a request to its reply, by path"),
    "batch": ("metaalign_reward_batch_rows", "answers per batch"),
    "busy": ("metaalign_reward_busy_seconds", "seconds spent scoring"),
    "queue": ("metaalign_reward_queue_tokens", "tokens that wait or are being scored"),
}
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class ServerMetrics(Protocol):
    """Receives the events of a server."""

    def answered(self, path: str, status: int, seconds: float) -> None:
        """A request was answered."""

    def scored(self, rows: int, tokens: int, seconds: float) -> None:
        """A batch was scored."""

    def queued(self, tokens: int) -> None:
        """The number of tokens that wait or are being scored has changed."""


class PrometheusMetrics:
    """Metrics in their own registry; `page` is the reply to GET /metrics."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = CollectorRegistry()
        self._requests = Counter(*NAMES["requests"], ["path", "status"], registry=self.registry)
        self._rows = Counter(*NAMES["rows"], registry=self.registry)
        self._tokens = Counter(*NAMES["tokens"], registry=self.registry)
        self._seconds = Histogram(*NAMES["seconds"], ["path"], buckets=SECONDS, registry=self.registry)
        self._batch = Histogram(*NAMES["batch"], buckets=ROWS, registry=self.registry)
        self._busy = Counter(*NAMES["busy"], registry=self.registry)
        self._queue = Gauge(*NAMES["queue"], registry=self.registry)

    def answered(self, path: str, status: int, seconds: float) -> None:
        """See `ServerMetrics`."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def scored(self, rows: int, tokens: int, seconds: float) -> None:
        """See `ServerMetrics`."""
        self._rows.inc(rows)
        self._tokens.inc(tokens)
        self._busy.inc(seconds)
        self._batch.observe(rows)

    def queued(self, tokens: int) -> None:
        """See `ServerMetrics`."""
        self._queue.set(tokens)

    def page(self) -> bytes:
        """The metrics in Prometheus' text format."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry)
