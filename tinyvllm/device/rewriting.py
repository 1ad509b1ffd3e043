"""tinygrad's graph rewriting with the same results in less time, for the processes that compile.

Generating the code of a kernel is some 30 passes of rewriting over 200 to 2,000 nodes, most of which a pass leaves as
they are. tinygrad's driver handles each node as if it were going to change. Here a pass goes over the nodes in their
order, sources first, and only those that a rule or a changed source affects take the driver's way. Besides:

- Which of a pass's rules can match a node depends on its operation and those of its sources, and is looked up.
- A property that is computed from the sources' needs no search for nodes that lack it if all sources have it.
- Index arithmetic is lowered in one context for a kernel, and not in a new one for each index.
- A kernel without local memory needs no search for the barriers that this would need.
"""

from __future__ import annotations

import itertools
import threading
from typing import Any

from tinygrad import UOp, codegen
from tinygrad.renderer import Renderer
from tinygrad.uop import ops, weak
from tinygrad.uop.ops import Ops, PatternMatcher, RewriteContext, recursive_property

MOST_RULES_IN_TURN = 100  # on one node, before tinygrad's driver takes over, which finds rules that undo each other
CALLS = {Ops.CALL, Ops.FUNCTION}  # whose bodies a pass may leave out

PLACES: tuple[tuple[Any, str], ...] = (  # of what is replaced
    (PatternMatcher, "rewrite"),
    (RewriteContext, "unified_rewrite"),
    (recursive_property, "__get__"),
    (UOp, "op_in_backward_slice_with_self"),
    (weak, "graph_rewrite"),
    (codegen, "full_rewrite_to_sink"),
)
TINYGRADS = tuple(getattr(owner, name) for owner, name in PLACES)
_, _rewrite_all, _, _, _rewrite_graph, _to_sink = TINYGRADS

_SHAPE = vars(UOp)["_shape"].nm
_numbers: dict[tuple[Ops, frozenset[Ops]], int] = {}  # of the kinds of nodes: operation, and operations of the sources
_next_number = itertools.count()


class _Kernel(threading.local):
    """The kernel that a thread compiles."""

    has_local = True  # whether its device has local memory
    lowering: RewriteContext | None = None  # of its index arithmetic
    order: tuple[UOp, dict[UOp, None]] | None = None  # the graph of the last pass, which may be that of the next too


_kernel = _Kernel()


def rewrite_faster() -> None:
    """Have tinygrad rewrite in this way from now on, in this process."""
    ours = rewrite, rewrite_all, get_property, depends_on_any, lower, to_sink
    for (owner, name), function in zip(PLACES, ours, strict=True):
        setattr(owner, name, function)


def rewrite(self: PatternMatcher, uop: UOp, ctx: Any = None) -> UOp | None:
    """`PatternMatcher.rewrite`."""
    facts = uop.__dict__
    number = facts.get("_kind")
    if number is None:
        number = facts["_kind"] = _number_of(uop)
    rules = self.__dict__.get("_rules")
    if rules is None:
        rules = self._rules = {}
    matching = rules.get(number)
    if matching is None:
        operations = {source.op for source in uop.src}
        matching = rules[number] = [rule for rule in self.pdict.get(uop.op, ()) if rule[2].issubset(operations)]
    for rule in matching:
        if (result := rule[1](uop, ctx)) is not None and result is not uop:
            return result
    return None


def _number_of(uop: UOp) -> int:
    kind = uop.op, frozenset([source.op for source in uop.src])
    number = _numbers.get(kind)
    if number is None:
        number = _numbers[kind] = next(_next_number)
    return number


