"""The name of each call of a step: its operation in the model, and its layer.

A call is identified by the tensors that it touches: those of the model and the pool have names
(`model.layers.3.mixer.qkv...`), which give layer and role whatever the kernel is called, for traced and saved steps, on
every device. The role in the name of a kernel of ours only decides where the tensors do not: tinygrad's KernelInfo has
a name, but no field for a role.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tinygrad import Tensor
from tinygrad.device import Buffer
from tinygrad.nn.state import get_state_dict
from tinygrad.uop.ops import Ops

from tinyvllm.device.recording import Call
from tinyvllm.model.registry import Model
from tinyvllm.ops.backend import KVPool
from tinyvllm.ops.formats.matrix import Matrix
from tinyvllm.profiling.names import SAMPLE, is_generated, role_of, strip_colors

_LAYER = re.compile(r"\.(?:layers|keys|values|key_scales|value_scales|matrices|convs)\.(\d+)")
STATES = ("pool.matrices.", "pool.convs.")  # the paths of tensors of recurrent states
UNPACK = "unpack"  # the role of a kernel that unpacks a quantized matrix for a product
DRAFTING = "notes for drafts"
_OUTSIDE_LAYERS = ("take rows", "embed")  # roles of kernels that touch no tensor with a name


@dataclass(frozen=True)
class CallName:
    """The operation of a call, and its layer."""

    operation: str
    layer: int | None


@dataclass(frozen=True)
class Named:
    """A tensor of the model or the pool. `matrix`: the matrix (or a core's share of one) that it is a plane of."""

    path: str
    nbytes: int
    matrix: Matrix | None = None

    @property
    def layer(self) -> int | None:
        found = _LAYER.search(self.path)
        return int(found[1]) if found else None

    @property
    def is_pool(self) -> bool:
        return self.path.startswith("pool.")

    @property
    def role(self) -> str:
        """`model.layers.3.mixer.qkv.planes.0` is "qkv", `model.norm.weight` "final norm"; of a sparse feed-forward,
        `model.layers.3.feed_forward.layer.down.planes.0` is "experts down"."""
        parts = self.path.split(".")
        if self.layer is None:
            role = parts[1]
        elif parts[3] == "feed_forward":
            role = _role_in_feed_forward(parts[4:])
        else:
            inner = parts[4:] if parts[3] == "mixer" else parts[3:]
            role = inner[1] if inner[0] == "latent" else inner[0]  # the expansions of latents
        return {"norm": "final norm", "embedding": "head"}.get(role, role.replace("_", " "))


def _role_in_feed_forward(parts: Sequence[str]) -> str:
    """The role of a feed-forward's tensor, by the names that lead to it."""
    first, *rest = parts
    if first in ("experts", "dense"):  # each of two feed-forwards in one layer
        return _role_in_feed_forward(rest)
    if first == "shared":
        return f"shared {rest[0]}"
    if first != "layer":
        return first
    roles = {"router": "router", "gate_up": "experts gate_up", "down": "experts down"}
    return roles.get(rest[0], "route")  # else a vector that the choice reads, or a bias beside its matrix


class CallNamer:
    """Names the calls of one model and pool."""

    def __init__(self, model: Model, pool: KVPool) -> None:
        tensors = get_state_dict({"model": model, "pool": pool})
        matrices = {
            base_of(plane): shard for matrix in model.matrices for shard in matrix.shards for plane in shard.planes
        }
        self._named = {
            base_of(tensor): Named(path, tensor.nbytes(), matrices.get(base_of(tensor)))
            for path, tensor in reversed(list(tensors.items()))  # the first of two names: a tied head is the embedding
        }

    def touched(self, call: Call) -> list[Named]:
        """The named tensors among the call's arguments: those of matrices first, then by size, the largest first."""
        found = {id(buffer.base): self._named.get(id(buffer.base)) for buffer in call.buffers}
        return sorted((n for n in found.values() if n), key=lambda n: (n.matrix is None, not n.is_pool, -n.nbytes))

    def name(self, calls: Sequence[Call], cut: int) -> list[CallName]:
        """Names in the order of the calls. `cut`: the first call that samples."""
        names: list[CallName | None] = [
            self._after_cut(call) if number >= cut else self._by_tensors(call) for number, call in enumerate(calls)
        ]
        consumers = list(_consumers(calls))
        for number in reversed(range(len(calls))):  # a consumer comes later, so it has its name already
            if names[number] is None and is_generated(program_of(calls[number])):
                consumer = consumers[number]
                after = None if consumer is None else names[consumer]
                names[number] = after and CallName(f"{after.operation}, its input", after.layer)
        return [name or self._by_place(calls, names, number) for number, name in enumerate(names)]

    def _after_cut(self, call: Call) -> CallName:
        """Sampling touches none of the model's tensors; what a drafting layer notes after it does."""
        return CallName(DRAFTING if self.touched(call) else SAMPLE, None)

    def _by_tensors(self, call: Call) -> CallName | None:
        touched = self.touched(call)
        if not touched:
            return None
        first, role = touched[0], role_of(program_of(call))
        if first.is_pool:
            return CallName(role or ("recur" if first.path.startswith(STATES) else "attention"), first.layer)
        if role == "embed":
            return CallName(role, None)
        return CallName(f"{first.role}, unpacked" if role == UNPACK else first.role, first.layer)

    def _by_place(self, calls: Sequence[Call], names: Sequence[CallName | None], number: int) -> CallName:
        """A kernel of ours that touches no named tensor belongs to the layer before it."""
        operation = role_of(program_of(calls[number])) or "other"
        before = next((name for name in reversed(names[:number]) if name is not None), None)
        layer = None if before is None or operation in _OUTSIDE_LAYERS else before.layer
        return CallName(operation, layer)


def _consumers(calls: Sequence[Call]) -> Iterator[int | None]:
    """For each call, the first later call that reads what it writes."""
    for number, call in enumerate(calls):
        written = {(id(b.base), b.offset) for b in written_by(call)}
        later = range(number + 1, len(calls))
        yield next((one for one in later if written & set(map(place_of, _read_by(calls[one])))), None)


def written_by(call: Call) -> list[Buffer]:
    """The arguments that a call writes."""
    outs = call.target.arg.outs if call.target.op is Ops.PROGRAM else (0,)
    return [call.buffers[index] for index in outs]


def _read_by(call: Call) -> list[Buffer]:
    ins = call.target.arg.ins if call.target.op is Ops.PROGRAM else (1,)
    return [call.buffers[index] for index in ins]


def place_of(buffer: Buffer) -> tuple[int, int]:
    """The identity of a buffer's memory and where it begins there, since scratch buffers are views of one arena."""
    return id(buffer.base), buffer.offset


def program_of(call: Call) -> str:
    """The name of a call's program."""
    return strip_colors(call.target.arg.name) if call.target.op is Ops.PROGRAM else "copy"


def base_of(tensor: Tensor) -> int:
    """The identity of a tensor's memory."""
    return id(tensor.uop.base.buffer.base)
