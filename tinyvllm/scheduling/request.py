"""One sequence that is being generated, from its arrival to its end."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from tinyvllm.config import SamplingParams
from tinyvllm.scheduling.block_hashes import pack_tokens
from tinyvllm.scheduling.state_pool import SequenceState

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


# The most known tokens that a step may compute together with drafts. Usually there is one, but where rejected drafts
# have spoiled a recurrent state, the tokens since then are computed again (scheduling/state_pool.py).
MAX_REDONE = 8


class Status(enum.Enum):
    WAITING = "waiting"  # no blocks; queued, new or preempted
    RUNNING = "running"  # owns blocks
    FINISHED = "finished"


class Constraint(Protocol):
    """Decides, token by token, what one request may generate. Its state follows the accepted tokens.

    Used on the engine's thread only. A preempted request keeps its constraint, as it keeps its output.
    """

    def fill_mask(self, out: NDArray[np.int32], after: Sequence[int] = ()) -> None:
        """Set the bits of the ids that may come next, or would come next after the drafts `after`, of which
        `count_allowed` allows all; if these complete the output, any bits. Never raises.

        out: (ceil(V/32),) int32 or uint32, C-contiguous; bit i%32 of word i//32 is id i. At least one bit is set, and
        EOS's if the output may end here.
        """

    def accept(self, token_id: int) -> bool:
        """Advance by a sampled token. False if it is not allowed or a limit was hit; `error` says which, and the
        request must end with finish_reason "error"."""

    def count_allowed(self, drafts: Sequence[int]) -> int:
        """How many of these ids may come next, one after another. Changes nothing, and never raises."""

    @property
    def is_finished(self) -> bool:
        """Whether the output is complete and nothing may follow: the request ends with finish_reason "stop"."""

    @property
    def error(self) -> str | None:
        """Why `accept` returned False; None if it has not."""


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural-log probabilities under the model's raw distribution, before a request's settings change it."""

    chosen: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), most likely first; as many as were requested
    rank: int | None = None  # of the chosen token; 1: the most likely


