"""The main function of an engine process: the step loop, for front-ends in other processes."""

from __future__ import annotations

import logging
import os
import threading
import traceback

from tinyvllm.engine.engine_server import EngineServer
from tinyvllm.errors import TinyvllmError
from tinyvllm.processes import explain_limit
from tinyvllm.server import recordings
from tinyvllm.server.child import find, start_child
from tinyvllm.server.control import ChildLink, Message
from tinyvllm.server.endpoints import endpoint_of
from tinyvllm.server.output_queue import exit_now
from tinyvllm.server.specs import EngineSpec

log = logging.getLogger(__name__)

LAST_STEP_S = 1.0  # less than the supervisor waits


def main() -> None:
    """Never returns: the exit does not wait for threads and compiling processes, which the supervisor kills."""
    spec, link = start_child(EngineSpec)
    code = 1
    try:
        code = _EngineProcess(spec, link).run()
    except BaseException:
        log.critical("the engine ends with an unexpected error", exc_info=True)
    exit_now(code)


class _EngineProcess:
    """Runs the engine on the main thread, and hears the supervisor on that of the control link."""

    def __init__(self, spec: EngineSpec, link: ChildLink) -> None:
        self._spec = spec
        self._link = link
        self._is_ready = False
        if spec.cores is not None and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, spec.cores)  # before the device starts a thread for each
        self._server = EngineServer(spec.config, endpoint_of(spec.run_dir, spec.index))

    def run(self) -> int:
        """Load and serve until the supervisor says stop; returns the exit code."""
        self._link.watch(self._handle)
        try:
            self._server.run(self._report, lambda engine: self._announce(), find(self._spec.load))
        except TinyvllmError as error:
            if self._is_ready:
                log.critical("the engine stops", exc_info=error)
            self._link.send("failed", error=str(error))
            return 1
        except BaseException as error:
            advice = explain_limit(error)
            self._link.send("failed", error=advice or "".join(traceback.format_exception_only(error)).strip())
            if advice is None:
                raise
            return 1
        return 0

    def _report(self, stage: str, done: int, total: int) -> None:
        self._link.send("progress", stage=stage, done=done, total=total)

    def _announce(self) -> None:
        self._is_ready = True
        self._link.send("ready")

    def _end_soon(self) -> None:
        """End the process even if a step or a capture still runs. Its clients are gone, so nobody waits for it."""
        timer = threading.Timer(LAST_STEP_S, exit_now, (0,))
        timer.daemon = True
        timer.start()

    def _handle(self, message: Message) -> None:
        """Do what the supervisor says. On the link's thread."""
        match message["kind"]:
            case "stop":
                if not self._is_ready:  # nothing is lost, and loading could take minutes
                    exit_now(0)
                self._server.stop()
                self._end_soon()
            case "client_gone":
                self._server.drop_client(message["client"])
            case "question":
                self._link.send("answer", number=message["number"], answer=recordings.answer(message["question"]))


if __name__ == "__main__":
    main()