def rewrite_all(self: RewriteContext, root: UOp) -> UOp:
    """`RewriteContext.unified_rewrite`."""
    if self.bpm is not None or self.enter_calls:
        return _rewrite_all(self, root)
    if self.pm is codegen.pm_implicit_barriers and not _kernel.has_local:
        return root
    order = _order_of(root)
    if any(node.op in CALLS for node in order):
        return _rewrite_all(self, root)
    done = self.replace
    changed: set[UOp] = set()
    for node in order:
        result = done.get(node)
        if result is None:
            if changed.isdisjoint(node.src):
                result = _settle(self, node)
            else:
                sources = tuple([done[source] for source in node.src])
                rebuilt = UOp(node.op, ops._rebuild_dtype(node, sources), sources, node.arg, node.tag)
                result = done.get(rebuilt)
                if result is None:
                    result = _settle(self, rebuilt)
            done[node] = result
        if result is not node:
            changed.add(node)
    return done[root]


def _order_of(root: UOp) -> dict[UOp, None]:
    last = _kernel.order
    if last is None or last[0] is not root:
        last = _kernel.order = root, root.toposort()
    return last[1]


def _settle(self: RewriteContext, node: UOp) -> UOp:
    """What becomes of a node, whose sources the pass leaves as they are."""
    done, passed = self.replace, [node]
    while (result := rewrite(self.pm, passed[-1], self.ctx)) is not None:
        final = done.get(result)
        if final is None and (len(passed) > MOST_RULES_IN_TURN or not _has_final_sources(result, done)):
            final = _rewrite_all(self, result)
        if final is not None:
            break
        passed.append(result)
    else:
        final = passed[-1]
    for one in passed:
        done[one] = final
    return final


def _has_final_sources(node: UOp, done: dict[UOp, UOp]) -> bool:
    return all([done.get(source) is source for source in node.src])


def get_property(self: recursive_property, uop: UOp | None, owner: Any = None) -> Any:
    """`recursive_property.__get__`."""
    if uop is None:
        return self
    name, facts = self.nm, uop.__dict__
    if name in facts:
        return facts[name]
    for source in uop.src:
        if name not in source.__dict__:
            for node in uop.toposort(gate=lambda node: name not in node.__dict__):
                node.__dict__[name] = _value_of(self, node)
            return facts[name]
    value = facts[name] = _value_of(self, uop)
    return value


def _value_of(self: recursive_property, node: UOp) -> Any:
    """The property of a node whose sources have it."""
    if node.op is Ops.SHRINK and self.nm == _SHAPE and (count := _count_inside(node)) is not None:
        return (count,)
    return self.fxn(node)


def _count_inside(node: UOp) -> int | None:
    """The length of a run in a flat buffer, such as what a vector load reads, if it may be inside. tinygrad simplifies
    where it begins to find out, which is up to a third of the work of compiling a kernel with many loads."""
    whole, start, count = node.src[0]._shape, node.src[1], node.src[2]
    if count.op is Ops.CAST:
        count = count.src[0]
    if count.op is not Ops.CONST or whole is None or len(whole) != 1:
        return None
    is_inside = start.vmin + count.val <= whole[0] and start.vmax >= 0 <= count.val
    return count.val if is_inside else None


def lower(uop: UOp, matcher: PatternMatcher) -> UOp:
    """`graph_rewrite` as tinygrad lowers index arithmetic."""
    lowering = _kernel.lowering
    if lowering is None or matcher is not lowering.pm:
        return _rewrite_graph(uop, matcher)
    return lowering.unified_rewrite(uop)


def to_sink(ast: UOp, renderer: Renderer, optimize: bool = True) -> UOp:
    """`full_rewrite_to_sink`."""
    _kernel.has_local, _kernel.lowering = renderer.has_local, RewriteContext(weak.pm_lower_weak, None)
    try:
        return _to_sink(ast, renderer, optimize)
    finally:
        _kernel.has_local, _kernel.lowering, _kernel.order = True, None, None


def depends_on_any(uop: UOp, *ops: Ops) -> bool:
    """tinygrad's method, which lists and keeps all that a node depends on before it looks: a tenth of the time of
    compiling a large kernel."""
    seen, stack = {uop}, [uop]
    while stack:
        node = stack.pop()
        if node.op in ops:
            return True
        stack += (source for source in node.src if source not in seen)
        seen.update(node.src)
    return False
