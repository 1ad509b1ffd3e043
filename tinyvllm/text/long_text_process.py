"""The process that encodes long texts (long_texts.py): reads requests from its standard input, and writes token ids."""

from __future__ import annotations

import array
import contextlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from tinyvllm.config import ModelFiles
from tinyvllm.text.long_texts import BYTES_PER_BYTE, COUNT, HEAD
from tinyvllm.text.tokenizer import load_tokenizer

NICENESS = 10


def main() -> None:
    """Answer requests until the parent closes the pipe."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):  # the parent decides when it ends
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        os.nice(NICENESS)
    kind, path, name, base_bytes, parent = json.loads(sys.argv[1])
    threading.Thread(target=_end_with, args=[parent], daemon=True).start()
    tokenizer = load_tokenizer(ModelFiles(kind, Path(path), name))
    pipe, out = sys.stdin.buffer, sys.stdout.buffer
    while len(head := pipe.read(HEAD.size)) == HEAD.size:
        size, parse_special = HEAD.unpack(head)
        _limit_memory(int(base_bytes) + BYTES_PER_BYTE * size)
        text = pipe.read(size).decode()
        ids = tokenizer.encode(text, add_special_tokens=False, parse_special=bool(parse_special))
        out.write(COUNT.pack(len(ids)))
        out.write(array.array("i", ids).tobytes())
        out.flush()


def _end_with(parent: int) -> None:
    """End soon after the parent, even in the middle of a text. Linux's signal for this is not used, because it is sent
    when the thread that started this process ends."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _limit_memory(num_bytes: int) -> None:
    """Limit the address space to its current size plus `num_bytes`, on systems that can."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = pages * resource.getpagesize() + num_bytes
        if hard != resource.RLIM_INFINITY:
            limit = min(limit, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    except (ImportError, OSError, ValueError):  # not Linux
        return


if __name__ == "__main__":
    main()
