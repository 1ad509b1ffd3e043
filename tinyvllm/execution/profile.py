"""The kernels of a step, each with its name and its time: the recorded calls of the serving graph, timed one by one.

A call is identified by the tensors that it touches: those of the model and the pool have names
(`model.layers.3.mixer.qkv...`), which give layer and role whatever the kernel is called, for traced and saved steps, on
every device. The role in the name of a kernel of ours only decides where the tensors do not: tinygrad's KernelInfo has
a name, but no field for a role.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from tinygrad import Tensor
from tinygrad.device import Buffer
from tinygrad.nn.state import get_state_dict
from tinygrad.uop.ops import Ops

from tinyvllm.device.handle import DeviceHandle
from tinyvllm.device.recording import Call
from tinyvllm.execution.cost import CostCounter, count_loads
from tinyvllm.execution.graphs import Graph
from tinyvllm.model.registry import Model
from tinyvllm.ops.backend import KVPool
from tinyvllm.ops.formats.matrix import Matrix
from tinyvllm.ops.timing import CallTime, make_timer
from tinyvllm.profiling.expert_load import ExpertLoad
from tinyvllm.profiling.kernels import Kernel, Launch, StepProfile
from tinyvllm.profiling.names import SAMPLE, is_generated, role_of, strip_colors
from tinyvllm.profiling.roofline import OPERATIONS_A_STATE, attended_keys, operations_a_key
from tinyvllm.scheduling.plan import StepPlan

_LAYER = re.compile(r"\.(?:layers|keys|values|matrices|convs)\.(\d+)")
_STATES = ("pool.matrices.", "pool.convs.")  # the paths of tensors of recurrent states
UNPACK = "unpack"  # the role of a kernel that unpacks a quantized matrix for a product
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
            _base(plane): shard for matrix in model.matrices for shard in matrix.shards for plane in shard.planes
        }
        self._named = {
            _base(tensor): Named(path, tensor.nbytes(), matrices.get(_base(tensor)))
            for path, tensor in reversed(list(tensors.items()))  # the first of two names: a tied head is the embedding
        }

    def touched(self, call: Call) -> list[Named]:
        """The named tensors among the call's arguments: those of matrices first, then by size, the largest first."""
        found = {id(buffer.base): self._named.get(id(buffer.base)) for buffer in call.buffers}
        return sorted((n for n in found.values() if n), key=lambda n: (n.matrix is None, not n.is_pool, -n.nbytes))

    def name(self, calls: Sequence[Call], cut: int) -> list[CallName]:
        """Names in the order of the calls. `cut`: the first call that samples."""
        names: list[CallName | None] = [
            CallName(SAMPLE, None) if number >= cut else self._by_tensors(call) for number, call in enumerate(calls)
        ]
        consumers = list(_consumers(calls))
        for number in reversed(range(len(calls))):  # a consumer comes later, so it has its name already
            if names[number] is None and is_generated(_program(calls[number])):
                consumer = consumers[number]
                after = None if consumer is None else names[consumer]
                names[number] = after and CallName(f"{after.operation}, its input", after.layer)
        return [name or self._by_place(calls, names, number) for number, name in enumerate(names)]

    def _by_tensors(self, call: Call) -> CallName | None:
        touched = self.touched(call)
        if not touched:
            return None
        first, role = touched[0], role_of(_program(call))
        if first.is_pool:
            return CallName(role or ("recur" if first.path.startswith(_STATES) else "attention"), first.layer)
        if role == "embed":
            return CallName(role, None)
        return CallName(f"{first.role}, unpacked" if role == UNPACK else first.role, first.layer)

    def _by_place(self, calls: Sequence[Call], names: Sequence[CallName | None], number: int) -> CallName:
        """A kernel of ours that touches no named tensor belongs to the layer before it."""
        operation = role_of(_program(calls[number])) or "other"
        before = next((name for name in reversed(names[:number]) if name is not None), None)
        layer = None if before is None or operation in _OUTSIDE_LAYERS else before.layer
        return CallName(operation, layer)


