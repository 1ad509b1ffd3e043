"""Python's garbage collector in processes that must not pause."""

from __future__ import annotations

import gc

# New containers before a collection of the youngest, of those before one of the middle generation, and so on. Python's
# defaults (700, 10, 10) collect hundreds of times a second under load; a collection of 10,000 objects takes 0.3 ms.
THRESHOLDS = (10_000, 20, 100)
MANY_GRAPHS = 16


def collect_start(num_graphs: int) -> None:
    """Called when a model is loaded in a process that has other objects too: free what tracing its graphs left, if
    there are many. Python would do so within the first requests: after 23 graphs, it once took 0.7 s in the middle of
    a benchmark."""
    if num_graphs >= MANY_GRAPHS:
        gc.collect()


def keep_imports() -> None:
    """Called in a server when most modules are imported, before the model is loaded: neither the collections of the
    load nor `settle_heap` need visit what they have made, which would take 0.2 s of a start."""
    gc.freeze()


def settle_heap() -> None:
    """Called when all that lives as long as the process is loaded: collections no longer visit it, and are rare.

    A full collection visits every object of a process, 100 ms for a large one, in which no token leaves it. Requests
    and their outputs are freed by their reference counts. If nothing was collected since `keep_imports`, too little was
    made for a collection to pay: a start whose steps are kept leaves 2,000 objects of garbage among 80,000.
    """
    if any(gc.get_count()[1:]):
        gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
