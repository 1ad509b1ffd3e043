"""The rooms of the package, their files, the imports between them, and the longest functions:
python scripts/house.py [--json] [--functions 20]

The rooms are those of docs/ARCHITECTURE.md. This script shows the actual imports; tests/test_layers.py checks them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # the checkout, for tests/

from tests.house import Module, drawn_rooms, find_cycles, import_graph, read_package, room_of


def describe(modules: Sequence[Module], num_functions: int) -> dict[str, Any]:
    """Rooms with their files and the rooms they import, cycles of imports, and the longest functions."""
    names = [name for name, *_ in drawn_rooms()]
    room_by_module = {module.name: room_of(module.name, names) or module.name for module in modules}
    graph = import_graph(modules)
    rooms = []
    for room in dict.fromkeys([*names, *room_by_module.values()]):
        inside = [module for module in modules if room_by_module[module.name] == room]
        targets = {room_by_module[target] for module in inside for target in graph[module.name]}
        files = {module.path: module.num_lines for module in inside}
        imports = sorted(targets - {room})
        rooms.append({"room": room, "lines": sum(files.values()), "imports": imports, "files": files})
    return {"rooms": rooms, "cycles": find_cycles(graph), "functions": longest_functions(modules, num_functions)}


def longest_functions(modules: Iterable[Module], count: int) -> list[dict[str, Any]]:
    """The longest functions, longest first. A nested function is listed separately too."""
    found = [
        (-function.num_lines, f"{module.path}:{function.name}") for module in modules for function in module.functions
    ]
    return [{"function": name, "lines": -minus_lines} for minus_lines, name in sorted(found)[:count]]


def print_plain(house: dict[str, Any]) -> None:
    for room in house["rooms"]:
        imports = ", ".join(room["imports"]) or "nothing"
        print(f"{room['room']}: {_count(len(room['files']), 'file')}, {room['lines']} lines; imports {imports}")
        for path, num_lines in room["files"].items():
            print(f"  {num_lines:5} {path}")
    rooms = house["rooms"]
    num_files, num_lines = sum(len(room["files"]) for room in rooms), sum(room["lines"] for room in rooms)
    print(f"\n{len(rooms)} rooms, {num_files} files, {num_lines} lines")
    for cycle in house["cycles"]:
        print(f"a cycle of imports: {', '.join(cycle)}")
    if house["functions"]:
        print("\nThe longest functions, in lines:")
    for function in house["functions"]:
        print(f"  {function['lines']:5} {function['function']}")


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0] + ".")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--functions", type=int, default=0, metavar="N", help="print the N longest functions too")
    options = parser.parse_args(arguments)
    house = describe(read_package(), options.functions)
    if options.json:
        print(json.dumps(house, indent=2))
    else:
        print_plain(house)


if __name__ == "__main__":
    main()
