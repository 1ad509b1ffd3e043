"""Run the door: several models at one address."""

from __future__ import annotations

import socket
from collections.abc import Callable

import uvicorn

from tinyvllm.door.app import DoorState, make_door_app
from tinyvllm.door.fleet import Fleet, Plan
from tinyvllm.door.settings import DoorSettings
from tinyvllm.server.run_directory import run_directory
from tinyvllm.server.serve import DrainingServer, uvicorn_config
from tinyvllm.server.sockets import TlsFiles, end_silent_peers
from tinyvllm.server.stop_clock import StopClock


async def serve_door(
    settings: DoorSettings,
    plan: Plan,
    sock: socket.socket,
    *,
    on_serving: Callable[[DoorServer], None],
    tls: TlsFiles | None = None,
    access_log: bool = True,
    clock: StopClock | None = None,
) -> None:
    """Serve on `sock` until a stop signal; then let running requests go on for the shutdown timeout, and end every
    model. A second signal ends them at once. on_serving: called when requests are accepted. clock: limits the time of
    the stop."""
    with run_directory() as directory:
        fleet = Fleet(settings, plan, directory)
        app = make_door_app(fleet, plan.settings)
        end_silent_peers(sock, plan.settings.idle_timeout_s)
        server = DoorServer(uvicorn_config(app, tls, access_log=access_log), app.state.server, on_serving, clock)
        try:
            await server.serve(sockets=[sock])
        finally:
            await fleet.close()


class DoorServer(DrainingServer):
    """The server in front of the fleet."""

    def __init__(
        self,
        config: uvicorn.Config,
        state: DoorState,
        on_serving: Callable[[DoorServer], None],
        clock: StopClock | None = None,
    ) -> None:
        super().__init__(config, state.drain, state.settings, clock=clock)
        self.state = state
        self._on_serving = on_serving

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.state.fleet.start()
        self._on_serving(self)

    def observe(self) -> None:
        self.state.metrics.process.observe(len(self.server_state.connections))
        if self.drain.has_begun:
            self.state.fleet.refuse_waiting()

    async def end_work(self) -> None:
        await self.state.fleet.close()
