"""Limits the time that stopping takes, whatever hangs: a step, a thread, a client, Python's own clean-up."""

from __future__ import annotations

import faulthandler
import logging
import os
import threading
import time
from collections.abc import Callable

from tinyvllm.server.output_queue import FLUSH_S, exit_now, show_stacks_now

log = logging.getLogger(__name__)

END_S = 4.0  # from the drain's end until the process is terminated; its last lines may take FLUSH_S
HASTE_S = 2.5  # the same, after a second signal


class StopClock:
    """Ends the process if it has not ended in time after a stop signal. A third signal ends it at once.

    Each process that handles signals has one. It is never stopped, because it also guards the end of the process."""

    def __init__(self, extra_s: float = 0.0) -> None:
        """extra_s: additional time for work after the server has stopped, such as writing a recording."""
        self._extra_s = extra_s
        self._is_on = True
        self._num_signals = 0
        self._changed = threading.Condition()
        self._end_s: float | None = None  # monotonic clock
        self._limit_s = 0.0
        self._before_end: Callable[[], None] = lambda: None

    @classmethod
    def without_end(cls) -> StopClock:
        """A clock that never ends the process, for servers inside another program."""
        clock = cls()
        clock._is_on = False
        return clock

    def before_end(self, call: Callable[[], None]) -> None:
        """Run `call`, which must be quick, before the process is terminated."""
        self._before_end = call

    def on_signal(self, drain_s: float) -> None:
        """A stop signal has arrived. drain_s: how long running requests may continue after the first one."""
        self._num_signals += 1
        if not self._is_on:
            return
        if self._num_signals == 1:
            self._allow(drain_s + END_S + self._extra_s)
        elif self._num_signals == 2:
            self._allow(HASTE_S)
        else:
            self._before_end()
            exit_now(1)

    def _allow(self, seconds: float) -> None:
        with self._changed:
            is_first, self._limit_s, self._end_s = self._end_s is None, seconds, time.monotonic() + seconds
            self._changed.notify()
        # in C, for when a thread never releases the interpreter
        with open(os.devnull, "w") as nowhere:
            faulthandler.dump_traceback_later(seconds + 2 * FLUSH_S, exit=True, file=os.dup(nowhere.fileno()))
        if is_first:
            threading.Thread(target=self._run, name="tinyvllm-stop-clock", daemon=True).start()

    def _run(self) -> None:
        with self._changed:
            while self._end_s is not None and (left_s := self._end_s - time.monotonic()) > 0:
                self._changed.wait(left_s)
        log.critical("the server has not stopped within %g s: terminating the process", self._limit_s)
        show_stacks_now()
        self._before_end()
        exit_now(1)
