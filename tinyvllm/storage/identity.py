"""What identifies a model's weights, whatever their name and place."""

from __future__ import annotations

import hashlib
from pathlib import Path

from tinyvllm.config import ModelFiles

NUM_SAMPLES = 1024  # of each file
SAMPLE_BYTES = 256


def weights_digest(files: ModelFiles) -> bytes:
    """16 bytes: a hash of the sizes of the weights' files and of samples spread evenly over them, each file's head
    (names and shapes of the tensors) and end included. Weights that differ in a thousandth of a file differ here.

    Raises OSError."""
    digest = hashlib.blake2b(digest_size=16)
    for path in _weight_files(files):
        size = path.stat().st_size
        digest.update(f"{size} ".encode())
        with open(path, "rb") as file:
            digest.update(file.read(SAMPLE_BYTES * NUM_SAMPLES))
            for number in range(1, NUM_SAMPLES + 1):
                file.seek(max(0, number * size // NUM_SAMPLES - SAMPLE_BYTES))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.digest()


def _weight_files(files: ModelFiles) -> list[Path]:
    if files.kind == "gguf":
        return [files.path]
    return sorted(files.path.glob("*.safetensors"))
