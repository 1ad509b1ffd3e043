"""Methods of dataclasses that are made at their first use."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

from tinyvllm.late_methods import LAST_PYTHON, LateMethod, make_methods_late

pytestmark = pytest.mark.skipif(
    sys.version_info[:2] > LAST_PYTHON, reason="dataclasses compile a class's methods at once"
)


@pytest.fixture(autouse=True)
def _late(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(dataclasses, "_create_fn", dataclasses._create_fn)  # type: ignore[attr-defined]
    make_methods_late()
    yield


def define() -> dict[str, Any]:
    """Dataclasses of all kinds, defined now."""

    @dataclasses.dataclass(frozen=True)
    class Point:
        x: int
        y: int = 0
        tags: list[str] = dataclasses.field(default_factory=list, compare=False)
        unit: ClassVar[str] = "mm"

    @dataclasses.dataclass(frozen=True)
    class Labeled(Point):
        """A point with a label."""

        label: str = dataclasses.field(default="", kw_only=True)

        def __post_init__(self) -> None:
            if self.label == "bad":
                raise ValueError(self.label)

    @dataclasses.dataclass(order=True, slots=True)
    class Pair:
        first: int
        second: dataclasses.InitVar[int] = 1

        def __post_init__(self, second: int) -> None:
            self.first += second

        def __repr__(self) -> str:
            return f"<{self.first}>"

    @dataclasses.dataclass(unsafe_hash=True)
    class Node:
        value: int
        next: Node | None = dataclasses.field(default=None, hash=False)

    return {kind.__name__: kind for kind in (Point, Labeled, Pair, Node)}


def late_methods(kind: type) -> list[str]:
    return [name for name, value in vars(kind).items() if isinstance(value, LateMethod)]


def test_a_method_is_made_when_it_is_first_used() -> None:
    Labeled = define()["Labeled"]
    assert {"__init__", "__eq__", "__hash__", "__setattr__", "__delattr__"} <= set(late_methods(Labeled))
    one = Labeled(1, label="a")
    assert "__init__" not in late_methods(Labeled) and "__eq__" in late_methods(Labeled)
    assert inspect.isfunction(vars(Labeled)["__init__"])
    assert one.__init__.__func__ is vars(Labeled)["__init__"]
    assert vars(Labeled)["__init__"].__qualname__ == f"{Labeled.__qualname__}.__init__"


def test_a_wrapped_method_is_made_once() -> None:
    """dataclasses wraps `__repr__`, so that the method cannot take its place."""
    Node, made = define()["Node"], []
    late = vars(Node)["__repr__"].__wrapped__
    make = late._make

    def count() -> Any:
        made.append(1)
        return make()

    late._make = count
    assert repr(Node(1)) == repr(Node(1)) and made == [1]


def test_classes_behave_as_without_it() -> None:
    kinds = define()
    Point, Labeled, Pair, Node = kinds["Point"], kinds["Labeled"], kinds["Pair"], kinds["Node"]
    assert Point(1) == Point(1, 0, ["a"]) != Point(1, 1) and Point(1) != Labeled(1)
    assert hash(Point(1, 2)) == hash(Point(1, 2)) and Point(1).tags is not Point(1).tags
    assert repr(Point(1)).endswith("Point(x=1, y=0, tags=[])") and repr(Pair(1)) == "<2>"
    assert Pair(1) < Pair(2) <= Pair(2) and not Pair(3) < Pair(1)
    assert dataclasses.replace(Labeled(1, label="a"), y=5) == Labeled(1, 5, label="a")
    assert dataclasses.asdict(Labeled(1, label="a")) == {"x": 1, "y": 0, "tags": [], "label": "a"}
    assert copy.copy(Labeled(2, label="b")) == Labeled(2, label="b")
    loop = Node(1)
    loop.next = loop
    assert repr(loop).endswith("Node(value=1, next=...)") and hash(loop) == hash(Node(1))
    with pytest.raises(ValueError, match="bad"):
        Labeled(1, label="bad")
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        Point()
    for kind in (Point, Labeled):
        with pytest.raises(dataclasses.FrozenInstanceError):
            kind(1).x = 2
        with pytest.raises(dataclasses.FrozenInstanceError):
            del kind(1).x


def test_a_method_says_where_it_is_from_as_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def facts() -> list[tuple[str, ...]]:
        kinds = define().values()
        return [
            (name, method.__module__, method.__name__, str(method.__doc__), method.__qualname__)
            for kind in kinds
            for name in sorted(vars(kind))
            if inspect.isfunction(method := getattr(kind, name))
        ]

    late = facts()
    create: Any = dataclasses._create_fn  # type: ignore[attr-defined]
    monkeypatch.setattr(dataclasses, "_create_fn", create._create)
    assert late == facts()


def test_a_subclass_may_use_its_parents_method_first() -> None:
    Node = define()["Node"]

    class Child(Node):  # type: ignore[misc, valid-type]
        pass

    assert Child(3).value == 3 and "__init__" not in vars(Child)
    assert "__init__" not in late_methods(Node)


def test_signatures_are_those_of_the_fields() -> None:
    Labeled = define()["Labeled"]
    assert list(inspect.signature(Labeled).parameters) == ["x", "y", "tags", "label"]
    assert inspect.signature(Labeled).parameters["y"].default == 0


def test_a_script_that_imports_tinyvllm_keeps_its_dataclasses() -> None:
    code = "import dataclasses; f = dataclasses._create_fn; import tinyvllm.config; assert dataclasses._create_fn is f"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_object_of_a_command_can_be_pickled() -> None:
    code = (
        "from tinyvllm.late_methods import make_methods_late; make_methods_late(); import pickle;"
        "from tinyvllm.config import SamplingParams as S; assert pickle.loads(pickle.dumps(S(seed=3))) == S(seed=3)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
