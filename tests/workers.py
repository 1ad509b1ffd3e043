"""Which of pytest-xdist's workers runs what: scripts/test.sh uses one worker a core."""

from __future__ import annotations

from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

METAL = "tests/metal"  # one unit: its tests share a process (tests/metal/conftest.py)

# By the time they take, so that no worker begins a long file when the others are done. What is not here is shorter.
LONGEST_FIRST = (
    METAL,
    "tests/families/test_tiny.py",
    "tests/test_end_to_end.py",
    "tests/execution/test_mtp.py",
    "tests/engine/test_capture.py",
    "tests/server/test_supervisor.py",
    "tests/families/test_mlx.py",
    "tests/ops/sampling/test_logits_processing.py",
    "tests/ops/formats/test_formats.py",
    "tests/ops/gpu/test_fused.py",
    "tests/ops/sampling/test_sample.py",
    "tests/execution/test_tracing.py",
    "tests/ops/gpu/test_prefill.py",
    "tests/ops/test_attention.py",
    "tests/ops/cpu/test_cores.py",
    "tests/execution/test_captures.py",
    "tests/ops/test_rendering.py",
    "tests/engine/test_adapters.py",
    "tests/door/test_real_models.py",
    "tests/bench/test_breakdown.py",
    "tests/execution/test_tune.py",
    "tests/execution/test_expert_loads.py",
    "tests/execution/test_start.py",
    "tests/execution/test_early_traces.py",
    "tests/execution/test_profile.py",
    "tests/families/test_rendering.py",
    "tests/families/test_kernels_a_layer.py",
    "tests/families/test_step_counts.py",
    "tests/ops/gpu/test_quantized_stream.py",
    "tests/ops/test_kv_formats.py",
    "tests/cli/test_terminal.py",
    "tests/engine/test_conversations.py",
    "tests/bench/test_load.py",
    "tests/server/test_adapters.py",
    "tests/faults/test_device.py",
    "tests/families/test_gemma3_270m.py",
)


class FileScheduler(LoadScopeScheduling):
    """Gives a worker a file at a time, because a file's tests share fixtures; the longest first."""

    def __init__(self, config: pytest.Config, log: Any = None) -> None:
        super().__init__(config, log)
        self._is_sorted = False

    def _split_scope(self, nodeid: str) -> str:
        return METAL if nodeid.startswith(f"{METAL}/") else nodeid.split("::", 1)[0]

    def _assign_work_unit(self, node: Any) -> None:
        if not self._is_sorted:
            ranks = {scope: rank for rank, scope in enumerate(LONGEST_FIRST)}
            for scope in sorted(self.workqueue, key=lambda scope: ranks.get(scope, len(ranks))):  # a stable sort
                self.workqueue.move_to_end(scope)
            self._is_sorted = True
        super()._assign_work_unit(node)

    def remove_node(self, node: Any) -> str | None:
        """Take a worker's files back. Returns the test that ended it, if one did: that test is not run again.

        Its completed files are forgotten: a worker that was given one again would have nothing to report, and the run
        would never end.
        """
        units = self.assigned_work[node]
        ended = next((nodeid for unit in units.values() for nodeid, is_done in unit.items() if not is_done), None)
        for unit in units.values():
            if ended in unit:
                unit[ended] = True
        for scope in [scope for scope, unit in units.items() if all(unit.values())]:
            del units[scope]
        super().remove_node(node)
        return ended
