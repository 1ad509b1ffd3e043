"""An engine process without an engine, for the supervisor's tests: it loads, is ready, and does what it is told."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

from tinyvllm.server.child import start_child
from tinyvllm.server.control import Message
from tinyvllm.server.specs import EngineSpec


def main() -> None:
    spec, link = start_child(EngineSpec)
    stopped = threading.Event()
    heard = Path(spec.run_dir) / f"heard-{spec.index}"

    def handle(message: Message) -> None:
        match message["kind"]:
            case "stop":
                stopped.set()
            case "client_gone":
                with heard.open("a") as file:
                    file.write(f"{message['client']}\n")
            case "question":
                link.send("answer", number=message["number"], answer={"pid": os.getpid()})

    link.watch(handle)
    link.send("progress", stage="load", done=1, total=1)
    if spec.load == "fails":
        link.send("failed", error="the model cannot be loaded")
        raise SystemExit(1)
    if spec.load == "slow second" and spec.index == 1:
        while not (Path(spec.config.model) / "load").exists():
            time.sleep(0.01)
    if spec.load == "forks" and os.fork() == 0:
        while True:  # holds the link's other end, and ignores SIGTERM like its parent
            signal.pause()
    link.send("ready")
    (Path(spec.config.model) / f"ready {spec.index}").touch()  # the supervisor reads this before it sees an end
    stopped.wait()
    if spec.load == "hangs":
        signal.pause()


if __name__ == "__main__":
    main()