@dataclass(eq=False)  # compared by identity: two requests with equal prompts are different requests
class Request:
    """A prompt, its settings and its progress.

    [0, num_computed) in the pool · [num_computed, num_tokens) still to compute. Invariant while running:
    0 <= num_computed <= num_tokens, and num_computed <= room once the step's blocks are taken.

    A step may be planned while the device still runs the previous one. The tokens that the previous step computes and
    samples are already counted. Those it samples are in flight: their number is known, but not their ids.
    """

    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    eos_ids: frozenset[int] = frozenset()  # ids that end the text; empty when params.ignore_eos
    max_tokens: int = 16  # resolved: params.max_tokens, or what max_model_len leaves
    seed: int = 0  # resolved: params.seed, or one drawn by the engine; 32 bits
    priority: int = 0  # lower runs first, under the priority policy
    adapter: str = ""  # identifies the low-rank adapter (AdapterInfo.key) that it runs with; "": none
    adapter_slot: int = 0  # on the device, while it runs; 0: none
    hash_seed: bytes = b""  # where `block_hashes` begin (block_hashes.make_hash_seed): others' blocks are not found
    constraint: Constraint | None = None  # a grammar's matcher
    bad_words_ids: tuple[tuple[int, ...], ...] = ()  # params.bad_words as tokens
    # params.prompt_logprobs: how many most likely tokens to report for each prompt token; None: no prompt logprobs
    num_prompt_logprobs: int | None = None
    arrival: int = 0  # a counter that gives the order of arrival
    arrival_s: float = 0.0  # monotonic clock: when its client submitted it
    queued_s: float = 0.0  # monotonic clock: when the engine took it into its queue
    scheduled_s: float = 0.0  # monotonic clock: when it last left the queue
    # "mean", "cls", "last" or "score": the prompt is embedded, and the generated token is discarded
    pooling: str | None = None
    pooled: NDArray[np.float32] | None = None  # (hidden,): the sum of the normed states so far, or the last state
    output_ids: list[int] = field(default_factory=list)
    drafts: tuple[int, ...] = ()  # guesses at the tokens after `output_ids`, for the next step (scheduling/drafts.py)
    num_drafted: int = 0  # drafts that steps have verified
    num_accepted: int = 0  # of these, those that were the tokens sampled
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # of the prompt's tokens from the second on
    num_scored: int = 0  # prompt tokens whose logprobs are computed, by the steps in flight included
    num_computed: int = 0
    num_in_flight: int = 0  # newest tokens, sampled by steps whose output has not been read: their ids are unknown
    row: int = -1  # in the latest step's batch; -1: none yet
    flight_row: int = 0  # row of the token in flight among the tokens that its step samples
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache at first admission
    num_restored_tokens: int = 0  # of these, those whose blocks came from host memory or disk
    # for each group of layers the blocks in the order of its tokens, 0 for those given back; [] while it holds none
    tables: list[list[int]] = field(default_factory=list)
    room: int = 0  # tokens that the blocks of every group's table hold
    block_hashes: list[bytes] = field(default_factory=list)  # of full blocks, in order
    num_sealed: int = 0  # of its blocks, those that can be shared
    state: SequenceState | None = None  # its recurrent layers'; None while it has no blocks, or without such layers
    status: Status = Status.WAITING
    finish_reason: str | None = None  # stop, length, abort, error
    stop_reason: int | str | None = None  # the stop id or stop string that ended it
    error: str | None = None  # a message, when finish_reason is error
    num_preemptions: int = 0
    passage: Any = None  # the engine's notes on where its time goes (engine/step_clock.py)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.output_ids) + self.num_in_flight

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids) + self.num_in_flight

    @property
    def num_pending(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids) + self.num_in_flight - self.num_computed

    @property
    def last_hash(self) -> bytes:
        """What the hash of the next block continues from."""
        return self.block_hashes[-1] if self.block_hashes else self.hash_seed

    @property
    def max_drafts(self) -> int:
        """How many tokens may be drafted for the next step, which samples one more. 0 while the prompt is computed or a
        token is in flight."""
        if self.num_in_flight or not self.output_ids or self.num_pending > MAX_REDONE:
            return 0
        return self.max_tokens - len(self.output_ids) - 1

    @property
    def num_to_score(self) -> int:
        """Prompt tokens whose logprobs are still to be computed; the first token has none."""
        return 0 if self.num_prompt_logprobs is None else self.num_prompt_tokens - 1 - self.num_scored

    @property
    def suppressed_ids(self) -> tuple[int, ...]:
        """Ids that may not be sampled now, because min_tokens is not reached: EOS and stop ids."""
        return self.suppressed_after(0)

    def suppressed_after(self, num_drafts: int) -> tuple[int, ...]:
        """The same for the token after so many drafts."""
        if self.num_output_tokens + num_drafts >= self.params.min_tokens:
            return ()
        return tuple(sorted({*self.eos_ids, *self.params.stop_token_ids}))

    @cached_property
    def packed_prompt(self) -> bytes:
        """The prompt's ids as int32."""
        return pack_tokens(self.prompt_ids)

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Ids that may end the output."""
        return self.eos_ids.union(self.params.stop_token_ids)

    @cached_property
    def is_masked(self) -> bool:
        """Whether some ids are excluded from sampling, always or at times (min_tokens apart)."""
        return self.params.allowed_token_ids is not None or bool(self.bad_words_ids) or self.constraint is not None

    @cached_property
    def needs_logits_processing(self) -> bool:
        """Whether its tokens are sampled from logits that differ from the model's own."""
        params = self.params
        is_typical = params.typical_p < 1.0 and params.temperature > 0.0
        return self.is_masked or params.has_penalties or bool(params.logit_bias) or is_typical

    @cached_property
    def mask_follows_output(self) -> bool:
        """Whether the next token's mask depends on the tokens before it, all of which must then be known."""
        return self.constraint is not None or any(len(word) > 1 for word in self.bad_words_ids)

    def banned_ids(self, after: Sequence[int] = ()) -> list[int]:
        """Ids that would complete a bad word if sampled next, or after some drafts."""
        output = [*self.output_ids, *after] if after else self.output_ids
        return [
            word[-1]
            for word in self.bad_words_ids
            if len(word) <= len(output) + 1 and tuple(output[len(output) + 1 - len(word) :]) == word[:-1]
        ]

    def tokens(self, start: int, stop: int) -> list[int]:
        """Ids [start, stop) of the prompt followed by the output, up to the last known one."""
        split = len(self.prompt_ids)
        if stop <= split:
            return self.prompt_ids[start:stop]
        return self.prompt_ids[start:split] + self.output_ids[max(start - split, 0) : stop - split]
