"""A step's cost by count: its kernels, the bytes that it must move, and the bytes that its kernels do move."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tinygrad import Tensor
from tinygrad.uop.ops import Ops

from tinyvllm.device.recording import Call
from tinyvllm.model.registry import Model
from tinyvllm.ops.backend import KVPool
from tinyvllm.ops.formats.matrix import Matrix
from tinyvllm.profiling.expert_load import ExpertLoad
from tinyvllm.profiling.roofline import earlier_keys, experts_touched
from tinyvllm.scheduling.plan import StepPlan


@dataclass(frozen=True)
class WeightFacts:
    """The model's matrices as stored on the device."""

    num_params: int
    nbytes: int
    dtype: str  # of most of the bytes: float16, Q4_K, ...


@dataclass(frozen=True)
class StepCost:
    """The cost of one step. `nbytes` is the plan's minimum, without the bucket's padding: each matrix once, of experts
    those that its tokens choose, or as many as are expected to be chosen where that is not known; the tokens' rows of
    the embedding table; keys and values of the context before this step, or of its part that is in a layer's window,
    and those of its tokens; each sequence's recurrent state twice. Norms and activations, which need not leave the
    chip, count in `moved_bytes` only."""

    bucket: str
    num_kernels: int
    weight_bytes: int
    kv_read_bytes: int
    kv_written_bytes: int
    moved_bytes: int  # by the launched kernels, each of which touches each of its arguments once
    state_bytes: int = 0  # of recurrent layers, read and written

    @property
    def nbytes(self) -> int:
        return self.weight_bytes + self.kv_read_bytes + self.kv_written_bytes + self.state_bytes


def formats_in_use(model: Model) -> list[str]:
    """The formats of the model's matrices, by what they are for: ["qkv, down: Q4_K, Q6_K", "head: Q6_K"]."""
    formats: dict[str, dict[str, None]] = {}  # in the order of the layers
    for layer in model.layers:
        for role, matrices in layer.matrices.items():
            formats.setdefault(role, {}).update({matrix.format.name: None for matrix in matrices})
    formats["embedding"] = {model.embedding.format.name: None}
    formats["head"] = {model.head.format.name: None}
    roles: dict[str, list[str]] = {}
    for role, names in formats.items():
        roles.setdefault(", ".join(sorted(names)), []).append(role)
    return [f"{', '.join(group)}: {names}" for names, group in roles.items()]


def weight_facts(model: Model) -> WeightFacts:
    """Count a model's matrices."""
    by_format: Counter[str] = Counter()
    for matrix in model.matrices:
        by_format[matrix.format.name] += matrix.nbytes
    num_params = sum(matrix.used_rows * matrix.num_cols for matrix in model.matrices)
    return WeightFacts(num_params, by_format.total(), by_format.most_common(1)[0][0])


