"""GET /metrics: Prometheus text under vLLM's names, so that dashboards made for vLLM work.

Requests are counted here as their deltas pass, and steps as the engine reports them. Everything else is read from the
engine at each scrape. Each app has its own registry; front-ends of one server show the sums of their counters.

Names, labels and buckets are those of vLLM's vllm/v1/metrics/loggers.py and, for HTTP, of
prometheus-fastapi-instrumentator, which vLLM uses. Metrics of features that this engine lacks are left out: LoRA
adapters, image and remote caches, sampled block lifetimes. Our own names begin with `tinyvllm:`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.platform_collector import PlatformCollector

from tinyvllm.errors import EngineDeadError
from tinyvllm.server.counters import Counters, Family, Histogram, Value
from tinyvllm.server.engine_metrics import LABELS, EngineCollector
from tinyvllm.server.front_ends import FrontEnds
from tinyvllm.server.process_metrics import ProcessesCollector, ProcessMetrics
from tinyvllm.server.request_times import RequestTimes

if TYPE_CHECKING:
    from tinyvllm.config import SamplingParams
    from tinyvllm.engine.async_engine import AsyncEngine
    from tinyvllm.engine.output import Delta
    from tinyvllm.server.generation import PromptReceiver

# Seconds.
# fmt: off
TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
    640.0, 2560.0,
)
ITL_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)
LATENCY_BUCKETS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)
HTTP_BUCKETS = (0.1, 0.5, 1.0)
HTTP_FINE_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 7.5, 10.0, 30.0, 60.0,
)
# Counts.
SMALL_COUNT_BUCKETS = (1, 2, 5, 10, 20)
# fmt: on

FINISH_REASONS = ("stop", "length", "abort", "error")
PROMPT_SOURCES = ("local_compute", "local_cache_hit", "external_kv_transfer")
REFUSALS = {400: "invalid", 401: "unauthorized", 404: "not_found", 408: "timeout", 413: "too_large", 429: "queue_full"}
REFUSALS |= {499: "client_left", 500: "failed", 503: "unavailable", 504: "timeout"}  # a status's `reason`
HTTP_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
UNCOUNTED_PATHS = frozenset(("/metrics", "/health", "/ready", "/ping", "/version", "/engine/state"))


HTTP_REQUESTS = Family(
    "http_requests", "Responses by route, method and class of status.", "counter", ("handler", "method", "status")
)
HTTP_DURATION = Family(
    "http_request_duration_seconds",
    "Time from headers to the end of the response.",
    "histogram",
    ("handler", "method"),
    HTTP_BUCKETS,
)
HTTP_FINE_DURATION = Family(
    "http_request_duration_highr_seconds",
    "The same for all routes together, in finer buckets.",
    "histogram",
    buckets=HTTP_FINE_BUCKETS,
)


def token_count_buckets(most: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50, ... up to `most`."""
    bounds, power = [1], 1
    while bounds[-1] <= most:
        bounds += [2 * power, 5 * power, 10 * power]
        power *= 10
    return tuple(bound for bound in bounds if bound <= most)


@dataclass(frozen=True)
class Totals:
    """Counts of all front-ends since the server's start, for the log and the page."""

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0  # of the prompt tokens
    num_output_tokens: int = 0


