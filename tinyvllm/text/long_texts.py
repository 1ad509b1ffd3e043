"""Encode long texts in a separate process, where they take no time or memory from other requests.

A text of 16 MiB takes seconds and hundreds of megabytes, and if memory runs out, the tokenizers library aborts its
process. So a server hands texts above LONG_CHARS to a process that starts with the first such text, has a low priority
and a memory limit, and ends after some idle time, which gives back its memory.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import struct
import subprocess
import sys
import threading
import time
from typing import IO

from tinyvllm.config import ModelFiles
from tinyvllm.errors import RequestError

LONG_CHARS = 256 * 2**10  # shorter texts take less than 0.3 s and 30 MB in the server's own process
ENCODE_S = 60.0  # for one text; 16 MiB take 5 to 20 s
IDLE_S = 30.0
BASE_BYTES = 512 * 2**20  # of address space, beyond what the tokenizer takes
BYTES_PER_BYTE = 128  # of address space for each byte of text; encoding takes 30 to 60
KEPT_TEXT_BYTES = 2 * 2**20  # after a longer text the process ends, because it would keep the memory
_PIECE_IDS = 2**16  # that are made Python's at a time, so that other threads get the interpreter in between

HEAD = struct.Struct("<QB")  # of a request: the text's bytes, and whether special tokens are parsed
COUNT = struct.Struct("<Q")  # of an answer: the ids, 4 bytes each, that follow


class LongTexts:
    """Encodes texts, one at a time. Owns the process. Thread-safe; callers wait without the interpreter lock."""

    def __init__(self, files: ModelFiles, *, encode_s: float = ENCODE_S, base_bytes: int = BASE_BYTES) -> None:
        self._files = files
        self._encode_s = encode_s
        self._base_bytes = base_bytes
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._is_closed = False
        self.num_encoded = 0

    def encode(self, text: str, *, parse_special: bool, param: str) -> list[int]:
        """Token ids of the text, without BOS and EOS. Raises RequestError if it takes too much time or memory."""
        data = text.encode()
        with self._lock:
            self.num_encoded += 1
            try:
                if self._process is None:
                    return self._ask(data, parse_special)
                with contextlib.suppress(_EndedError):  # long ago, perhaps
                    return self._ask(data, parse_special)
                return self._ask(data, parse_special)
            except _EndedError:
                raise self._refusal(data, "memory", param) from None
            except TimeoutError:
                raise self._refusal(data, f"time ({self._encode_s:g} s)", param) from None
            finally:
                if len(data) > KEPT_TEXT_BYTES:
                    self._end()
                else:
                    timer = threading.Timer(IDLE_S, self._end_if_idle, [self.num_encoded])
                    timer.daemon = True
                    timer.start()

    def _end_if_idle(self, num_encoded: int) -> None:
        with self._lock:
            if self.num_encoded == num_encoded:
                self._end()

    def _refusal(self, data: bytes, what: str, param: str) -> RequestError:
        return RequestError(
            f"{param} has {len(data)} bytes of text, which takes too much {what} to encode: send less", param=param
        )

    def _ask(self, data: bytes, parse_special: bool) -> list[int]:
        """Raises _EndedError if the process ends, and TimeoutError after ending it."""
        process = self._process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        timer = threading.Timer(self._encode_s, process.kill)
        timer.daemon = True
        start_s = time.monotonic()
        timer.start()
        try:
            process.stdin.write(HEAD.pack(len(data), parse_special))
            process.stdin.write(data)
            process.stdin.flush()
            (count,) = COUNT.unpack(_read(process.stdout, COUNT.size))
            found = array.array("i")
            found.frombytes(_read(process.stdout, 4 * count))
        except (OSError, _EndedError) as error:
            self._end()
            if time.monotonic() - start_s >= self._encode_s:
                raise TimeoutError from error
            raise _EndedError from error
        finally:
            timer.cancel()
        ids: list[int] = []
        for start in range(0, count, _PIECE_IDS):
            ids += found[start : start + _PIECE_IDS].tolist()
        return ids

    def _start(self) -> subprocess.Popen[bytes]:
        if self._is_closed:
            raise _EndedError
        files = [self._files.kind, str(self._files.path), self._files.name, self._base_bytes, os.getpid()]
        try:
            return subprocess.Popen(
                [sys.executable, "-m", "tinyvllm.text.long_text_process", json.dumps(files)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # what the library says when it runs out of memory
            )
        except OSError as error:
            raise _EndedError from error

    def close(self) -> None:
        """End the process for good. A text that it is encoding is refused. Does not wait for the process."""
        self._is_closed = True
        process = self._process
        if process is not None:
            process.kill()  # the thread that uses it does the rest, if there is one
        if self._lock.acquire(blocking=False):
            self._end()
            self._lock.release()

    def _end(self) -> None:
        """End the process. The next text starts another."""
        if self._process is not None:
            process, self._process = self._process, None
            process.kill()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):  # of what was not yet written
                    pipe.close()  # type: ignore[union-attr]
            process.wait()


class _EndedError(Exception):
    """The process has ended, or cannot be started."""


def _read(pipe: IO[bytes], count: int) -> bytes:
    data = pipe.read(count)
    if len(data) < count:
        raise _EndedError
    return data
