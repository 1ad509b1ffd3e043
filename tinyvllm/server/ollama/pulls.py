"""Downloads of models for /api/pull, and their progress as lines of JSON."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass

from pydantic import BaseModel
from starlette.requests import Request

from tinyvllm.server.failures import UnknownModelError
from tinyvllm.server.ollama.wire import DEFAULT_TAG
from tinyvllm.server.openai.protocol.common import optional
from tinyvllm.server.request_limits import QueueFullError
from tinyvllm.storage.catalog import CATALOG
from tinyvllm.storage.pull import pull
from tinyvllm.storage.resolve import is_pullable, models_dir

log = logging.getLogger(__name__)

MAX_PULLS = 4  # at a time
REPEAT_S = 5.0  # a line is repeated after this long without news, because proxies close silent streams
HUB_PREFIXES = ("hf.co/", "huggingface.co/")  # with which Ollama's clients name the hub's models


class Progress(BaseModel):
    """A line of progress."""

    status: str
    digest: str | None = optional()
    total: int | None = optional()
    completed: int | None = optional()


def pulled_name(name: str) -> str:
    """The name by which storage knows a model. Raises UnknownModelError if it cannot be downloaded."""
    plain = name.removesuffix(DEFAULT_TAG)
    for prefix in HUB_PREFIXES:
        plain = plain.removeprefix(prefix)
    if not is_pullable(plain):
        known = ", ".join(CATALOG)
        raise UnknownModelError(
            f"model {name!a:.200} not found: this server pulls {known}, and org/name (without a tag) from the Hugging "
            "Face hub"
        )
    return plain


@dataclass(frozen=True)
class _Stage:
    name: str  # of storage.pull: "download" or "check"
    done: int
    total: int


class Pull:
    """One download, on a thread of its own. It continues when its followers leave, so that others may follow it later.

    Used on the event loop, except for methods whose names say that they run on the thread."""

    def __init__(self, name: str) -> None:
        self.name = name
        entry = CATALOG.get(name)
        self._terms = "" if entry is None else entry.terms
        # of the file that is downloaded; of a repository with several files, only a name for clients' progress bars
        self._digest = hashlib.sha256(name.encode()).hexdigest() if entry is None else entry.sha256
        self._loop = asyncio.get_running_loop()
        self._stage: _Stage | None = None
        self._news = asyncio.Event()
        self.done: asyncio.Future[None] = self._loop.create_future()
        self.done.add_done_callback(lambda future: future.exception())  # there may be no follower who retrieves it
        threading.Thread(target=self._run_on_thread, name=f"pull-{name}", daemon=True).start()

    def _run_on_thread(self) -> None:
        error: BaseException | None = None
        try:
            pull(self.name, models_dir(), self._report_on_thread)
        except BaseException as raised:
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has stopped
            self._loop.call_soon_threadsafe(self._end, error)

    def _report_on_thread(self, stage: str, done: int, total: int) -> None:
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._note, _Stage(stage, done, total))

    def _note(self, stage: _Stage) -> None:
        self._stage = stage
        self._tell()

    def _end(self, error: BaseException | None) -> None:
        if error is None:
            log.info("pulled %s", self.name)
            self.done.set_result(None)
        else:
            log.warning("could not pull %s: %s", self.name, error)
            self.done.set_exception(error)
        self._tell()

    def _tell(self) -> None:
        """Wake all followers, each of which then waits for the next event."""
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def follow(self) -> AsyncIterator[Progress]:
        """Lines of progress until the model is there. Raises what the download raises."""
        yield Progress(status="pulling manifest")
        if self._terms:
            yield Progress(status=self._terms)
        latest: _Stage | None = None
        while not self.done.done():
            news = self._news
            if self._stage is not None and self._stage != latest:
                if line := self._line(self._stage, latest):
                    yield line
                latest = self._stage
                continue
            try:
                await asyncio.wait_for(news.wait(), REPEAT_S)
            except TimeoutError:
                yield Progress(status="pulling manifest") if latest is None else self._downloading(latest)
        self.done.result()
        yield Progress(status="writing manifest")

    def _line(self, stage: _Stage, earlier: _Stage | None) -> Progress | None:
        if stage.name == "download":
            return self._downloading(stage)
        is_first = earlier is None or earlier.name == "download"
        return Progress(status="verifying sha256 digest") if is_first else None

    def _downloading(self, stage: _Stage) -> Progress:
        if stage.name != "download":
            return Progress(status="verifying sha256 digest")
        digest = f"sha256:{self._digest}"
        return Progress(
            status=f"pulling {self._digest[:12]}", digest=digest, total=stage.total or None, completed=stage.done
        )


class Pulls:
    """The downloads of one app that are running."""

    def __init__(self) -> None:
        self._running: dict[str, Pull] = {}

    def start(self, name: str) -> Pull:
        """The download of `name`, which may be running already. Raises QueueFullError if too many others are."""
        found = self._running.get(name)
        if found is not None:
            return found
        if len(self._running) >= MAX_PULLS:
            raise QueueFullError(f"{MAX_PULLS} models are being pulled, and no more may be at a time: try again later")
        started = self._running[name] = Pull(name)
        started.done.add_done_callback(lambda _: self._running.pop(name))
        return started


def pulls_of(request: Request) -> Pulls:
    state = request.app.state
    if not hasattr(state, "pulls"):
        state.pulls = Pulls()
    pulls: Pulls = state.pulls
    return pulls