def profile_step(
    graph: Graph, model: Model, pool: KVPool, device: DeviceHandle, plan: StepPlan, *, repeats: int, warmup: int
) -> StepProfile:
    """Time the step of `plan` in the graph's first instance, as a whole and kernel by kernel.

    The step runs repeatedly, and writes its tokens' keys and values to the same slots each time."""
    instance = graph.instances[0]
    instance.packer.pack(plan)
    instance.send()
    device.wait()
    step_s = [_timed(instance.run, device) for _ in range(warmup + repeats)][warmup:]
    run = make_timer(device, instance.step)
    passes, walls_s = [], []
    for number in range(warmup + repeats):
        start = time.perf_counter()
        times = run()
        if number >= warmup:
            walls_s.append(time.perf_counter() - start)
            passes.append(times)
    calls, block_size = instance.step.calls, graph.layout.block_size
    names = CallNamer(model, pool).name(calls, instance.step.cut)
    loads = read_loads(graph, model, device, plan)
    counter = CostCounter(model, pool, block_size, loads)
    flops = FlopCounter(model, pool, block_size).count(calls, plan)
    each = [
        Kernel(
            name.operation,
            name.layer,
            _program(call),
            call.buffers[0].device,
            statistics.median(times[number].seconds for times in passes),
            counter.moved_by(call, graph.inputs, plan),
            flops[number],
        )
        for number, (call, name) in enumerate(zip(calls, names, strict=True))
    ]
    return StepProfile(
        bucket=graph.bucket.name,
        device=device.name,
        num_cores=max(1, len(device.cores)),
        is_graphed=device.is_cpu,
        kernels=tuple(merge_cores(each)),
        step_s=statistics.median(step_s),
        profiled_s=statistics.median(walls_s),
        launches=tuple(_launches(each, passes[-1])),
        experts=tuple(loads),
    )


def read_loads(graph: Graph, model: Model, device: DeviceHandle, plan: StepPlan) -> list[ExpertLoad]:
    """What the sparse layers chose in the last run of the graph's first instance, which was of `plan`."""
    routings = [device.read_ints(buffer) for buffer in graph.instances[0].routings]
    return count_loads(model, routings, plan.num_tokens)


def merge_cores(kernels: Sequence[Kernel]) -> list[Kernel]:
    """Merge the cores' shares of each kernel: the slowest one's time, and the bytes and operations of all."""
    shares: dict[tuple[str, int], list[Kernel]] = {}
    seen: dict[tuple[str, str], int] = {}
    for kernel in kernels:
        place = seen[kernel.label, kernel.device] = seen.get((kernel.label, kernel.device), -1) + 1
        shares.setdefault((kernel.label, place), []).append(kernel)
    return [
        replace(
            max(group, key=lambda kernel: kernel.seconds),
            nbytes=sum(kernel.nbytes or 0 for kernel in group),
            flops=sum(kernel.flops or 0 for kernel in group),
            count=len(group),
        )
        for group in shares.values()
    ]


