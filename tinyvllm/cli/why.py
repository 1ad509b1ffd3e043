"""`tinyvllm why`: where the time of one request to a running server went."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from tinyvllm.cli.bench_flags import print_table, write_file
from tinyvllm.errors import TinyvllmError

if TYPE_CHECKING:
    from rich.console import RenderableType

BAR_CELLS = 40
LEAST_MS = 0.005  # of a stage that has a line
EIGHTHS = " ▏▎▍▌▋▊▉█"


def why(
    request_id: Annotated[
        str | None,
        Argument(
            metavar="[REQUEST_ID]",
            help="The x-request-id header of the answer, or the id in its body.",
            show_default=False,
        ),
    ] = None,
    *,
    url: Annotated[
        str, Option(metavar="URL", help="The server's address: http://HOST:PORT, https://HOST:PORT or unix:/PATH.")
    ] = "http://127.0.0.1:8000",
    api_key: Annotated[
        str | None, Option(metavar="KEY", envvar="OPENAI_API_KEY", help="Sent as a bearer token.", show_envvar=True)
    ] = None,
    last: Annotated[
        int | None, Option(metavar="N", min=1, help="List the latest N requests. [default: 20]", show_default=False)
    ] = None,
    slowest: Annotated[
        int | None, Option(metavar="N", min=1, help="List the slowest N of the requests that the server keeps.")
    ] = None,
    json_file: Annotated[
        str | None, Option("--json", metavar="FILE", help="Write the server's answer as JSON; -: on stdout.")
    ] = None,
) -> None:
    """Show where the time of a request went, as a waterfall with a verdict.

    Without REQUEST_ID, list requests. Each process of a server that answers requests keeps its latest 1,024; nothing
    needs to be turned on."""
    if request_id is not None and (last is not None or slowest is not None):
        raise TinyvllmError("--last and --slowest list requests: leave out the id, or the flags")
    path, query = "/requests", {}
    if request_id is not None:
        from urllib.parse import quote

        path = f"/requests/{quote(request_id, safe='', errors='surrogateescape')}"
    elif slowest is not None:
        query = {"slowest": slowest}
    elif last is not None:
        query = {"last": last}
    answer = _get(url.rstrip("/").removesuffix("/v1"), api_key, path, query)
    if json_file == "-":
        print(json.dumps(answer))
        return
    if json_file is not None:
        write_file(json_file, json.dumps(answer) + "\n")
    print_table(request_list(answer["requests"]) if request_id is None else waterfall(answer))


def _get(url: str, api_key: str | None, path: str, query: dict[str, int]) -> Any:
    """The answer of a running server. Raises TinyvllmError if no server answers, or if it refuses."""
    import httpx

    from tinyvllm.bench.load import Target
    from tinyvllm.bench.load_measure import make_client
    from tinyvllm.bench.load_stream import describe_error

    try:
        with make_client(Target(url=url, model="", api_key=api_key, timeout_s=30.0)) as client:
            response = client.get(path, params=query)
    except httpx.HTTPError as error:
        raise TinyvllmError(
            f"no server answers at {url} ({type(error).__name__} {error}): start one with tinyvllm serve, or give the "
            "address of yours with --url"
        ) from error
    except (UnicodeError, httpx.InvalidURL) as error:
        raise TinyvllmError(f"--url or --api-key has a character that HTTP does not allow: {error}") from error
    if response.status_code != 200:
        raise TinyvllmError(f"{url}{path} answered {describe_error(response.status_code, response.content)}")
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if not isinstance(answer, dict) or not ("requests" in answer or "stages" in answer):
        raise TinyvllmError(f"{url}{path} did not answer with requests: is it a tinyvllm server?")
    return answer


def request_list(requests: list[dict[str, Any]]) -> RenderableType:
    """One line for each request."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    if not requests:
        return Text("the server has answered no request since its start")
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("request", no_wrap=True)
    for column in ("at", "status", "total ms", "prompt", "cached", "output"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("mostly", no_wrap=True)
    for one in requests:
        table.add_row(
            one["id"],
            time.strftime("%H:%M:%S", time.localtime(one["started_at"])),
            str(one["status"]),
            f"{one['total_ms']:,.1f}",
            f"{one['prompt_tokens']:,}",
            f"{one['cached_tokens']:,}",
            f"{one['output_tokens']:,}",
            f"{one['verdict']['name']} ({one['verdict']['share']:.0%})",
        )
    return Group(table, Text("tinyvllm why REQUEST_ID shows one of them stage by stage"))


def waterfall(request: dict[str, Any]) -> RenderableType:
    """The stages in order of time, each with a bar at its place."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    total_ms, place_ms = max(request["total_ms"], 1e-9), 0.0
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("phase", "stage"):
        table.add_column(column, no_wrap=True)
    for column in ("ms", "share"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column(f"{total_ms:,.1f} ms", no_wrap=True)
    shown = ""
    for stage in request["stages"]:
        phase = "" if stage["phase"] == shown else stage["phase"]
        start_ms, place_ms = place_ms, place_ms + stage["ms"]
        if stage["ms"] < LEAST_MS:
            continue
        shown = stage["phase"]
        bar = draw_bar(start_ms / total_ms, stage["ms"] / total_ms)
        table.add_row(phase, stage["stage"], f"{stage['ms']:,.2f}", f"{stage['ms'] / total_ms:.1%}", bar)
    verdict = request["verdict"]
    return Group(
        Text.assemble((f"verdict: {verdict['name']}", "bold"), f" ({verdict['share']:.0%}) - {verdict['because']}"),
        Text(_describe(request)),
        Text(""),
        table,
        Text(""),
        Text("Within `queue`, `first token` and `further tokens`, stages take turns; each bar has their sum."),
    )


def _describe(request: dict[str, Any]) -> str:
    """The request in a line."""
    times = "once" if request["chunks"] == 1 else f"in {request['chunks']} steps"
    parts = [
        f"{request['id']}: {request['route']}, {request['status']}",
        f"prompt {request['prompt_tokens']:,} tokens, {request['cached_tokens']:,} of them cached, computed {times}",
        f"output {request['output_tokens']:,} tokens ({request['finish_reason'] or 'no end'})",
    ]
    if request["draft_tokens"]:
        parts.append(f"{request['accepted_tokens']} of {request['draft_tokens']} drafted tokens accepted")
    if request["preemptions"]:
        parts.append(f"preempted {request['preemptions']} times")
    if request["process"]:
        parts.append(f"answered by {request['process']}")
    return "; ".join(parts)


def draw_bar(start: float, share: float) -> str:
    """A bar from `start` on, both as shares of the whole width. At least an eighth of a cell."""
    cells = min(int(start * BAR_CELLS), BAR_CELLS - 1)
    eighths = max(1, min(round(share * BAR_CELLS * 8), (BAR_CELLS - cells) * 8))
    return " " * cells + EIGHTHS[8] * (eighths // 8) + EIGHTHS[eighths % 8].strip()
