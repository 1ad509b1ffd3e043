"""Running an agent's command line: a home and a project of its own, and no network but loopback."""

from __future__ import annotations

import contextlib
import os
import shutil
import socketserver
import subprocess
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

DIRECTORY_VARIABLE = "TINYVLLM_AGENTS"  # environment variable: where scripts/fetch_agents.sh installed the agents
TIMEOUT_S = 100.0


@dataclass(frozen=True)
class Ended:
    """A command that ended."""

    status: int
    output: str
    errors: str


@dataclass(frozen=True)
class Agent:
    """An agent's program, and the folders of one run."""

    program: Path
    home: Path
    project: Path  # the working directory
    environment: dict[str, str] = field(default_factory=dict)  # beyond that of every agent

    @property
    def folders(self) -> dict[str, str]:
        """Stand-ins for the run's folders in recorded requests."""
        return {str(self.project): "/project", str(self.home): "/home/user"}

    def variables(self, proxy: str) -> dict[str, str]:
        """The environment, which has nothing of the tests' own but PATH. proxy: where the network would be."""
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.home),
            "XDG_CONFIG_HOME": str(self.home / "config"),
            "XDG_DATA_HOME": str(self.home / "data"),
            "XDG_STATE_HOME": str(self.home / "state"),
            "XDG_CACHE_HOME": str(self.home / "cache"),
            "TERM": "dumb",
            "LANG": "C.UTF-8",
            "TZ": "UTC",
            "HTTP_PROXY": proxy,
            "HTTPS_PROXY": proxy,
            "NO_PROXY": "127.0.0.1,localhost",
            **self.environment,
        }
        return environment | {name.lower(): environment[name] for name in ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")}

    def run(self, *arguments: str, proxy: str) -> Ended:
        """Run to the end. proxy: where the network would be."""
        done = subprocess.run(
            [str(self.program), *arguments],
            cwd=self.project,
            env=self.variables(proxy),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        return Ended(done.returncode, done.stdout, done.stderr)


def find_program(name: str) -> Path:
    """The program that scripts/fetch_agents.sh installed, else the one on PATH. Skips the test if there is neither."""
    directory = os.environ.get(DIRECTORY_VARIABLE)
    if directory is not None:
        for path in (Path(directory) / "node_modules" / ".bin" / name, Path(directory) / name / "bin" / name):
            if path.exists():
                return path
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed: scripts/fetch_agents.sh DIR, then {DIRECTORY_VARIABLE}=DIR")
    return Path(found)


def make_agent(name: str, folder: Path, environment: Mapping[str, str]) -> Agent:
    """An agent with an empty home and an empty project in `folder`."""
    home, project = folder / "home", folder / "project"
    home.mkdir()
    project.mkdir()
    return Agent(find_program(name), home, project, dict(environment))


class _Refusal(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        line = self.rfile.readline(4096).decode(errors="replace").split()
        self.server.wanted.append(" ".join(line[:2]))  # type: ignore[attr-defined]
        with contextlib.suppress(OSError):
            self.wfile.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")


@dataclass(frozen=True)
class NoNetwork:
    """A proxy that refuses everything."""

    url: str
    wanted: list[str]  # the first two words of each request: "CONNECT example.com:443"


@contextlib.contextmanager
def no_network() -> Iterator[NoNetwork]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Refusal) as server:
        server.daemon_threads = True
        server.wanted = []  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield NoNetwork(f"http://127.0.0.1:{server.server_address[1]}", server.wanted)  # type: ignore[attr-defined]
        finally:
            server.shutdown()
            thread.join()