class CostCounter:
    """Counts the cost of plans for one model and pool."""

    def __init__(self, model: Model, pool: KVPool, block_size: int, loads: Sequence[ExpertLoad] = ()) -> None:
        """`loads`: of the sparse layers, if they were measured."""
        self._model = model
        self._loads = {load.layer: load for load in loads}
        # the layer of each plane of experts, and how many experts it holds
        self._experts = {
            _buffer(plane): (layer, matrix.num_experts)
            for layer, matrix in _expert_matrices(model)
            for shard in matrix.shards
            for plane in shard.own_planes
        }
        # bytes of one token in each of the pool's tensors, and the window in which they are read
        self._kv_bytes = {
            _buffer(tensor): tensor.nbytes() // (count * block_size)
            for layer, count in pool.num_blocks.items()
            for tensor in pool.tensors_of(layer)
        }
        # bytes of one sequence's state in each of its tensors
        self._state_bytes = {_buffer(tensor): tensor.nbytes() // pool.num_state_slots for tensor in pool.state_tensors}
        windows = {layer: model.config.kv_window(layer) for layer in pool.keys}
        self._kv_windows = {_buffer(tensor): windows[layer] for layer in windows for tensor in pool.tensors_of(layer)}
        self._table = {_buffer(plane) for shard in model.embedding.shards for plane in shard.planes}
        # bytes of one position in each of the layers' rope tables
        self._rope_bytes = {_buffer(rope): rope.nbytes() // model.num_positions for rope in model.ropes}
        self._row_bytes = model.embedding.nbytes // model.embedding.num_rows

    def count(self, bucket: str, calls: tuple[Call, ...], inputs: Tensor, plan: StepPlan) -> StepCost:
        """The cost of one run of `calls`, which read the packed `plan` from `inputs`."""
        model, num_tokens = self._model, plan.num_tokens
        weights = sum(matrix.nbytes for matrix in model.matrices)
        for layer, matrix in _expert_matrices(model):
            weights -= round(matrix.nbytes * (1 - self._share_touched(layer, matrix.num_experts, num_tokens)))
        if model.head is not model.embedding:
            weights += num_tokens * self._row_bytes - model.embedding.nbytes
        all_layers = sum(self._kv_bytes.values())
        return StepCost(
            bucket,
            num_kernels=len(calls),
            weight_bytes=weights,
            kv_read_bytes=sum(size * self._tokens_read(base, plan) for base, size in self._kv_bytes.items()),
            kv_written_bytes=num_tokens * all_layers,
            state_bytes=2 * len(plan.entries) * model.config.state_bytes,
            moved_bytes=sum(self.moved_by(call, inputs, plan) for call in calls),
        )

    def moved_by(self, call: Call, inputs: Tensor, plan: StepPlan) -> int:
        """Bytes of one call: each argument once and whole, except experts that no token chooses, and lookups: the pool
        by the sequences' lengths, and states by their number; rope and (in calls that read the step's inputs) the
        embedding table by rows; and sampling by the requests' settings. The step's inputs do not count."""
        own = _buffer(inputs)
        looks_up = any(id(buffer.base) == own for buffer in call.buffers)
        # by place: scratch buffers are views of one arena, and a kernel may take the same one twice
        args = {(id(buffer.base), buffer.offset): (index, buffer) for index, buffer in enumerate(call.buffers)}
        moved = 0
        for (base, _), (index, buffer) in args.items():
            if base in self._kv_bytes:
                moved += self._kv_bytes[base] * self._tokens_moved(call, index, base, plan)
            elif base in self._state_bytes:
                moved += self._state_bytes[base] * len(plan.entries) * _times_moved(call, index)
            elif base in self._rope_bytes:
                moved += plan.num_tokens * self._rope_bytes[base]
            elif base in self._experts:
                moved += round(buffer.nbytes * self._share_touched(*self._experts[base], plan.num_tokens))
            elif base in self._table and looks_up:
                moved += plan.num_tokens * self._row_bytes * buffer.nbytes // self._model.embedding.nbytes
            elif base != own:
                moved += round(buffer.nbytes * _share_looked_at(call, index, plan))
        return moved

    def _share_touched(self, layer: int, num_stacked: int, num_tokens: int) -> float:
        """The share of a layer's stacked experts that the tokens choose, a shared one included."""
        kind, load = self._model.config.experts_of(layer), self._loads.get(layer)
        assert kind is not None, f"layer {layer} has experts, but its configuration has none"
        touched = experts_touched(kind, num_tokens) if load is None else load.num_touched
        return (touched + num_stacked - kind.num_experts) / num_stacked

    def _tokens_read(self, base: int, plan: StepPlan) -> int:
        """The number of tokens before the plan's own whose keys (or values) in a tensor of the pool are read."""
        return sum(earlier_keys(entry.start, self._kv_windows[base]) for entry in plan.entries)

    def _tokens_moved(self, call: Call, index: int, base: int, plan: StepPlan) -> int:
        """The number of tokens whose keys (or values) `call` reads and writes in argument `index`, a tensor of the
        pool. What a kernel seems neither to read nor to write, Hopper's copy engine reads."""
        outs, ins = _outs_and_ins(call)
        num_read = self._tokens_read(base, plan) if index in ins or index not in outs else 0
        return num_read + (plan.num_tokens if index in outs else 0)


def _outs_and_ins(call: Call) -> tuple[Sequence[int], Sequence[int]]:
    """The arguments that a call writes, and those that it reads."""
    return (call.target.arg.outs, call.target.arg.ins) if call.target.op is Ops.PROGRAM else ((0,), (1,))


def _times_moved(call: Call, index: int) -> int:
    """1 if a call reads or writes its argument `index`, 2 for both."""
    outs, ins = _outs_and_ins(call)
    return (index in outs) + (index in ins)


def _expert_matrices(model: Model) -> Iterator[tuple[int, Matrix]]:
    """The matrices with an axis of experts, each with its layer."""
    for index, layer in enumerate(model.layers):
        for role in layer.feed_forward.matrices.values():
            yield from ((index, matrix) for matrix in role if matrix.num_experts)


def count_loads(model: Model, routings: Sequence[np.ndarray], num_tokens: int) -> list[ExpertLoad]:
    """The load of each sparse layer in a step. `routings`: the ids that each of them chose, (rows * k,), of which the
    first `num_tokens` rows are those of tokens."""
    matrices: dict[int, list[Matrix]] = {}
    for layer, matrix in _expert_matrices(model):
        matrices.setdefault(layer, []).append(matrix)
    loads = []
    for (layer, parts), ids in zip(matrices.items(), routings, strict=True):
        kind, num_stacked = model.config.experts_of(layer), parts[0].num_experts
        assert kind is not None, f"layer {layer} has experts, but its configuration has none"
        stacks_shared = num_stacked - kind.num_experts
        chosen = ids.reshape(-1, kind.top_k + stacks_shared)[:num_tokens, : kind.top_k]
        counts = np.bincount(chosen.reshape(-1), minlength=kind.num_experts)
        touched = int(np.count_nonzero(counts))
        nbytes = sum(part.nbytes // num_stacked * (touched + stacks_shared) for part in parts)
        loads.append(
            ExpertLoad(
                layer=layer,
                num_experts=kind.num_experts,
                num_pairs=chosen.size,
                num_touched=touched,
                num_expected=experts_touched(kind, num_tokens),
                busiest=int(counts.max()),
                nbytes=nbytes,
            )
        )
    return loads


def _share_looked_at(call: Call, index: int, plan: StepPlan) -> float:
    """The share of rows that a sampling kernel (ops/sampling/sample.py) reads of its argument `index`: `leaders` reads
    all logits, but noises only of rows that cut the distribution; `draw` reads logits of rows that cut or rank the
    token, and noises of those that cut. 1 for any other kernel."""
    name = call.target.arg.name if call.target.op is Ops.PROGRAM else ""
    if name.startswith("leaders_"):
        is_noise, is_logit = index == 2, False
    elif name.startswith("draw_"):
        is_noise, is_logit = index > 1 and index % 3 == 1, index > 1 and index % 3 == 0
    else:
        return 1.0
    params = [entry.request.params for entry in plan.entries if entry.samples]
    cuts = [p.temperature > 0 and (p.top_k > 0 or p.top_p < 1 or p.min_p > 0) for p in params]
    ranks = [is_cut or p.logprobs is not None for is_cut, p in zip(cuts, params, strict=True)]
    looks = cuts if is_noise else ranks if is_logit else [True]
    return sum(looks) / max(1, len(looks))


def _buffer(tensor: Tensor) -> int:
    """The identity of a tensor's memory."""
    return id(tensor.uop.base.buffer.base)
