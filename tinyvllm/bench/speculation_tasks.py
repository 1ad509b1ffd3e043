"""Tasks to measure speculative decoding with: an output that mostly copies its prompt, one that quotes it, and one that
shares little with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tinyvllm.bench.prompts import make_text
from tinyvllm.errors import TinyvllmError

CODE = '''\
class {Thing}Store:
    """Keeps {thing}s in memory, and the order in which they came."""

    def __init__(self, limit: int = 100) -> None:
        self.limit = limit
        self.{thing}s: dict[str, {Thing}] = {{}}
        self.order: list[str] = []

    def add(self, name: str, {thing}: {Thing}) -> None:
        if len(self.{thing}s) >= self.limit:
            raise ValueError(f"no room for {{name}}: the store holds {{self.limit}} {thing}s")
        if name in self.{thing}s:
            raise ValueError(f"{{name}} is already in the store")
        self.{thing}s[name] = {thing}
        self.order.append(name)

    def remove(self, name: str) -> {Thing}:
        if name not in self.{thing}s:
            raise KeyError(f"{{name}} is not in the store")
        self.order.remove(name)
        return self.{thing}s.pop(name)

    def latest(self, count: int = 10) -> list[{Thing}]:
        return [self.{thing}s[name] for name in self.order[-count:]]

    def total(self) -> float:
        result = 0.0
        for {thing} in self.{thing}s.values():
            result += {thing}.price * {thing}.quantity
        return result
'''
THINGS = ("order", "parcel", "ticket", "invoice", "sample", "record", "basket", "letter")
QUESTIONS = (
    "What should I consider before I adopt a cat?",
    "Explain how a bicycle stays upright.",
    "Why is the sky blue in the day and red in the evening?",
    "Write a short story about a lighthouse keeper.",
    "How do I bake bread without an oven?",
    "What is the difference between weather and climate?",
    "Give me advice for my first job interview.",
    "How do plants know when spring comes?",
)


def _edit(number: int) -> str:
    thing = THINGS[number % len(THINGS)]
    code = CODE.format(thing=thing, Thing=thing.capitalize())
    return (
        "Rename the method `latest` to `newest` in the following Python code, and change nothing else. Answer with the "
        f"complete code.\n\n```python\n{code}```"
    )


def _summary(number: int) -> str:
    return f"Summarize the following text in five sentences.\n\n{make_text('long', number)}"


def _chat(number: int) -> str:
    return QUESTIONS[number % len(QUESTIONS)]


TASKS: dict[str, Callable[[int], str]] = {"edit": _edit, "summary": _summary, "chat": _chat}


def make_prompts(task: str, count: int) -> list[str]:
    """Different prompts of one task. Raises TinyvllmError for an unknown one."""
    if task not in TASKS:
        raise TinyvllmError(f"--tasks has {task!r}: choose from {', '.join(TASKS)}")
    return [TASKS[task](number) for number in range(count)]


def check_tasks(tasks: Sequence[str]) -> None:
    """Raises TinyvllmError for an unknown one."""
    for task in tasks:
        make_prompts(task, 0)
