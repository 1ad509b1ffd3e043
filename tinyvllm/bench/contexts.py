"""How a decode step grows with the context, and attention's share of it: one run over several contexts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tinyvllm.bench.latency import Case, LatencyWork, make_requests
from tinyvllm.bench.rows import Machine
from tinyvllm.bench.runs import CONTEXTS
from tinyvllm.bench.tables import MIB, format_number, make_title
from tinyvllm.execution.cost import StepCost
from tinyvllm.profiling.kernels import StepProfile
from tinyvllm.scheduling.plan import Scheduled, StepPlan

ATTENTION = "attention"  # the operation's name; its projections are others
Report = Callable[[str, int, int], None]


class Inspector(Protocol):
    """The part of execution.inspector.RunnerInspector that is used here."""

    @property
    def runner(self) -> Any: ...

    def cost(self, plan: StepPlan) -> StepCost: ...

    def profile(self, plan: StepPlan, *, repeats: int, warmup: int) -> StepProfile: ...

    def fill_pool(self, num_blocks: int, seed: int) -> None: ...


@dataclass(frozen=True)
class ContextRow:
    """A decode step at one context. `attention_share`: of the time of all kernels, timed one by one; `attention_ms`:
    that share of the step as served."""

    batch: int
    context: int
    step_ms: float
    attention_share: float
    kv_bytes: int  # read and written
    nbytes: int  # the minimum of the step

    @property
    def attention_ms(self) -> float:
        return self.attention_share * self.step_ms

    def as_json(self) -> dict[str, Any]:
        return {
            "kind": CONTEXTS,
            "batch": self.batch,
            "context": self.context,
            "step_ms": self.step_ms,
            "attention_share": self.attention_share,
            "attention_ms": self.attention_ms,
            "tok_s": 1e3 * self.batch / self.step_ms,
            "kv_bytes": self.kv_bytes,
            "bytes": self.nbytes,
        }


def measure_contexts(inspector: Inspector, work: LatencyWork, report: Report) -> list[ContextRow]:
    """A row for each of the work's cases, which decode."""
    runner = inspector.runner
    size = runner.capacity.block_size
    inspector.fill_pool(1 + max(work.num_blocks(case, size) for case in work.cases), work.seed)
    rows = []
    for number, case in enumerate(work.cases):
        report("measure", number, len(work.cases))
        requests = make_requests(runner, work, case)
        plan = StepPlan(tuple(Scheduled(request, request.num_tokens - 1, 1) for request in requests))
        rows.append(_row(inspector, work, case, plan))
    report("measure", len(work.cases), len(work.cases))
    return rows


def _row(inspector: Inspector, work: LatencyWork, case: Case, plan: StepPlan) -> ContextRow:
    profile = inspector.profile(plan, repeats=work.num_repeats, warmup=work.num_warmup)
    cost = inspector.cost(plan)
    attention_s = sum(kernel.seconds for kernel in profile.kernels if kernel.operation == ATTENTION)
    return ContextRow(
        batch=case.batch,
        context=case.length,
        step_ms=profile.step_s * 1e3,
        attention_share=attention_s / profile.kernels_s if profile.kernels_s else 0.0,
        kv_bytes=cost.kv_read_bytes + cost.kv_written_bytes,
        nbytes=cost.nbytes,
    )


def contexts_table(machine: Machine, rows: Sequence[ContextRow]) -> RenderableType:
    """One line per context and batch."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    columns = ("batch", "context", "step ms", "attention ms", "share", "rest ms", "KV MiB", "of bytes", "t/s")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            str(row.batch),
            f"{row.context:,}",
            f"{row.step_ms:,.3f}",
            f"{row.attention_ms:,.3f}",
            f"{row.attention_share:.1%}",
            f"{row.step_ms - row.attention_ms:,.3f}",
            f"{row.kv_bytes / MIB:,.2f}",
            f"{row.kv_bytes / row.nbytes:.1%}",
            format_number(1e3 * row.batch / row.step_ms),
        )
    note = "share: of all kernels' time, kernel by kernel; attention ms: that share of the step as served"
    return Group(Text(make_title(machine), style="bold"), table, Text(note))
