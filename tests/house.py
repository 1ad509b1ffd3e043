"""The structure of the package, read from its source: modules, imports, rooms, and the lengths of functions.

`scripts/house.py` prints it; the tests compare it with docs/ARCHITECTURE.md.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tinyvllm"
PAGE = ROOT / "docs" / "ARCHITECTURE.md"

AnyFunction = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Function:
    name: str  # qualified: "Scheduler.schedule"
    num_lines: int  # from `def` to the last line, nested functions included


@dataclass(frozen=True)
class Module:
    """One file. `name` is its path in the package without the suffix: "ops/gpu/vector", "server/__init__"."""

    name: str
    num_lines: int
    imports: tuple[str, ...]  # see `imported_names`
    functions: tuple[Function, ...]

    @property
    def path(self) -> str:
        return f"{self.name}.py"


def read_package(package: Path = PACKAGE) -> tuple[Module, ...]:
    """Every module of the package, by path. A package is read once."""
    return _read_package(package)


@cache
def _read_package(package: Path) -> tuple[Module, ...]:
    modules = []
    for path in sorted(package.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text, str(path))
        name = path.relative_to(package).as_posix().removesuffix(".py")
        imports = tuple(dict.fromkeys(imported_names(tree)))
        modules.append(Module(name, len(text.splitlines()), imports, tuple(_functions(tree))))
    return tuple(modules)


def functions_in(path: Path) -> tuple[Function, ...]:
    """Those of one module."""
    return tuple(_functions(ast.parse(path.read_text(encoding="utf-8"), str(path))))


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """Everything inside `node` that may hold statements, or is one."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.expr):
            yield child
            yield from _statements(child)


def imported_names(tree: ast.AST) -> Iterator[str]:
    """Every dotted name that a file imports, anywhere in the file; relative names begin with a dot.

    `from tinyvllm.ops import gpu` yields "tinyvllm.ops.gpu", whether that is a module or not.
    """
    for node in _statements(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield "." * node.level + (node.module or "")
            elif (node.module or "").partition(".")[0] == "tinyvllm":
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            else:
                yield node.module or ""


def _functions(node: ast.AST, prefix: str = "") -> Iterator[Function]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr):  # most nodes are in one
            continue
        inner = prefix
        if isinstance(child, AnyFunction | ast.ClassDef):
            inner = f"{prefix}{child.name}."
        if isinstance(child, AnyFunction):
            assert child.end_lineno is not None
            yield Function(prefix + child.name, child.end_lineno - child.lineno + 1)
        yield from _functions(child, inner)


def import_graph(modules: Iterable[Module]) -> dict[str, set[str]]:
    """For each module, the modules of the package that it imports. Implicit imports of parent packages do not count."""
    modules = list(modules)
    known = {module.name for module in modules}
    return {
        module.name: {target for name in module.imports if (target := find_module(name, known))} - {module.name}
        for module in modules
    }


def find_module(name: str, known: set[str]) -> str | None:
    """The module that a dotted name refers to, or that defines it; None for a name outside the package."""
    package, _, rest = name.partition(".")
    if package != "tinyvllm":
        return None
    names = rest.split(".") if rest else []
    while True:
        for candidate in ("/".join(names), "/".join([*names, "__init__"])):
            if candidate in known:
                return candidate
        if not names:
            return None
        names.pop()


def find_cycles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """The groups of modules that import each other, directly or indirectly. The groups and their members are sorted."""
    reached = {name: _reachable(graph, name) for name in graph}
    groups = {frozenset(other for other in reached[name] if name in reached[other]) for name in graph}
    return sorted(sorted(group) for group in groups if group)


def _reachable(graph: Mapping[str, set[str]], start: str) -> set[str]:
    reached: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += graph[name]
    return reached


def drawn_rooms(page: Path = PAGE) -> list[tuple[str, set[str], bool]]:
    """The rows of the page's table of rooms: name, the rooms it may import, and whether it may use tinygrad."""
    lines = page.read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| `")]
    return [
        (room.strip("`"), {name.strip() for name in names.split(",") if name}, tinygrad == "yes")
        for room, _, names, tinygrad in (row for row in rows if row[-1] in ("yes", "no"))
    ]


def drawn_frames(page: Path = PAGE) -> list[str]:
    """The functions of the page's "A request in 14 frames", in order: "server/openai/chat.py:chat_completions"."""
    section = page.read_text(encoding="utf-8").partition("### A request in 14 frames")[2].partition("\n#")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("|")]
    frames = [(number, name.strip("`")) for number, name, _ in rows if number.isdigit()]
    assert [number for number, _ in frames] == [str(number) for number in range(1, len(frames) + 1)]
    return [name for _, name in frames]


def room_of(where: str, rooms: Iterable[str]) -> str | None:
    """The innermost room that a module lies in."""
    return max((room for room in rooms if where == room or where.startswith(f"{room}/")), key=len, default=None)
