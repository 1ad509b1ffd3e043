"""The few small programs that run on a CPU besides a step's kernels: tinygrad's for its workers, and our tables.

tinygrad generates its own for each core whenever it opens the device. Here each is made once, and kept on disk if
`keep` was called before the device is opened.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from tinygrad import UOp
from tinygrad.codegen import do_to_program, to_program_key
from tinygrad.renderer import Renderer
from tinygrad.uop.ops import Ops

from tinyvllm.device.private_folder import PrivateFolder
from tinyvllm.device.program_store import digest_of, environment_facts, slim
from tinyvllm.errors import CacheError

logger = logging.getLogger(__name__)

_made: dict[tuple[Any, ...], UOp] = {}
_root: list[Path] = []  # where programs are kept; empty: nowhere


def keep(root: Path | None) -> None:
    """From now on, read programs from folders under `root`, and save them there; None: do not."""
    _root[:] = [] if root is None else [root]


def helper_program(sink: UOp, renderer: Renderer) -> UOp:
    """The compiled program. Has the arguments of tinygrad's function, whose place it takes in its CPU device."""
    key = to_program_key(sink, renderer)
    if key not in _made:
        folder, name = _folder(renderer), f"program-{digest_of(key)}"
        kept = folder.read(name) if folder is not None else None
        if isinstance(kept, UOp) and kept.op is Ops.PROGRAM:
            _made[key] = kept
        else:
            _made[key] = slim(do_to_program(sink, renderer))
            if folder is not None:
                folder.write(name, _made[key])
    return _made[key]


def _folder(renderer: Renderer) -> PrivateFolder | None:
    for root in _root:
        try:
            return PrivateFolder(root, f"CPU_helpers-{digest_of(environment_facts('CPU', renderer))}")
        except CacheError as error:
            logger.debug("helper programs are not kept: %s", error)  # opening the program store says it aloud
    return None
