"""Recorded requests of agents as test data: without personal details, and without the agents' own long texts.

A file in data/ has the agent's name and version, and its requests in order. What identifies a machine, a user or a
moment has a stand-in. Descriptions, and texts of more than MAX_TEXT characters, belong to the agents' authors, so the
file has their length alone, as {"$filler": length}, for which `load` puts a text of that length.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.agents.recorder import Request

DATA = Path(__file__).parent / "data"
RECORD_VARIABLE = "TINYVLLM_RECORD_AGENTS"  # environment variable: if set, the agents' tests write data/ anew
MAX_TEXT = 60
FILLER = "$filler"

# A script's arguments, and what a schema or a grammar (of Codex, Apache License 2.0) defines.
_KEPT_KEYS = frozenset({"arguments", "input", "$schema", "pattern", "definition"})
_KEPT_START = "x-anthropic-billing-header:"
_IDS = re.compile(
    r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"  # a UUID
    r"|[0-9a-f]{20,}"
    r"|(?<=[a-z]_)(?=[A-Za-z]*[0-9])[0-9A-Za-z]{20,}"  # toolu_01Abc…
)
_DATE = re.compile(r"20\d\d-\d\d-\d\d")
_PLATFORM = re.compile(r"\([^)]*(?:x86|amd64|arm64|aarch64)[^)]*\)")


@dataclass(frozen=True)
class Recording:
    agent: str
    version: str
    requests: tuple[Request, ...]


class Scrubber:
    """Puts stand-ins for what is personal. Equal ids get equal stand-ins, across all requests of one recording."""

    def __init__(self, folders: dict[str, str]) -> None:
        self._folders = folders  # path -> stand-in; a path that begins with another comes before it
        self._ids: dict[str, str] = {}

    def request(self, request: Request) -> dict[str, Any]:
        headers = {name: _PLATFORM.sub("(platform)", value) for name, value in request.headers.items()}
        return {**request.sent(), "headers": headers, "body": self.scrub(request.body)}

    def scrub(self, value: Any, key: str = "") -> Any:
        """`value` of the field `key` for a file of recorded requests."""
        if isinstance(value, dict):
            return {name: self.scrub(inner, name) for name, inner in value.items()}
        if isinstance(value, list):
            return [self.scrub(inner, key) for inner in value]
        if not isinstance(value, str):
            return value
        is_kept = key in _KEPT_KEYS or value.startswith(_KEPT_START)
        if key == "description" or (len(value) > MAX_TEXT and not is_kept):
            return {FILLER: len(value)}
        for folder, name in self._folders.items():
            value = value.replace(folder, name)
        return _DATE.sub("2026-01-01", _IDS.sub(self._stand_in, value))

    def _stand_in(self, match: re.Match[str]) -> str:
        text = match[0]
        if text not in self._ids:
            number = f"{len(self._ids) + 1}"
            zeros = re.sub(r"[0-9A-Za-z]", "0", text)
            self._ids[text] = zeros[: -len(number)] + number
        return self._ids[text]


def record(agent: str, version: str, requests: Iterable[Request], folders: dict[str, str]) -> None:
    """Write data/<agent>.json if RECORD_VARIABLE is set."""
    if not os.environ.get(RECORD_VARIABLE):
        return
    scrubber = Scrubber(folders)
    value = {
        "agent": agent,
        "version": version,
        "requests": [scrubber.request(request) for request in requests],
    }
    (DATA / f"{agent}.json").write_text(to_lines(value) + "\n", encoding="utf-8")


def to_lines(value: Any, depth: int = 0) -> str:
    """JSON in which what fits on a line is on one."""
    flat = json.dumps(value, ensure_ascii=False)
    if len(flat) + depth <= 120 or not isinstance(value, dict | list) or not value:
        return flat
    inner = " " * (depth + 1)
    if isinstance(value, dict):
        lines = [f"{inner}{json.dumps(key)}: {to_lines(one, depth + 1)}" for key, one in value.items()]
        return "{\n" + ",\n".join(lines) + "\n" + " " * depth + "}"
    return "[\n" + ",\n".join(inner + to_lines(one, depth + 1) for one in value) + "\n" + " " * depth + "]"


def load(path: Path) -> Recording:
    value = json.loads(path.read_text(encoding="utf-8"), object_hook=_fill)
    return Recording(value["agent"], value["version"], tuple(Request(**request) for request in value["requests"]))


def _fill(value: dict[str, Any]) -> Any:
    if value.keys() != {FILLER}:
        return value
    length: int = value[FILLER]
    return ("filler " * (length // 7 + 1))[:length]
