"""A bucket's step as code that launches its kernels, what it needs, and the name under which it is stored."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict

from tinyvllm.config import Capacity
from tinyvllm.device.recording import head_of_tensor, keep
from tinyvllm.device.scratch import Scratch
from tinyvllm.execution.buckets import Bucket
from tinyvllm.execution.watched import Describer
from tinyvllm.model.registry import Model
from tinyvllm.ops.backend import Backend, KVPool, Step
from tinyvllm.ops.kernel import tuning
from tinyvllm.ops.sampling.logits_processing import SamplingState
from tinyvllm.ops.step_inputs import StepLayout

LEAST_ROOM = (256, 16)  # (tokens, rows) that inputs have room for at least: a CPU's default limits


@dataclass(frozen=True)
class GraphContext:
    """What the graphs of all buckets share. `outputs`: one per instance, (rows * OUT_WIDTH,) int32. `capture`: how a
    step is replayed, as in EngineConfig. `scratch`: the memory of each step's intermediate values, since one step runs
    at a time; TinyJit takes its own."""

    model: Model
    backend: Backend
    pool: KVPool
    capacity: Capacity
    outputs: tuple[Tensor, ...]
    state: SamplingState
    capture: str = "replay"
    scratch: Scratch = field(default_factory=Scratch)

    @property
    def is_jit(self) -> bool:
        return self.capture == "tinyjit"

    def layout(self, bucket: Bucket) -> StepLayout:
        """A bucket's inputs. On a CPU, where they are not copied, those of all buckets have the same offsets: of
        engines with other limits, too, so that they find each other's steps."""
        layout, capacity = bucket.layout(self.capacity), self.capacity
        if not self.backend.device.is_cpu:
            return layout
        seqs = max(capacity.max_num_seqs, capacity.max_verify_rows, bucket.num_seqs)
        tokens = max(capacity.max_num_batched_tokens, seqs, bucket.num_tokens)
        return replace(layout, room=(_power_from(max(tokens, LEAST_ROOM[0])), _power_from(max(seqs, LEAST_ROOM[1]))))

    @functools.cached_property
    def named(self) -> dict[str, Tensor]:
        """The tensors of model, backend and pool by name."""
        named: dict[str, Tensor] = get_state_dict({"model": self.model, "backend": self.backend, "pool": self.pool})
        return named

    @functools.cached_property
    def shapes(self) -> str:
        """The shapes of `named`."""
        return _shapes(self.named)

    @functools.cached_property
    def digest(self) -> str:
        """`model_digest`'s."""
        return model_digest(self.model, self.backend)

    @functools.cached_property
    def describer(self) -> Describer:
        """What names kernels while they are watched."""
        return Describer(self.model, self.pool, self.capacity.block_size)


@dataclass(frozen=True)
class StepCode:
    """A bucket's step as code that launches its kernels, on one instance's inputs and the outputs of all."""

    bucket: Bucket
    layout: StepLayout
    context: GraphContext
    inputs: Tensor
    outputs: tuple[Tensor, ...]  # its own first, the previous step's last

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that it reads and writes, besides the model's weights and the pool."""
        return {"inputs": self.inputs, **{f"output {i}": tensor for i, tensor in enumerate(self.outputs)}}

    @property
    def named(self) -> dict[str, Tensor]:
        """All tensors that the step reads and writes, by the names that a stored step has for them."""
        return self.tensors | self.context.named

    def sampling_tensors(self, logits: Tensor) -> dict[str, Tensor]:
        """Those of sampling from processed logits."""
        state = self.context.state
        own = {"logits": logits, "counts": state.counts, "mask": state.mask, "bias": state.bias}
        noted = {} if self.context.model.drafting is None else self.context.named
        return self.tensors | noted | own

    @property
    def name(self) -> str:
        """The name of the stored step: a hash of everything that determines what is traced: our code, the model's shape
        and formats, the settings.

        An attribute of the backend without a repr of its own only makes the name new at every start."""
        context = self.context
        facts = (
            sources_digest(),
            tuning.current.digest,
            context.digest,
            (context.pool.num_blocks, context.pool.formats, context.pool.num_state_slots),
            (self.bucket, self.layout),
            (_shapes(self.tensors), context.shapes),
        )
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:40]

    def forward(self) -> Tensor:
        """The logits, which are kept."""
        context = self.context
        logits = context.model(self._step(self.outputs[-1]))
        keep(logits)
        return logits

    def sample(self, logits: Tensor, state: SamplingState | None = None) -> Tensor:
        """The output, sampled from the logits; with a `state` from processed logits. What the model's drafting layer
        needs of the step is noted after it."""
        model, layout = self.context.model, self.layout
        # sampling's inputs, and so its programs, are the same for all buckets with this number of sequences
        settings = head_of_tensor(self.inputs, layout.num_sampling_words)
        vocab_size, stride, output = model.config.vocab_size, model.logit_stride, self.outputs[0]
        sampled = self.context.backend.sample(logits, vocab_size, stride, settings, layout, output, state).realize()
        if model.drafting is not None:
            model.note_for_drafts(self._step(sampled))
        return sampled

    def _step(self, previous_output: Tensor) -> Step:
        return Step(
            self.layout,
            self.inputs,
            self.context.pool,
            self.bucket.is_decode,
            previous_output,
            verifies=self.bucket.is_verify,
        )


def _shapes(tensors: Mapping[str, Tensor]) -> str:
    return repr({key: (tensor.numel(), tensor.dtype) for key, tensor in tensors.items()})


def model_digest(model: Model, backend: Backend) -> str:
    """A hash of the model's shape and formats and of its backend's settings."""
    matrices = [(m.format, m.num_rows, m.num_cols, m.used_rows, m.layout) for m in model.matrices]
    settings = {key: value for key, value in sorted(vars(backend).items()) if not isinstance(value, Tensor)}
    facts = (
        (type(model).__qualname__, dataclasses.replace(model.config, name=""), model.logit_stride, matrices),
        (type(backend).__qualname__, settings),
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:24]


@functools.cache
def sources_digest() -> str:
    """A hash of this package's code, since all of it may affect a step."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)} ".encode() + path.read_bytes())
    return digest.hexdigest()


def _power_from(value: int) -> int:
    """The least power of two that is not less."""
    return 1 << (value - 1).bit_length()
