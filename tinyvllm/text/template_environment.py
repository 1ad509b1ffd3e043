"""Jinja's sandbox for chat templates, with limits (template_limits.py), and the functions and tags that they expect.

The compiled template counts its iterations and calls, and has whatever it makes checked. A usual rendering takes a few
percent longer for it.
"""

from __future__ import annotations

import functools
import json
import types
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.compiler
import jinja2.ext
import jinja2.filters
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils

from tinyvllm.text.template_limits import CHECKED_METHODS, MAX_WIDTH, Budget, TemplateLimitError

BUDGET = " budget"  # among a rendering's variables; not a name that a template could have
_HEAVY_CHARS = 2**16  # of a text for filters whose time is not proportional to it
_MAX_INDENT = 16
# What they return is small, or is in what they are given, or is noted item by item.
# fmt: off
_SMALL_FILTERS = frozenset((
    "count", "d", "default", "first", "float", "int", "last", "length", "map", "reject", "rejectattr", "select",
    "selectattr", "tojson",
))
# fmt: on


class LimitedContext(jinja2.runtime.Context):
    """One rendering's variables, and its budget."""

    def __init__(self, environment: jinja2.Environment, parent: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        super().__init__(environment, parent, *args, **kwargs)
        self.budget: Budget = parent.get(BUDGET) or Budget()


class LimitedCode(jinja2.compiler.CodeGenerator):
    """Writes the template's Python code, with calls of its budget."""

    def write_commons(self) -> None:
        super().write_commons()
        for name in ("tick", "note", "text", "join", "add", "mod"):
            self.writeline(f"{name} = context.budget.{name}")
        self.writeline("concat = join")

    def blockvisit(self, nodes: Any, frame: Any) -> None:
        if frame.loop_frame:
            self.writeline("tick()")
        super().blockvisit(nodes, frame)

    def visit_For(self, node: jinja2.nodes.For, frame: Any) -> None:
        if node.test is not None:
            node.test = jinja2.nodes.MarkSafe(node.test)
        super().visit_For(node, frame)

    def visit_MarkSafe(self, node: jinja2.nodes.MarkSafe, frame: Any) -> None:
        """A loop's condition: without autoescaping, nothing else makes this node."""
        self.write("(tick() or ")
        self.visit(node.expr, frame)
        self.write(")")

    def visit_Concat(self, node: jinja2.nodes.Concat, frame: Any) -> None:
        self.write("join((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_Getitem(self, node: jinja2.nodes.Getitem, frame: Any) -> None:
        self._noted(super().visit_Getitem, node, frame, when=isinstance(node.arg, jinja2.nodes.Slice))

    @jinja2.compiler.optimizeconst
    def visit_Add(self, node: jinja2.nodes.BinExpr, frame: Any) -> None:
        self._operator("add", node, frame)

    @jinja2.compiler.optimizeconst
    def visit_Mod(self, node: jinja2.nodes.BinExpr, frame: Any) -> None:
        self._operator("mod", node, frame)

    def _operator(self, name: str, node: jinja2.nodes.BinExpr, frame: Any) -> None:
        self.write(f"{name}(")
        self.visit(node.left, frame)
        self.write(", ")
        self.visit(node.right, frame)
        self.write(")")

    def visit_Filter(self, node: jinja2.nodes.Filter, frame: Any) -> None:
        self._noted(super().visit_Filter, node, frame, when=node.name not in _SMALL_FILTERS)

    def visit_List(self, node: jinja2.nodes.List, frame: Any) -> None:
        self._noted(super().visit_List, node, frame)

    def visit_Tuple(self, node: jinja2.nodes.Tuple, frame: Any) -> None:
        self._noted(super().visit_Tuple, node, frame, when=node.ctx == "load")

    def visit_Dict(self, node: jinja2.nodes.Dict, frame: Any) -> None:
        self._noted(super().visit_Dict, node, frame)

    def _noted(self, visit: Callable[[Any, Any], None], node: Any, frame: Any, *, when: bool = True) -> None:
        self.write("note(" if when else "")
        visit(node, frame)
        self.write(")" if when else "")

    def _output_child_pre(self, node: Any, frame: Any, finalize: Any) -> None:
        self.write("text(")


class LimitedEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox, in which every operation that makes a value asks the rendering's budget."""

    context_class = LimitedContext
    code_generator_class = LimitedCode
    intercepted_binops = frozenset(("*", "**", "%"))  # also not evaluated while a template is compiled

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        context.budget.before_product(operator, left, right)
        return self.binop_table[operator](left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget: Budget = __context.budget
        budget.tick()
        if type(__obj) is types.BuiltinMethodType:
            if __obj.__name__ in CHECKED_METHODS and isinstance(__obj.__self__, str | bytes | int):
                if __obj.__name__ == "join" and args:
                    args = (budget.listed(args[0]),)
                budget.before_method(__obj.__self__, __obj.__name__, (*args, *kwargs.values()))
        elif isinstance(form := getattr(__obj, "limited_form", None), str):
            budget.before_str_format(form, args, kwargs)
        elif args or kwargs:
            for value in (*args, *kwargs.values()):
                if isinstance(value, dict | list | tuple):
                    budget.weigh([args, kwargs])
                    break
        return budget.note(super().call(__context, __obj, *args, **kwargs))

    def call_filter(
        self, name: str, value: Any, args: Any = None, kwargs: Any = None, context: Any = None, eval_ctx: Any = None
    ) -> Any:
        """Called for each item of `map`."""
        found = super().call_filter(name, value, args, kwargs, context, eval_ctx)
        return found if context is None else context.budget.note(found)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            wrapped.limited_form = value.__self__  # type: ignore[attr-defined]
        return wrapped


class Namespace(jinja2.utils.Namespace):
    """Its text leaves out what is in it, which may be namespaces in turn."""

    def __repr__(self) -> str:
        return "<Namespace>"


# ---- Filters whose results may be much larger than what they are given ----

Check = Callable[..., None]


def _before_indent(budget: Budget, value: Any, width: Any = 4, *_: Any, **__: Any) -> None:
    length = len(width) if isinstance(width, str) else width
    budget.width(length)
    if isinstance(value, str) and isinstance(length, int):
        budget.spend(len(value) + (value.count("\n") + 1) * max(length, 0))


def _before_groups(budget: Budget, value: Any, *args: Any, **kwargs: Any) -> None:
    for count in (*args, *kwargs.values()):
        budget.width(count)


def _before_round(budget: Budget, value: Any, precision: Any = 0, *_: Any, **__: Any) -> None:
    if isinstance(precision, int) and abs(precision) > 100:
        raise TemplateLimitError("rounds to more than 100 digits")


def _before_sum(budget: Budget, value: Any, attribute: Any = None, start: Any = 0) -> None:
    if not isinstance(start, int | float):
        raise TemplateLimitError("sums what are not numbers")


def _before_heavy(budget: Budget, value: Any, *args: Any, **kwargs: Any) -> None:
    if budget.weigh([value, args, kwargs]) > _HEAVY_CHARS:
        raise TemplateLimitError(f"uses a filter that takes at most {_HEAVY_CHARS} characters")


_CHECKS: dict[str, Check] = {
    "center": lambda budget, value, width=80: budget.width(width),
    "indent": _before_indent,
    "replace": lambda budget, value, old, new, count=None: budget.before_replace(value, old, new),
    "format": lambda budget, form, *args, **kwargs: budget.before_format(str(form), kwargs or args),
    "batch": _before_groups,
    "slice": _before_groups,
    "round": _before_round,
    "sum": _before_sum,
    "string": lambda budget, value: budget.weigh(value),
    **dict.fromkeys(("pprint", "striptags", "urlize", "wordcount", "wordwrap", "xmlattr"), _before_heavy),
}


def _checked(function: Callable[..., Any], check: Check) -> Callable[..., Any]:
    """A filter that is checked first. As it takes the context, it is never evaluated while a template is compiled."""
    wants = getattr(function, "jinja_pass_arg", None)

    @functools.wraps(function)
    def checked(context: LimitedContext, *args: Any, **kwargs: Any) -> Any:
        check(context.budget, *args, **kwargs)
        first = {"context": (context,), "environment": (context.environment,), "eval_context": (context.eval_ctx,)}
        return function(*(() if wants is None else first[wants.name]), *args, **kwargs)

    return jinja2.pass_context(checked)


@jinja2.pass_context
def limited_join(context: LimitedContext, value: Any, d: str = "", attribute: str | int | None = None) -> str:
    if attribute is not None:
        value = map(jinja2.filters.make_attrgetter(context.environment, attribute), value)
    return context.budget.join(value, str(d))


@jinja2.pass_context
def limited_list(context: LimitedContext, value: Any) -> list[Any]:
    return list(context.budget.listed(value))


# ---- Functions and tags for templates, as in transformers --------------------------------------------------------
# https://github.com/huggingface/transformers/blob/5e43e2e892453b405ce6d2cb94387b3a3213f30a/src/transformers/utils/chat_template_utils.py


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's tokens for training; here only its body counts."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line_number = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line_number)


def make_environment() -> LimitedEnvironment:
    environment = LimitedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, GenerationTag]
    )
    for name, check in _CHECKS.items():
        environment.filters[name] = _checked(environment.filters[name], check)
    environment.filters |= {"tojson": to_json, "join": limited_join, "list": limited_list}
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
        "lipsum": lipsum,
        "namespace": Namespace,
    }
    return environment


