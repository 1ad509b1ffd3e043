"""Where the engine processes of a server listen."""

from __future__ import annotations

from tinyvllm.engine.process_host import Endpoint


def endpoint_of(run_dir: str, engine: int) -> Endpoint:
    """Where an engine listens, and where its stats are."""
    return Endpoint(f"ipc://{run_dir}/engine-{engine}", f"{run_dir}/engine-{engine}.stats")
