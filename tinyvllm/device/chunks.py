"""Memory of this computer for what is uploaded to a CPU device: many buffers in one private mapping.

tinygrad maps shared memory for each buffer, whose pages cost more: for SmolLM2 (100 MB of weights in 724 buffers)
0.10 s of a start rather than 0.065. Huge pages would cost 0.015 s if they were at hand, but clearing them took as long
as the small ones on a virtual machine.
"""

from __future__ import annotations

import ctypes
import mmap
import threading

CHUNK_BYTES = 32 << 20


class Chunks:
    """Owns the chunk that is being filled. A full one belongs to its buffers, and is unmapped with the last of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunk: mmap.mmap | None = None
        self._used = 0

    def take(self, nbytes: int) -> tuple[int, mmap.mmap]:
        """The address of so many zeroed bytes, at the start of a page, and the mapping to keep as long as they are
        used."""
        with self._lock:
            # nothing has an address, too, which a full chunk does not have
            if self._chunk is None or self._used + max(nbytes, 1) > len(self._chunk):
                self._chunk = mmap.mmap(-1, max(nbytes, CHUNK_BYTES), flags=mmap.MAP_ANON | mmap.MAP_PRIVATE)
                self._used = 0
            address = ctypes.addressof(ctypes.c_char.from_buffer(self._chunk, self._used))
            self._used += -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
            return address, self._chunk