class FlopCounter:
    """Counts multiplications and additions of matrix products and attention, but not of norms, rope and sampling; for
    the plan, without the bucket's padding."""

    def __init__(self, model: Model, pool: KVPool, block_size: int) -> None:
        self._namer = CallNamer(model, pool)
        self._model = model
        # elements of one token in each of the pool's tensors
        self._pool = {
            _base(tensor): tensor.numel() // (count * block_size)
            for layer, count in pool.num_blocks.items()
            for tensor in pool.tensors_of(layer)
        }
        # elements of one sequence's matrices in each of their tensors
        self._states = {
            _base(tensor): tensor.numel() // pool.num_state_slots
            for tensors in pool.matrices.values()
            for tensor in (tensors if isinstance(tensors, tuple) else (tensors,))
        }

    def count(self, calls: Sequence[Call], plan: StepPlan) -> list[int]:
        """Operations of one run of each call."""
        unpacked: dict[tuple[int, int], Named] = {}
        counts = []
        for call in calls:
            role, touched = role_of(_program(call)), self._namer.touched(call)
            first = next(iter(touched), None)
            copies = [unpacked[_place(buffer)] for buffer in call.buffers if _place(buffer) in unpacked]
            for buffer in _written(call):  # scratch memory is reused
                unpacked.pop(_place(buffer), None)
                if role == UNPACK and first is not None:
                    unpacked[_place(buffer)] = first
            if first is not None and first.path.startswith(_STATES):
                counts.append(self._of_recurrence(call, plan))
            elif first is not None and first.is_pool:
                counts.append(self._of_attention(call, first.layer or 0, plan))
            elif role in (UNPACK, "embed"):  # these copy weights, and multiply nothing
                counts.append(0)
            else:
                counts.append(self._of_product([*touched, *copies], plan))
        return counts

    def _of_product(self, touched: Sequence[Named], plan: StepPlan) -> int:
        """Two operations for each weight and row, over the matrices that a call touches."""
        parts = {id(named.matrix): named for named in touched if named.matrix is not None}
        weights = sum(self._weights_used(part) for part in parts.values())
        rows = plan.num_tokens if all(part.layer is not None for part in parts.values()) else len(plan.sampled)
        return 2 * rows * weights

    def _of_recurrence(self, call: Call, plan: StepPlan) -> int:
        """Operations on the elements of the matrices that a call touches, once for each token."""
        touched = {id(buffer.base) for buffer in call.buffers}
        elements = sum(count for base, count in self._states.items() if base in touched)
        return OPERATIONS_A_STATE * elements * plan.num_tokens

    def _weights_used(self, named: Named) -> int:
        """The weights of a matrix that one token is multiplied by."""
        matrix, kind = named.matrix, None if named.layer is None else self._model.config.experts_of(named.layer)
        assert matrix is not None
        weights = matrix.used_rows * matrix.num_cols
        if not matrix.num_experts or kind is None:
            return weights
        return weights // matrix.num_experts * (kind.top_k + matrix.num_experts - kind.num_experts)

    def _of_attention(self, call: Call, layer: int, plan: StepPlan) -> int:
        """Products with keys and with values, each two operations per element of a head; 0 if the call only writes the
        pool."""
        in_pool = {id(buffer.base) for buffer in call.buffers} & set(self._pool)
        if all(id(buffer.base) in in_pool for buffer in _written(call)):
            return 0
        kind = self._model.config.layers[layer]
        seen = sum(attended_keys(entry.start, entry.count, kind.window) for entry in plan.entries)
        if kind.latent is not None:  # cores share the heads, and each reads the whole latents
            (up,) = self._model.layers[layer].mixer.matrices["key_up"]
            return operations_a_key(kind) * seen // len(up.shards)
        group = kind.num_heads // kind.num_kv_heads  # query heads that a KV head serves
        return 2 * group * seen * sum(self._pool[base] for base in in_pool)


def _launches(kernels: Sequence[Kernel], times: Sequence[CallTime]) -> Iterator[Launch]:
    for kernel, timed in zip(kernels, times, strict=True):
        yield Launch(kernel.label, kernel.program, kernel.device, timed.start_ns, timed.seconds)


def _consumers(calls: Sequence[Call]) -> Iterator[int | None]:
    """For each call, the first later call that reads what it writes."""
    for number, call in enumerate(calls):
        written = {(id(b.base), b.offset) for b in _written(call)}
        yield next(
            (later for later in range(number + 1, len(calls)) if written & set(map(_place, _read(calls[later])))), None
        )


def _written(call: Call) -> list[Buffer]:
    outs = call.target.arg.outs if call.target.op is Ops.PROGRAM else (0,)
    return [call.buffers[index] for index in outs]


def _read(call: Call) -> list[Buffer]:
    ins = call.target.arg.ins if call.target.op is Ops.PROGRAM else (1,)
    return [call.buffers[index] for index in ins]


def _place(buffer: Buffer) -> tuple[int, int]:
    return id(buffer.base), buffer.offset


def _timed(run: Callable[[], None], device: DeviceHandle) -> float:
    start = time.perf_counter()
    run()
    device.wait()
    return time.perf_counter() - start


def _program(call: Call) -> str:
    return strip_colors(call.target.arg.name) if call.target.op is Ops.PROGRAM else "copy"


def _base(tensor: Tensor) -> int:
    """The identity of a tensor's memory."""
    return id(tensor.uop.base.buffer.base)