class Metrics:
    """Owns one app's registry. Used on the server's event loop, except for steps: the engine's thread counts them."""

    def __init__(self, engine: AsyncEngine, front_ends: FrontEnds) -> None:
        row = front_ends.board.own
        self._recent_ttft_s, self._recent_itl_s = row.recent_ttft_s, row.recent_itl_s
        self._engine = engine
        self._counters: Counters = front_ends.counters
        self._registry = CollectorRegistry()
        self._registry.register(self._counters)
        self._values = (engine.served_model_name, "0")  # of LABELS; requests are counted together
        self._engines = EngineCollector(engine)
        self._registry.register(self._engines)
        self._registry.register(ProcessesCollector(front_ends.pids))
        PlatformCollector(registry=self._registry)
        self.process = ProcessMetrics(front_ends)
        self._sizes: _RequestSizes | None = None
        self._make_counters()
        self._make_histograms()
        for family in (HTTP_REQUESTS, HTTP_DURATION):
            self._counters.register(family)
        self._http_duration_fine_s = self._counters.histogram(HTTP_FINE_DURATION)

    async def look_at_adapters(self) -> None:
        """Ask the engines which adapters their requests use, for the next `render`."""
        if self._engine.config.enable_lora and self._engine.is_ready:
            with contextlib.suppress(EngineDeadError):  # the previous answer stays
                self._engines.adapter_uses = await self._engine.adapter_uses()

    def render(self) -> bytes:
        if self._engine.is_ready:
            self._request_sizes()  # so that they are there before the first request
        return generate_latest(self._registry)

    @property
    def totals(self) -> Totals:
        names = ("vllm:prompt_tokens", "vllm:prompt_tokens_cached", "vllm:generation_tokens")
        return Totals(*(int(self._counters.total(name)) for name in names))

    def count_http(self, method: str, handler: str, status: int, duration_s: float) -> None:
        """Count a response. `handler` is the route's path, with its placeholders."""
        if handler in UNCOUNTED_PATHS:
            return
        method = method if method in HTTP_METHODS else "other"  # clients can invent any number
        self._counters.value(HTTP_REQUESTS, (handler, method, f"{status // 100}xx")).inc()
        self._counters.histogram(HTTP_DURATION, (handler, method)).observe(duration_s)
        self._http_duration_fine_s.observe(duration_s)

    def count_refusal(self, status: int) -> None:
        """Count a request for work that was not done."""
        self._refused[REFUSALS.get(status, "other")].inc()

    def count_aborts(self, num_choices: int) -> None:
        """Count choices that ended because the client left, or because the time was up."""
        self._finished["abort"].inc(num_choices)

    # ---- What a PromptObserver counts ----

    def count_prompt(self, num_tokens: int, num_cached: int, num_restored: int) -> None:
        """num_restored: of the cached tokens, those from host memory or disk."""
        self._prompt_tokens.inc(num_tokens)
        self._prompt_tokens_cached.inc(num_cached)
        self._by_source["local_compute"].inc(num_tokens - num_cached)
        self._by_source["local_cache_hit"].inc(num_cached - num_restored)
        self._by_source["external_kv_transfer"].inc(num_restored)

    def count_tokens(self, num_new: int, seconds: float, *, is_first: bool) -> None:
        """Count `num_new` tokens of one choice. `seconds`: since arrival if first, else since its previous tokens."""
        self._generation_tokens.inc(num_new)
        if is_first:
            self._ttft_s.observe(seconds)
            self._recent_ttft_s.append(seconds)
            return
        self._itl_s.observe(seconds / num_new, num_new)  # tokens that arrive together share the interval
        self._recent_itl_s.append(seconds / num_new)

    def count_choice(self, delta: Delta, params: SamplingParams, e2e_s: float) -> None:
        assert delta.finish_reason is not None
        self._finished[delta.finish_reason].inc()
        self._e2e_s.observe(e2e_s)
        sizes = self._request_sizes()
        sizes.prompt_tokens.observe(delta.num_prompt_tokens)
        sizes.computed_tokens.observe(delta.num_prompt_tokens - delta.num_cached_tokens)
        sizes.output_tokens.observe(delta.num_output_tokens)
        if params.max_tokens is not None:
            sizes.max_tokens.observe(params.max_tokens)
        timing = delta.timing
        if timing is None:
            return
        decode_s = timing.last_token_s - timing.first_token_s
        self._queue_s.observe(max(0.0, timing.scheduled_s - timing.queued_s))
        self._prefill_s.observe(max(0.0, timing.first_token_s - timing.scheduled_s))
        self._decode_s.observe(decode_s)
        self._inference_s.observe(max(0.0, timing.last_token_s - timing.scheduled_s))
        if delta.num_output_tokens > 1:
            self._time_per_token_s.observe(decode_s / (delta.num_output_tokens - 1))
        self._preemptions.observe(timing.num_preemptions)
        self._corrupted.inc(timing.is_corrupted)

    def count_request(self, params: SamplingParams, longest: int) -> None:
        """Count a prompt whose choices have all ended. `longest`: output tokens of its longest choice."""
        self._request_sizes().longest_output.observe(longest)
        self._n.observe(params.n)

    # ---- Registration ----

    def _counter(self, name: str, text: str) -> Value:
        return self._counters.value(Family(name, text, "counter", LABELS), self._values)

    def _labeled(self, name: str, text: str, label: str, values: Iterable[str]) -> dict[str, Value]:
        """A counter for each value of one additional label. All start at 0, so that rates count the first event."""
        family = Family(name, text, "counter", (*LABELS, label))
        return {value: self._counters.value(family, (*self._values, value)) for value in values}

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return self._counters.histogram(Family(name, text, "histogram", LABELS, buckets), self._values)

    def _make_counters(self) -> None:
        counter, labeled = self._counter, self._labeled
        self._prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens of requests that have started.")
        self._prompt_tokens_cached = counter("vllm:prompt_tokens_cached", "Prompt tokens found in the prefix cache.")
        self._by_source = labeled(
            "vllm:prompt_tokens_by_source", "Prompt tokens by where they came from.", "source", PROMPT_SOURCES
        )
        self._generation_tokens = counter("vllm:generation_tokens", "Tokens generated.")
        self._corrupted = counter("vllm:corrupted_requests", "Choices that ended because their logits were not finite.")
        self._finished = labeled("vllm:request_success", "Choices that have ended.", "finished_reason", FINISH_REASONS)
        self._refused = labeled(
            "tinyvllm:requests_refused", "Requests refused.", "reason", sorted({*REFUSALS.values(), "other"})
        )

    def _make_histograms(self) -> None:
        latency, histogram = LATENCY_BUCKETS, self._histogram
        self._ttft_s = histogram(
            "vllm:time_to_first_token_seconds", "Time from arrival to the first token.", TTFT_BUCKETS
        )
        self._itl_s = histogram("vllm:inter_token_latency_seconds", "Time between tokens of a choice.", ITL_BUCKETS)
        self._time_per_token_s = histogram(
            "vllm:request_time_per_output_token_seconds", "Mean time per output token after the first.", ITL_BUCKETS
        )
        self._e2e_s = histogram("vllm:e2e_request_latency_seconds", "Time from arrival to the last token.", latency)
        self._queue_s = histogram("vllm:request_queue_time_seconds", "Time in the queue.", latency)
        self._prefill_s = histogram(
            "vllm:request_prefill_time_seconds", "Time from leaving the queue to the first token.", latency
        )
        self._decode_s = histogram(
            "vllm:request_decode_time_seconds", "Time from the first token to the last.", latency
        )
        self._inference_s = histogram(
            "vllm:request_inference_time_seconds", "Time from leaving the queue to the last token.", latency
        )
        self._n = histogram("vllm:request_params_n", "Choices requested per prompt.", SMALL_COUNT_BUCKETS)
        self._preemptions = histogram(
            "vllm:request_num_preemptions", "Times that a request was preempted.", SMALL_COUNT_BUCKETS
        )

    def _request_sizes(self) -> _RequestSizes:
        """Created once the model is loaded, because their buckets end at its context length."""
        if self._sizes is None:
            buckets = token_count_buckets(self._engine.capacity.max_model_len)
            self._sizes = _RequestSizes(*(self._histogram(name, text, buckets) for name, text in _SIZE_NAMES))
        return self._sizes


