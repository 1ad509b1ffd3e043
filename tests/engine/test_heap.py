"""What the garbage collector of a server does before it is ready."""

from __future__ import annotations

import subprocess
import sys

import pytest

START = """
import gc, sys, weakref
from tinyvllm.engine.heap import THRESHOLDS, keep_imports, settle_heap
from tinyvllm.processes import collect_rarely
collect_rarely()
keep_imports()
if sys.argv[1] == "traces":
    gc.collect(0)  # as Python does once very much has been made
class Node: pass
node = Node()
node.itself = node
there = weakref.ref(node)
del node
settle_heap()
assert gc.get_freeze_count() > 1000 and gc.get_threshold() == THRESHOLDS
print("kept" if there() else "collected")
"""


@pytest.mark.parametrize(("kind", "end"), [("kept", "kept"), ("traces", "collected")])
def test_a_start_that_makes_little_is_not_searched_for_garbage(kind: str, end: str) -> None:
    done = subprocess.run([sys.executable, "-c", START, kind], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == end
