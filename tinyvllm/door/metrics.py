"""GET /metrics of the door: its own metrics, and those of every loaded model with the label model_name."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tinyvllm.door.policy import State
from tinyvllm.server.counters import Family
from tinyvllm.server.front_ends import FrontEnds
from tinyvllm.server.metrics import HTTP_DURATION, HTTP_METHODS, HTTP_REQUESTS, REFUSALS, UNCOUNTED_PATHS
from tinyvllm.server.process_metrics import ProcessesCollector, ProcessMetrics
from tinyvllm.server.relay import PeerGoneError, fetch

if TYPE_CHECKING:
    from tinyvllm.door.fleet import Fleet

REFUSED = Family("tinyvllm:requests_refused", "Requests that were not answered.", "counter", ("reason",))
SHOWN_STATES = ("unloaded", "loading", "ready", "ending")

_SAMPLE = re.compile(r"(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>.*)\})? (?P<value>\S+.*)")


class DoorMetrics:
    """Owns the door's registry. Requests that a model's server answers are counted there."""

    def __init__(self, fleet: Fleet, front_ends: FrontEnds) -> None:
        self._fleet = fleet
        self._counters = front_ends.counters
        self._registry = CollectorRegistry()
        self._registry.register(self._counters)
        self._registry.register(ModelsCollector(fleet))
        self._registry.register(ProcessesCollector(front_ends.pids))
        self.process = ProcessMetrics(front_ends)

    async def render(self) -> bytes:
        children = self._fleet.loaded()
        found = await asyncio.gather(
            *(fetch(child.uds, "/metrics") for child in children.values()), return_exceptions=True
        )
        texts = {"": generate_latest(self._registry).decode()}
        for name, text in zip(children, found, strict=True):
            if isinstance(text, bytes):
                texts[name] = text.decode()
            elif not isinstance(text, PeerGoneError):  # it has just ended
                raise text
        return merge(texts).encode()

    def count_http(self, method: str, handler: str, status: int, duration_s: float) -> None:
        if handler not in UNCOUNTED_PATHS:
            method = method if method in HTTP_METHODS else "other"
            self._counters.value(HTTP_REQUESTS, (handler, method, f"{status // 100}xx")).inc()
            self._counters.histogram(HTTP_DURATION, (handler, method)).observe(duration_s)

    def count_refusal(self, status: int) -> None:
        self._counters.value(REFUSED, (REFUSALS.get(status, "other"),)).inc()


class ModelsCollector(Collector):
    """The states and counts of the door's models."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        labels = ["model_name"]
        state = GaugeMetricFamily("tinyvllm:model_state", "1 for the model's state.", labels=[*labels, "state"])
        waiting = GaugeMetricFamily("tinyvllm:model_requests_waiting", "Requests that wait for a model.", labels=labels)
        running = GaugeMetricFamily("tinyvllm:model_requests_running", "Requests that a model answers.", labels=labels)
        loads = CounterMetricFamily("tinyvllm:model_loads", "Loads of a model.", labels=labels)
        failed = CounterMetricFamily("tinyvllm:model_failed_loads", "Loads that failed.", labels=labels)
        seconds = CounterMetricFamily("tinyvllm:model_load_seconds", "Time that loads took.", labels=labels)
        unloads = CounterMetricFamily("tinyvllm:model_unloads", "Unloads and deaths.", labels=[*labels, "reason"])
        for name, counts in self._fleet.counts.items():
            shown = _shown(self._fleet.state_of(name))
            for each in SHOWN_STATES:
                state.add_metric([name, each], float(shown == each))
            waiting.add_metric([name], self._fleet.num_waiting(name))
            running.add_metric([name], self._fleet.num_running(name))
            loads.add_metric([name], counts.loads)
            failed.add_metric([name], counts.failed_loads)
            seconds.add_metric([name], counts.load_s)
            for reason, count in counts.unloads.items():
                unloads.add_metric([name, reason], count)
        yield from (state, waiting, running, loads, failed, seconds, unloads)


def _shown(state: State) -> str:
    return state.value if state.value in SHOWN_STATES else "loading"


def merge(texts: Mapping[str, str]) -> str:
    """Merge the expositions of several models: each family once, each sample with its model's name. Those of the model
    "" are the door's own, and stay unchanged."""
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for model, text in texts.items():
        family = ""
        for line in text.splitlines():
            if line.startswith("# "):
                family = line.split(" ", 3)[2]
                head = heads.setdefault(family, [])
                if len(head) < 2 and line.split(" ", 2)[1] not in (other.split(" ", 2)[1] for other in head):
                    head.append(line)
            elif line:
                samples.setdefault(family, []).append(_labeled(line, model))
    lines = [line for family in heads for line in (*heads[family], *samples.get(family, ()))]
    return "\n".join(lines) + "\n"


def _labeled(line: str, model: str) -> str:
    found = _SAMPLE.fullmatch(line)
    if not model or found is None or 'model_name="' in (found["labels"] or ""):
        return line
    quoted = model.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    labels = ",".join(filter(None, (found["labels"], f'model_name="{quoted}"')))
    return f"{found['name']}{{{labels}}} {found['value']}"