_SIZE_NAMES = (
    ("vllm:request_prompt_tokens", "Prompt tokens of a choice."),
    ("vllm:request_generation_tokens", "Output tokens of a choice."),
    ("vllm:request_max_num_generation_tokens", "Output tokens of a request's longest choice."),
    ("vllm:request_params_max_tokens", "The max_tokens of a choice."),
    ("vllm:request_prefill_kv_computed_tokens", "Prompt tokens of a choice that were not in the prefix cache."),
)


@dataclass(frozen=True)
class _RequestSizes:
    """In the order of _SIZE_NAMES."""

    prompt_tokens: Histogram
    output_tokens: Histogram
    longest_output: Histogram
    max_tokens: Histogram
    computed_tokens: Histogram


class PromptObserver:
    """Counts one prompt's deltas on their way to `receiver`: a Receiver."""

    def __init__(
        self,
        metrics: Metrics,
        params: SamplingParams,
        receiver: PromptReceiver,
        *,
        arrival_s: float,
        on_first: Callable[[], None] = lambda: None,
        times: RequestTimes | None = None,
    ) -> None:
        """arrival_s: perf_counter() when the request arrived. on_first: called before the first delta is passed on.
        times: where the request's time goes."""
        self._metrics = metrics
        self._params = params
        self._receiver = receiver
        self._arrival_s = arrival_s
        self._on_first: Callable[[], None] | None = on_first
        self._times = times or RequestTimes()
        self._num_open = params.n
        self._num_tokens = [0] * params.n
        self._last_s: list[float | None] = [None] * params.n  # by choice: when its latest token arrived

    def take(self, delta: Delta) -> None:
        now_s, index = time.perf_counter(), delta.index
        if self._on_first is not None:
            num_restored = 0 if delta.timing is None else delta.timing.num_restored_tokens
            self._metrics.count_prompt(delta.num_prompt_tokens, delta.num_cached_tokens, num_restored)
            self._on_first()
            self._on_first = None
        if delta.timing is not None:
            self._times.note(delta, now_s)
        num_new = delta.num_output_tokens - self._num_tokens[index]
        if num_new > 0:
            self._num_tokens[index] = delta.num_output_tokens
            last_s = self._last_s[index]
            since_s = self._arrival_s if last_s is None else last_s
            self._metrics.count_tokens(num_new, now_s - since_s, is_first=last_s is None)
            self._last_s[index] = now_s
        if delta.finish_reason is not None:
            self._metrics.count_choice(delta, self._params, now_s - self._arrival_s)
            self._num_open -= 1
            if self._num_open == 0:
                self._metrics.count_request(self._params, max(self._num_tokens))
        self._receiver.take(delta)

    def fail(self, error: Exception) -> None:
        self._num_open = 0
        self._receiver.fail(error)

    def abandon(self) -> None:
        """Count the choices that are still open as aborted. They must have been."""
        self._metrics.count_aborts(self._num_open)
        self._num_open = 0
