"""Which rooms may import which, and which may use tinygrad, as in docs/ARCHITECTURE.md; and no cycles of imports."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.house import PACKAGE, drawn_rooms, find_cycles, import_graph, read_package, room_of

BASE = {"config", "errors", "faults", "processes"}
DOWN_TO_ENGINE = BASE | {"storage", "text", "scheduling", "execution", "engine", "profiling"}
INSIDE_OPS = BASE | {"arrays", "device"} | {f"ops/{name}" for name in ("step_inputs", "kernel", "formats")}
INSIDE_OPS |= {f"ops/{name}" for name in ("activation", "attention_spec", "backend", "coverage", "plain", "sampling")}
INSIDE_OPS |= {"ops/adapter_spec", "ops/experts_spec", "ops/latent_spec", "ops/recurrent_spec", "ops/short_conv"}
# A room is a directory or a file, and one inside another has its own entry. A name on the right includes inner rooms.
MAY_IMPORT = {
    "errors": set(),
    "faults": set(),
    "late_methods": set(),
    "processes": {"errors"},
    "arrays": BASE,
    "config": {"errors"},
    "storage": BASE,
    "text": BASE | {"storage"},
    "scheduling": BASE,
    "profiling": BASE,
    "device": BASE | {"late_methods"},
    "ops": BASE | {"arrays", "device"},
    "ops/step_inputs": BASE,
    "ops/kernel": BASE | {"device"},
    "ops/formats": BASE | {"arrays", "device", "ops/kernel"},
    "ops/sampling": BASE | {"device", "ops/kernel", "ops/step_inputs"},
    "ops/activation": BASE | {"ops/kernel"},
    "ops/coverage": BASE,
    "ops/adapter_spec": BASE | {"device", "ops/kernel"},
    "ops/attention_spec": BASE | {"ops/activation", "ops/coverage", "ops/formats", "ops/kernel", "ops/step_inputs"},
    "ops/backend": BASE
    | {"arrays", "device"}
    | {
        f"ops/{name}"
        for name in ("attention_spec", "coverage", "experts_spec", "formats", "recurrent_spec", "short_conv")
    }
    | {f"ops/{name}" for name in ("adapter_spec", "latent_spec", "sampling", "step_inputs")},
    "ops/experts_spec": BASE | {"ops/formats"},
    "ops/latent_spec": BASE | {"ops/formats", "ops/kernel", "ops/step_inputs"},
    "ops/recurrent_spec": BASE | {"ops/kernel", "ops/step_inputs"},
    "ops/short_conv": BASE | {"device", "ops/kernel", "ops/recurrent_spec", "ops/step_inputs"},
    "ops/plain": BASE
    | {f"ops/{name}" for name in ("activation", "attention_spec", "backend", "experts_spec", "recurrent_spec")},
    "ops/cpu": INSIDE_OPS,
    "ops/gpu": INSIDE_OPS,
    "model": BASE | {"arrays", "device", "ops", "storage"},
    "convert": BASE | {"arrays", "model", "storage", "text"},
    "execution": BASE | {"arrays", "device", "ops", "model", "profiling", "scheduling", "storage"},
    "engine": BASE | {"text", "scheduling", "execution", "profiling", "storage"},
    "server": BASE | {"text", "engine", "late_methods", "profiling", "storage", "__init__"},
    "ray_app": BASE | {"engine", "scheduling", "server"},
    "door": BASE | {"device", "engine", "execution", "server", "storage", "__init__"},
    "bench": DOWN_TO_ENGINE | {"__init__"},
    "cli": DOWN_TO_ENGINE | {"bench", "convert", "door", "late_methods", "server", "__init__"},
    "__init__": BASE | {"engine"},
    "__main__": {"cli"},
}
USES_TINYGRAD = ("device", "ops", "model", "execution")
NO_TINYGRAD_INSIDE = ("model/weights",)  # checkpoints are read with files and NumPy alone


def is_wrong(room: str, where: str, name: str) -> bool:
    if name.startswith("."):
        return True
    package, _, rest = name.partition(".")
    outer = room.partition("/")[0]
    if package == "tinygrad":
        return outer not in USES_TINYGRAD or where.startswith(NO_TINYGRAD_INSIDE)
    if package != "tinyvllm":
        return False
    target = room_of(rest.replace(".", "/"), MAY_IMPORT) or "__init__"
    if target == room or target.startswith(f"{room}/"):
        return False
    return not any(target == allowed or target.startswith(f"{allowed}/") for allowed in MAY_IMPORT[room])


def violations(package: Path) -> list[str]:
    """One line per import that is not allowed."""
    wrong = []
    for module in read_package(package):
        room = room_of(module.name, MAY_IMPORT)
        if room is None:
            wrong.append(f"{module.path}: its room is not in MAY_IMPORT")
            continue
        wrong += [f"{module.path}: {room} -> {name}" for name in module.imports if is_wrong(room, module.path, name)]
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
        ("ops/kernel/lanes.py", "import tinyvllm.ops.gpu.matrix"),
        ("ops/gpu/matrix.py", "from tinyvllm.ops.cpu.linear import LinearSpec"),
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
        ("ops/backends.py", "import tinyvllm.ops.gpu.matrix"),
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
    drawn = {room: (names, tinygrad) for room, names, tinygrad in drawn_rooms()}
    held = {
        room: (names - BASE - {"__init__"}, room.partition("/")[0] in USES_TINYGRAD)
        for room, names in MAY_IMPORT.items()
        if not room.startswith("__")
    }
    assert drawn == held


def test_no_modules_import_each_other() -> None:
    """Imports inside functions, and those for types only, count too."""
    cycles = find_cycles(import_graph(read_package()))
    assert not cycles, "\n".join(", ".join(cycle) for cycle in cycles)


@pytest.mark.parametrize(
    ("files", "cycle"),
    [
        (
            {
                "scheduling/plan.py": "from tinyvllm.scheduling.request import Request",
                "scheduling/request.py": "if TYPE_CHECKING:\n    from tinyvllm.scheduling import plan",
                "scheduling/scheduler.py": "import tinyvllm.scheduling.plan",
            },
            ["scheduling/plan", "scheduling/request"],
        ),
        (
            {
                "a.py": "import tinyvllm.b",
                "b/__init__.py": "from tinyvllm.b.inner import VALUE",
                "b/inner.py": "def f():\n    from tinyvllm.a import VALUE",
            },
            ["a", "b/__init__", "b/inner"],
        ),
    ],
)
def test_a_planted_cycle_is_found(tmp_path: Path, files: dict[str, str], cycle: list[str]) -> None:
    for where, text in files.items():
        path = tmp_path / where
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert find_cycles(import_graph(read_package(tmp_path))) == [cycle]
