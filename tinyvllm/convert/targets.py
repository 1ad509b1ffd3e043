"""What `tinyvllm quantize --to` names."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tinyvllm.convert.affine import BITS, GROUPS
from tinyvllm.convert.ggml_types import MIXTURES
from tinyvllm.errors import UnsupportedModelError

MLX = re.compile(r"mlx-(?P<bits>\d)(?:bit)?(?:-g(?P<group>\d+))?")
FP8 = {"fp8": "channel", "fp8-channel": "channel", "fp8-block": "block", "fp8-block128": "block"}
KNOWN = (*MIXTURES, *(f"mlx-{bits}" for bits in BITS), "fp8", "fp8-block")


@dataclass(frozen=True)
class Target:
    """A format to convert to. kind: "gguf" (`mixture` is a key of MIXTURES), "mlx" (bits, group) or "fp8" (`scales`:
    channel or block)."""

    name: str
    kind: str
    mixture: str = ""
    bits: int = 0
    group: int = 0
    scales: str = ""

    @property
    def suffix(self) -> str:
        """Of the output's name: a GGUF file has its format in capitals by custom."""
        return f"{self.name.upper()}.gguf" if self.kind == "gguf" else self.name


def parse_target(text: str) -> Target:
    """Raises UnsupportedModelError, which lists what there is."""
    name = text.lower()
    if name in MIXTURES:
        return Target(name, "gguf", mixture=name)
    if name in FP8:
        return Target("fp8" if FP8[name] == "channel" else "fp8-block", "fp8", scales=FP8[name])
    found = MLX.fullmatch(name)
    if found is not None:
        bits, group = int(found["bits"]), int(found["group"] or 64)
        if bits in BITS and group in GROUPS:
            return Target(f"mlx-{bits}" + (f"-g{group}" if found["group"] else ""), "mlx", bits=bits, group=group)
    groups = ", ".join(f"-g{group}" for group in GROUPS)
    raise UnsupportedModelError(
        f"--to is {text!r}, which is not known; known: {', '.join(KNOWN)}; mlx-N also with {groups}, as in mlx-4-g32"
    )
