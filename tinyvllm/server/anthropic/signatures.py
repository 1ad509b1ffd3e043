"""Signatures of thinking blocks, which clients send back unread with the conversation.

If a request omits the text of thinking (`display: "omitted"`, as Claude Code's do), the signature carries it, so that
the next prompt has it: many models read their reasoning between tool calls. Otherwise the signature is a hash.
Signatures are not checked, so conversations may come from other servers.
"""

from __future__ import annotations

import base64
import binascii
import hashlib

_CARRIER = "tinyvllm:"


class Signature:
    """The signature of a block whose text arrives in pieces."""

    def __init__(self, *, carries_text: bool) -> None:
        self._texts: list[bytes] | None = [] if carries_text else None
        self._hash = hashlib.sha256()

    def add(self, text: str) -> None:
        if self._texts is None:
            self._hash.update(text.encode())
        else:
            self._texts.append(text.encode())

    def __str__(self) -> str:
        if self._texts is None:
            return base64.b64encode(self._hash.digest()).decode()
        return _CARRIER + base64.b64encode(b"".join(self._texts)).decode()


def carried_text(signature: object) -> str:
    """The text that a signature carries; "" for other signatures."""
    if not isinstance(signature, str) or not signature.startswith(_CARRIER):
        return ""
    try:
        return base64.b64decode(signature.removeprefix(_CARRIER), validate=True).decode()
    except (binascii.Error, UnicodeDecodeError, ValueError):
        return ""
