"""The one int32 buffer that carries a step's inputs to the device, and where each of them lies in it.

One buffer means one host-to-device copy a step, and one kernel argument where six would be (METAL allows 31 in all).
Floats travel as their bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tinyvllm.config import MAX_STOP_IDS

# The float settings of logits processing, with the value that turns each off. Their names are fields of SamplingParams.
PROCESSING_FLOATS = {"repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0, "typical_p": 1.0}


@dataclass(frozen=True)
class StepLayout:
    """Offsets (in int32 words) of a bucket's inputs. Hashable: kernels are cached by it.

    T token rows · R sequences · M blocks a table. Table R (behind the last sequence) is all zeros: padded token rows
    point to it, and so to the dummy block 0. What sampling reads comes first, at offsets that depend on R alone: all
    buckets of R sequences sample by the same programs.
    """

    num_tokens: int  # T
    num_seqs: int  # R
    max_blocks: int  # M
    block_size: int

    @cached_property
    def _offsets(self) -> dict[str, tuple[int, int]]:
        tokens, seqs = self.num_tokens, self.num_seqs
        sizes = {
            "temperature": seqs,  # float bits; 0 is greedy
            "top_k": seqs,  # 0: off
            "top_p": seqs,  # float bits; 1: off
            "min_p": seqs,  # float bits; 0: off
            "seed": seqs,
            "draw": seqs,  # how many tokens this request has drawn before: the noise's counter
            "num_logprobs": seqs,  # -1: none; 0: the chosen token's; n: and the n likeliest
            "suppressed_ids": seqs * MAX_STOP_IDS,  # ids that min_tokens keeps from being sampled; -1: unused
            "forced": seqs,  # the token to report instead of sampling one: a prompt's own; -1: none
            # read with logits processing only: see ops/sampling/logits_processing.py
            "state_rows": seqs,  # the request's row of the sampling state; -1: none
            "is_counted": seqs,  # 1: the penalties below apply, and the token is counted
            "is_masked": seqs,  # 1: only the ids of the state row's mask may be sampled
            "num_bias": seqs,  # entries of the state row's logit bias
            **dict.fromkeys(PROCESSING_FLOATS, seqs),  # float bits
            "token_ids": tokens,
            "positions": tokens,  # of the token in its sequence
            "slots": tokens,  # where its key and value go: block_id * block_size + offset
            "seq_rows": tokens,  # which block table is its own
            "logit_rows": seqs,  # token row whose logits are sampled, by sequence: for taking it, not for sampling
            "block_tables": (seqs + 1) * self.max_blocks,
        }
        offsets, start = {}, 0
        for name, size in sizes.items():
            offsets[name] = (start, size)
            start += size
        offsets["end"] = (start, 0)
        return offsets

    def offset(self, name: str) -> int:
        return self._offsets[name][0]

    @property
    def num_sampling_words(self) -> int:
        """int32 words at the buffer's beginning that hold all that sampling reads."""
        return self.offset("token_ids")

    @property
    def size(self) -> int:
        """int32 words of the whole buffer."""
        return self._offsets["end"][0]

    def views(self, buffer: np.ndarray) -> dict[str, np.ndarray]:
        """Named int32 views of a host buffer of `size` words; view floats with `.view(np.float32)`."""
        views = {name: buffer[start : start + size] for name, (start, size) in self._offsets.items() if name != "end"}
        views["suppressed_ids"] = views["suppressed_ids"].reshape(self.num_seqs, MAX_STOP_IDS)
        views["block_tables"] = views["block_tables"].reshape(self.num_seqs + 1, self.max_blocks)
        return views