class Verbatim(str):
    """Text that a template's `tojson` leaves as it is."""

    __slots__ = ()


@jinja2.pass_context
def to_json(
    context: LimitedContext,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: Sequence[str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without HTML escapes, which Jinja's own filter adds."""
    if isinstance(value, Verbatim):
        return str(value)
    budget = context.budget
    budget.weigh(value)
    width = indent if isinstance(indent, int) else len(indent or "")
    if width > _MAX_INDENT or any(len(separator) > _MAX_INDENT for separator in separators or ()):
        raise TemplateLimitError(f"indents JSON by more than {_MAX_INDENT} characters")
    settings: dict[str, Any] = {"ensure_ascii": ensure_ascii, "indent": indent, "sort_keys": sort_keys}
    settings["separators"] = None if separators is None else tuple(separators)
    encoder = json.JSONEncoder(**settings)
    if indent is None:
        text = encoder.encode(value)
        budget.spend(len(text))
        return text
    pieces = []
    for piece in encoder.iterencode(value):  # with an indentation, depth multiplies with length
        budget.spend(len(piece))
        pieces.append(piece)
    return "".join(pieces)


def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def strftime_now(date_format: str) -> str:
    if len(date_format) > MAX_WIDTH:
        raise TemplateLimitError("writes a date by a format that is too long")
    return datetime.now().strftime(date_format)


def lipsum(n: int = 5, html: bool = True, min: int = 20, max: int = 100) -> str:
    """Jinja's own, whose loops the budget cannot see."""
    if n * max > MAX_WIDTH or min > MAX_WIDTH:
        raise TemplateLimitError("writes a text without meaning that is too long")
    return jinja2.utils.generate_lorem_ipsum(n, html, min, max)
