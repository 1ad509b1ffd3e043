"""What DEBUG=2 prints of a step: each kernel's name and counts, as in `tinyvllm profile`."""

from __future__ import annotations

from collections.abc import Sequence

from tinygrad import Tensor

from tinyvllm.device.jit_replay import JitReplay
from tinyvllm.device.recording import Call, RecordedStep
from tinyvllm.execution.call_names import CallName, CallNamer
from tinyvllm.execution.cost import CostCounter
from tinyvllm.execution.inputs import InputPacker
from tinyvllm.execution.operations import FlopCounter
from tinyvllm.model.registry import Model
from tinyvllm.ops.backend import KVPool
from tinyvllm.profiling.names import trace_label


class Describer:
    """Describes the kernels of steps of one model and pool."""

    def __init__(self, model: Model, pool: KVPool, block_size: int) -> None:
        self._namer = CallNamer(model, pool)
        self._costs, self._operations = CostCounter(model, pool, block_size), FlopCounter(model, pool, block_size)

    def describe_step(
        self, step: RecordedStep, forward: JitReplay, sample: JitReplay, packer: InputPacker, inputs: Tensor
    ) -> None:
        """Describe a step's two parts. `packer` has the plan of the run to come, `inputs` is what it fills."""
        names = self._namer.name(step.calls, step.cut)
        self._describe(forward, names[: step.cut], packer, inputs)
        self._describe(sample, names[step.cut :], packer, inputs)

    def describe_sampling(self, sample: JitReplay, packer: InputPacker, inputs: Tensor) -> None:
        """Describe the kernels that sample from processed logits."""
        self._describe(sample, self._namer.name(sample.step.calls, 0), packer, inputs)

    def _describe(self, replay: JitReplay, names: Sequence[CallName], packer: InputPacker, inputs: Tensor) -> None:
        labels = [trace_label(name.layer, name.operation) for name in names]
        replay.describe(labels, lambda: self._amounts(replay.step.calls, packer, inputs))

    def _amounts(self, calls: Sequence[Call], packer: InputPacker, inputs: Tensor) -> list[tuple[int, int]]:
        """(bytes, operations) of each call."""
        plan = packer.plan
        assert plan is not None, "a step runs after its plan was packed"
        nbytes = [self._costs.moved_by(call, inputs, plan) for call in calls]
        return list(zip(nbytes, self._operations.count(calls, plan), strict=True))
