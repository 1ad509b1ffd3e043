"""What identifies a block of a sequence: a hash of its tokens, of all tokens before it, and of whose sequence it is."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence


def pack_tokens(tokens: Sequence[int]) -> bytes:
    """Token ids as int32."""
    return array("i", tokens).tobytes()


def hash_block(parent: bytes, tokens: bytes) -> bytes:
    """Hash of a full block and everything before it. `parent` is the hash of the previous block, or for the first one
    the sequence's seed (`make_hash_seed`)."""
    return hashlib.blake2b(parent + tokens, digest_size=16).digest()


def hash_blocks(tokens: Sequence[int], block_size: int, seed: bytes = b"") -> list[bytes]:
    """Hashes of all full blocks of a sequence, in order. 2 us a block."""
    hashes = [seed]
    for end in range(block_size, len(tokens) + 1, block_size):
        hashes.append(hash_block(hashes[-1], pack_tokens(tokens[end - block_size : end])))
    return hashes[1:]


def make_hash_seed(cache_salt: str | None = None, adapter: str = "") -> bytes:
    """Where a sequence's chain of block hashes begins: sequences with different seeds share no blocks.

    cache_salt: the caller's secret, known to those who may share a prefix (vLLM's `cache_salt`). adapter: what
    distinguishes the weights that computed the keys and values; "" for the model's own. b"" if there is neither.
    """
    if not cache_salt and not adapter:
        return b""
    salt = (cache_salt or "").encode("utf-8", "surrogatepass")
    # its length separates the two, whatever characters they have
    return hashlib.blake2b(b"%d:" % len(salt) + salt + adapter.encode(), digest_size=16, person=b"hash seed").digest()
