"""`tinyvllm run-batch`: answer OpenAI batch files in this process.

https://platform.openai.com/docs/guides/batch - each line of the input is a request, each line of the output an answer.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

from typer import Exit, Option

from tinyvllm.cli.engine import ready_engine
from tinyvllm.cli.flags import EngineFlags, Model
from tinyvllm.cli.models import require_model
from tinyvllm.cli.terminal import err, progress_bars, read_stdin
from tinyvllm.errors import TinyvllmError
from tinyvllm.faults import reach
from tinyvllm.storage.catalog import DEFAULT_MODEL

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from tinyvllm.config import EngineConfig

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
AHEAD = 4  # requests submitted for each that can run at once, so that every step is full


@dataclass(frozen=True)
class BatchLine:
    """One request of the input."""

    custom_id: str
    url: str
    body: dict[str, Any]


def run_batch(
    *,
    model: Model = DEFAULT_MODEL,
    input_file: Annotated[
        str, Option("--input-file", "-i", metavar="FILE", help="JSONL, one request per line; - reads stdin.")
    ],
    output_file: Annotated[
        str,
        Option(
            "--output-file",
            "-o",
            metavar="FILE",
            help="JSONL, one answer per line, in the order of completion; - is stdout.",
        ),
    ] = "-",
    served_model_name: Annotated[
        str | None, Option(metavar="NAME", help="The model's name in the requests. [default: MODEL]")
    ] = None,
    engine: EngineFlags,
) -> None:
    """Answer a file of requests in OpenAI's batch format.

    No server is needed. Exits with code 1 if any request failed."""
    engine.apply()
    lines = read_batch(input_file)
    files = require_model(model, pull=engine.pull)
    config = engine.make_config(model, served_model_name=served_model_name or files.name)
    with open_output(output_file) as output:
        num_failed = asyncio.run(_answer_all(config, lines, output))
    err.print(f"{len(lines) - num_failed} answered, {num_failed} failed", highlight=False)
    if num_failed:
        raise Exit(1)


def open_output(file: str) -> IO[str]:
    try:
        return open(1 if file == "-" else file, "w", encoding="utf-8", closefd=file != "-")
    except OSError as error:
        raise TinyvllmError(f"--output-file {file} cannot be written: {error}") from error


def read_batch(file: str) -> list[BatchLine]:
    """All requests. Raises TinyvllmError with the number of the first invalid line, before a model is loaded."""
    try:
        text = read_stdin() if file == "-" else Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TinyvllmError(f"--input-file {file} cannot be read: {error}") from error
    lines = list(_read_lines(text, file))
    if not lines:
        raise TinyvllmError(f"--input-file {file} has no requests: write one per line")
    return lines


def _read_lines(text: str, file: str) -> Iterator[BatchLine]:
    seen: set[str] = set()
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue

        def refuse(what: str, number: int = number) -> TinyvllmError:
            return TinyvllmError(f"{file}, line {number}: {what}")

        try:
            request = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise refuse(f"it is not JSON: {error}") from None
        if not isinstance(request, dict) or not isinstance(request.get("custom_id"), str):
            raise refuse('give an object whose "custom_id" is a string')
        if request["custom_id"] in seen:
            raise refuse(f"the custom_id {request['custom_id']!r} is also used in an earlier line: each must be unique")
        if request.get("method", "POST") != "POST" or request.get("url") not in URLS:
            raise refuse(f"its method must be POST and its url one of {', '.join(URLS)}")
        body = request.get("body")
        if not isinstance(body, dict):
            raise refuse('give the request as "body", an object')
        if body.get("stream"):
            raise refuse("a batch does not stream: leave stream out of its body")
        seen.add(request["custom_id"])
        yield BatchLine(request["custom_id"], request["url"], body)


async def _answer_all(config: EngineConfig, lines: list[BatchLine], output: IO[str]) -> int:
    """Write the answers as they complete, one per line; return how many are errors."""
    from tinyvllm.server.app import make_app
    from tinyvllm.server.settings import ServerSettings

    engine = await ready_engine(config)
    settings = ServerSettings(max_num_queued_requests=None, idle_timeout_s=None, watchdog_timeout_s=None)
    app = make_app(engine, settings)
    places = asyncio.Semaphore(AHEAD * engine.capacity.max_num_seqs)
    num_done = num_failed = 0
    with progress_bars() as report:

        async def answer(line: BatchLine) -> None:
            nonlocal num_done, num_failed
            async with places:
                result = await _answer(app, line)
            num_failed += result["error"] is not None or result["response"]["status_code"] >= 400
            num_done += 1
            _write(output, result)
            report("requests", num_done, len(lines))

        try:
            async with asyncio.TaskGroup() as group:
                for line in lines:
                    group.create_task(answer(line))
        except* TinyvllmError as errors:
            raise errors.exceptions[0] from None
        finally:
            await engine.shutdown()
    return num_failed


def _write(output: IO[str], result: dict[str, Any]) -> None:
    """Write an answer, and flush it, so that finished answers survive a crash. Raises TinyvllmError."""
    try:
        reach("disk.batch")
        output.write(json.dumps(result, ensure_ascii=False) + "\n")
        output.flush()
    except OSError as error:
        raise TinyvllmError(f"the answers cannot be written to {output.name}: {error}") from error


async def _answer(app: ASGIApp, line: BatchLine) -> dict[str, Any]:
    from tinyvllm.server import in_process

    request_id = uuid.uuid4().hex
    status, body = await in_process.post(app, line.url, json.dumps(line.body).encode(), request_id)
    response = {"status_code": status, "request_id": request_id, "body": json.loads(body)}
    return {"id": f"batch_req_{request_id}", "custom_id": line.custom_id, "response": response, "error": None}
