"""The arrows between the rooms: what may import what, and who may use tinygrad. docs/ARCHITECTURE.md draws them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "tinyvllm"

BASE = {"config", "errors"}
DOWN_TO_ENGINE = BASE | {"storage", "text", "scheduling", "execution", "engine", "profiling"}
INSIDE_OPS = BASE | {"arrays", "device"} | {f"ops/{name}" for name in ("step_inputs", "kernel", "formats")}
INSIDE_OPS |= {"ops/sampling", "ops/backend"}
# A room is a directory or a file; one inside another has arrows of its own. To name a room is to name all inside it.
MAY_IMPORT = {
    "errors": set(),
    "arrays": set(),
    "config": {"errors"},
    "storage": BASE,
    "text": BASE | {"storage"},
    "scheduling": BASE,
    "profiling": BASE,
    "device": BASE,
    "ops": BASE | {"arrays", "device"},
    "ops/step_inputs": BASE,
    "ops/kernel": BASE | {"device"},
    "ops/formats": BASE | {"arrays", "device", "ops/kernel"},
    "ops/sampling": BASE | {"device", "ops/kernel", "ops/step_inputs"},
    "ops/backend": BASE | {"arrays", "device", "ops/formats", "ops/sampling", "ops/step_inputs"},
    "ops/cpu": INSIDE_OPS,
    "ops/gpu": INSIDE_OPS,
    "model": BASE | {"arrays", "device", "ops", "storage"},
    "execution": BASE | {"arrays", "device", "ops", "model", "profiling", "scheduling", "storage"},
    "engine": BASE | {"text", "scheduling", "execution", "profiling", "storage"},
    "server": BASE | {"text", "engine", "profiling", "__init__"},
    "bench": DOWN_TO_ENGINE | {"__init__"},
    "cli": DOWN_TO_ENGINE | {"server", "bench", "__init__"},
    "__init__": BASE | {"engine"},
}
USES_TINYGRAD = ("device", "ops", "model", "execution")
NO_TINYGRAD_INSIDE = ("model/weights",)  # reading a checkpoint is a matter of files and NumPy


def imported_names(path: Path) -> Iterator[str]:
    """Every module that the file names in an import, wherever it stands; relative ones begin with a dot."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield "." * node.level + (node.module or "")
            elif node.module == "tinyvllm":  # `from tinyvllm import engine` names a room, `import LLM` the front door
                yield from (f"tinyvllm.{alias.name}" for alias in node.names)
            else:
                yield node.module or ""


def room_of(where: str) -> str | None:
    """The innermost room that a file, given by its path without the suffix, lies in."""
    inside = [room for room in MAY_IMPORT if where == room or where.startswith(f"{room}/")]
    return max(inside, key=len, default=None)


def is_wrong(room: str, where: str, name: str) -> bool:
    if name.startswith("."):
        return True
    package, _, rest = name.partition(".")
    outer = room.partition("/")[0]
    if package == "tinygrad":
        return outer not in USES_TINYGRAD or where.startswith(NO_TINYGRAD_INSIDE)
    if package != "tinyvllm":
        return False
    target = room_of(rest.replace(".", "/")) or "__init__"
    if target == room or target.startswith(f"{room}/"):
        return False
    return not any(target == allowed or target.startswith(f"{allowed}/") for allowed in MAY_IMPORT[room])


def violations(package: Path) -> list[str]:
    """One line an import that goes against the arrows."""
    wrong = []
    for path in sorted(package.rglob("*.py")):
        where = path.relative_to(package).as_posix()
        room = room_of(where.removesuffix(".py"))
        if room is None:
            wrong.append(f"{where}: its room is not in MAY_IMPORT")
            continue
        wrong += [f"{where}: {room} -> {name}" for name in imported_names(path) if is_wrong(room, where, name)]
    return wrong


def test_rooms_import_only_downwards() -> None:
    wrong = violations(PACKAGE)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("model/llama.py", "from tinyvllm.scheduling.plan import StepPlan"),
        ("scheduling/scheduler.py", "import tinygrad"),
        ("model/weights/quant.py", "from tinygrad.tensor import Tensor"),
        ("storage/pull.py", "import tinyvllm.text.tokenizer"),
        ("text/chat.py", "from tinyvllm import engine"),
        ("engine/core.py", "def f():\n    from tinyvllm.server import app"),
        ("errors.py", "from tinyvllm.config import ModelConfig"),
        ("ops/sample.py", "from . import kernel"),
        ("execution/runner.py", "from tinyvllm import LLM"),
        ("cellar/wine.py", "import os"),
        ("device/handle.py", "from tinyvllm.ops.kernel.body import Body"),
        ("ops/kernel/lanes.py", "import tinyvllm.ops.gpu.linear"),
        ("ops/gpu/linear.py", "from tinyvllm.ops.cpu.linear import LinearSpec"),
        ("ops/formats/matrix.py", "from tinyvllm.ops.backend import Backend"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, where: str, line: str) -> None:
    path = tmp_path / where
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(line)
    assert len(violations(tmp_path)) == 1


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("ops/attention.py", "from tinygrad import Tensor"),
        ("model/llama.py", "import tinyvllm.ops.attention"),
        ("ops/backends.py", "import tinyvllm.ops.gpu.linear"),
        ("ops/cpu/linear.py", "from tinyvllm.ops.kernel.body import Body"),
        ("scheduling/scheduler.py", "import tinygradients"),
        ("cli.py", "from tinyvllm import LLM"),
        ("server/app.py", "from tinyvllm.config import SamplingParams"),
    ],
)
def test_an_arrow_that_points_down_passes(tmp_path: Path, where: str, line: str) -> None:
    path = tmp_path / where
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(line)
    assert violations(tmp_path) == []


def test_the_architecture_page_has_the_same_arrows() -> None:
    page = (PACKAGE.parent / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| `")]
    drawn = {
        room.strip("`"): ({name.strip() for name in names.split(",") if name}, tinygrad == "yes")
        for room, _, names, tinygrad in (row for row in rows if row[-1] in ("yes", "no"))
    }
    held = {
        room: (names - BASE - {"__init__"}, room.partition("/")[0] in USES_TINYGRAD)
        for room, names in MAY_IMPORT.items()
    }
    del held["__init__"]
    assert drawn == held
