"""The operations of each call of a step: multiplications and additions of matrix products and attention."""

from __future__ import annotations

from collections.abc import Sequence

from tinyvllm.device.recording import Call
from tinyvllm.execution.call_names import STATES, UNPACK, CallNamer, Named, base_of, place_of, program_of, written_by
from tinyvllm.model.registry import Model
from tinyvllm.ops.backend import KVPool
from tinyvllm.profiling.names import role_of
from tinyvllm.profiling.roofline import OPERATIONS_A_STATE, attended_keys, operations_a_key
from tinyvllm.scheduling.plan import StepPlan


class FlopCounter:
    """Counts multiplications and additions of matrix products and attention, but not of norms, rope and sampling; for
    the plan, without the bucket's padding."""

    def __init__(self, model: Model, pool: KVPool, block_size: int) -> None:
        self._namer = CallNamer(model, pool)
        self._model = model
        # elements of one token in each of the pool's tensors; of a plane of scales, none
        self._pool = {base_of(tensor): 0 for layer in pool.num_blocks for tensor in pool.tensors_of(layer)} | {
            base_of(tensor): tensor.nbytes() * 8 // form.bits // (count * block_size)
            for layer, count in pool.num_blocks.items()
            for tensor, form in pool.codes_of(layer)
        }
        # elements of one sequence's matrices in each of their tensors
        self._states = {
            base_of(tensor): tensor.numel() // pool.num_state_slots
            for tensors in pool.matrices.values()
            for tensor in (tensors if isinstance(tensors, tuple) else (tensors,))
        }

    def count(self, calls: Sequence[Call], plan: StepPlan) -> list[int]:
        """Operations of one run of each call."""
        unpacked: dict[tuple[int, int], Named] = {}
        counts = []
        for call in calls:
            role, touched = role_of(program_of(call)), self._namer.touched(call)
            first = next(iter(touched), None)
            copies = [unpacked[place_of(buffer)] for buffer in call.buffers if place_of(buffer) in unpacked]
            for buffer in written_by(call):  # scratch memory is reused
                unpacked.pop(place_of(buffer), None)
                if role == UNPACK and first is not None:
                    unpacked[place_of(buffer)] = first
            if first is not None and first.path.startswith(STATES):
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
        if all(id(buffer.base) in in_pool for buffer in written_by(call)):
            return 0
        kind, mixer = self._model.attention_of(layer)
        seen = sum(attended_keys(entry.start, entry.count, kind.window) for entry in plan.entries)
        if kind.latent is not None:  # cores share the heads, and each reads the whole latents
            (up,) = mixer.matrices["key_up"]
            return operations_a_key(kind) * seen // len(up.shards)
        group = kind.num_heads // kind.num_kv_heads  # query heads that a KV head serves
        shards = len(mixer.matrices["qkv"][0].shards)
        cores = max(1, min(group, shards // kind.num_kv_heads))  # that divide these: of a CPU, or 1
        return 2 * group * seen * sum(self._pool[base] for base in in_pool) // cores
