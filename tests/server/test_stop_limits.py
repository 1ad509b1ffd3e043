"""How long a stop may take, by the limits of its parts: those that tests wait for are longer (tests/patience.py)."""

from __future__ import annotations

from tests.patience import users_limit
from tinyvllm.server.output_queue import FLUSH_S

PROMISED_S = 5  # after --shutdown-timeout, in docs/SERVING.md


def test_what_ends_a_stop_adds_up_to_what_is_promised() -> None:
    clock_s = users_limit("tinyvllm.server.stop_clock", "END_S")
    assert clock_s + 2 * FLUSH_S <= PROMISED_S
    assert users_limit("tinyvllm.server.stop_clock", "HASTE_S") < clock_s
    assert users_limit("tinyvllm.server.serve", "ENGINE_END_S") < clock_s
    parts = [users_limit("tinyvllm.server.supervisor", name) for name in ("FRONT_ENDS_END_S", "ENGINES_END_S")]
    assert sum(parts) < clock_s
    assert users_limit("tinyvllm.server.supervisor", "HASTE_S") < min(parts)
