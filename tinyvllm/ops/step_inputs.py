"""The layout of the one int32 buffer that carries a step's inputs to the device.

One buffer means one host-to-device copy for each step, and one kernel argument instead of six (METAL allows 31 in all).
Floats are stored as their bits.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import accumulate
from typing import Any

import numpy as np

from tinyvllm.config import MAX_STOP_IDS

# The float settings of logits processing, with the value that turns each off. Their names are fields of SamplingParams.
PROCESSING_FLOATS = {"repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0, "typical_p": 1.0}

# What sampling reads of a row, side by side: the words of each field.
ROW_FIELDS = {
    "temperature": 1,  # float bits; 0 is greedy
    "top_k": 1,  # 0: off
    "top_p": 1,  # float bits; 1: off
    "min_p": 1,  # float bits; 0: off
    "seed": 1,
    "draw": 1,  # how many tokens this request has drawn so far: the counter of its random numbers
    "num_logprobs": 1,  # -1: none; 0: the chosen token's; n: those of the n likeliest too
    "suppressed_ids": MAX_STOP_IDS,  # ids that min_tokens keeps from being sampled; -1: unused
    "forced": 1,  # the token to report instead of sampling one: a prompt's own; -1: none
    # read with logits processing only: see ops/sampling/logits_processing.py
    "state_rows": 1,  # the request's row of the sampling state; -1: none
    "is_counted": 1,  # 1: the penalties below apply, and the token is counted
    "is_masked": 1,  # 1: only the ids of the state row's mask may be sampled
    "num_bias": 1,  # entries of the state row's logit bias
    "mask_rows": 1,  # the row of the state's masks
    # drafts: a request's rows lie one after another, each of a draft after the one of its last known token
    "draft": 1,  # the draft that the row computes; -1: its token is known
    "num_before": 1,  # drafts up to the row's own
    "num_after": 1,  # drafts after a row without one
}  # and PROCESSING_FLOATS, as float bits


def row_places() -> tuple[dict[str, tuple[int, int]], int]:
    """(first word, words) of each field of a row's sampling settings, and the words of all."""
    return _places_of(tuple(PROCESSING_FLOATS))


@cache
def _places_of(floats: tuple[str, ...]) -> tuple[dict[str, tuple[int, int]], int]:
    sizes = ROW_FIELDS | dict.fromkeys(floats, 1)
    starts = accumulate(sizes.values(), initial=0)
    return {name: (start, size) for (name, size), start in zip(sizes.items(), starts, strict=False)}, sum(
        sizes.values()
    )


def row_word(name: str, row: Any) -> Any:
    """Where a field of a row's sampling settings begins. row: a number, or a kernel's axis."""
    places, num_words = row_places()
    return row * num_words + places[name][0]


@dataclass(frozen=True)
class StepLayout:
    """Offsets (in int32 words) of a bucket's inputs. Hashable: kernels are cached by it.

    T token rows · R sequences · M blocks in a table · G groups of layers, each with slots and block tables of its own.
    Table R, after the last one, is all zeros: padded token rows refer to it, and so to the dummy block 0. What sampling
    reads comes first, row by row: no offset depends on R, so all buckets sample by the same programs.
    """

    num_tokens: int  # T
    num_seqs: int  # R
    max_blocks: int  # M
    block_size: int
    num_groups: int = 1  # G
    has_states: bool = field(default=False, kw_only=True)  # the model has recurrent layers
    has_drafts: bool = field(default=False, kw_only=True)  # steps may have drafts
    has_adapters: bool = field(default=False, kw_only=True)  # some rows have an adapter (ops/adapter_spec.py)
    has_drafting: bool = field(default=False, kw_only=True)  # the model has a layer that drafts
    # (T, R) that every field has room for; None: the layout's own. Layouts with the same room have the same offsets, so
    # that kernels whose rows are independent are the same for all of them
    room: tuple[int, int] | None = field(default=None, kw_only=True)

    @property
    def widest(self) -> StepLayout:
        """The layout with the same offsets that uses all the room."""
        return self if self.room is None else replace(self, num_tokens=self.room[0], num_seqs=self.room[1])

    @cached_property
    def _offsets(self) -> dict[str, tuple[int, int]]:
        tokens, seqs = self.room or (self.num_tokens, self.num_seqs)
        sizes = {
            "rows": seqs * row_places()[1],  # the fields of each row
            "token_ids": tokens,
            "positions": tokens,  # of the token in its sequence
            # by group: where the token's key and value go: block_id * block_size + offset
            "slots": self.num_groups * tokens,
            "seq_rows": tokens,  # the token's block table
            "logit_rows": seqs,  # the token row whose logits are sampled, for each sequence
            "block_tables": self.num_groups * (seqs + 1) * self.max_blocks,  # by group
        }
        if self.has_states:
            # the slots of each sequence's state: the one that it is read from, and the one that it is written to. They
            # differ where the state read must be kept. Slot 0 is a dummy. A sequence at position 0 reads zeros instead
            sizes |= {"state_reads": seqs, "state_writes": seqs}
            sizes["first_rows"] = seqs + 1  # the token row where each sequence begins; the last: the end of all
        if self.has_adapters:
            sizes["adapter_slots"] = tokens  # of the token row's adapter; 0: none
        if self.has_drafting:
            sizes["next_ids"] = tokens  # of the token after each row; -1 - r: the one that this step samples in row r
        offsets, start = {}, 0
        for name, size in sizes.items():
            offsets[name] = (start, size)
            start += size
        offsets["end"] = (start, 0)
        return offsets

    def offset(self, name: str) -> int:
        return self._offsets[name][0]

    def slots_offset(self, group: int) -> int:
        """Where the slots of a group of layers begin."""
        return self.offset("slots") + group * self.widest.num_tokens

    def table_offset(self, group: int) -> int:
        """Where the block tables of a group of layers begin."""
        return self.offset("block_tables") + group * (self.widest.num_seqs + 1) * self.max_blocks

    @property
    def num_sampling_words(self) -> int:
        """int32 words at the start of the buffer that hold everything that sampling reads."""
        return self.num_seqs * row_places()[1]

    @property
    def size(self) -> int:
        """int32 words of the whole buffer."""
        return self._offsets["end"][0]

    def views(self, buffer: np.ndarray) -> dict[str, np.ndarray]:
        """Named int32 views of a host buffer of `size` words; view floats with `.view(np.float32)`."""
        tokens, seqs = self.widest.num_tokens, self.widest.num_seqs
        views = {name: buffer[start : start + size] for name, (start, size) in self._offsets.items() if name != "end"}
        rows = views.pop("rows").reshape(seqs, -1)[: self.num_seqs]
        views["slots"] = views["slots"].reshape(self.num_groups, tokens)[:, : self.num_tokens]
        tables = views["block_tables"].reshape(self.num_groups, seqs + 1, self.max_blocks)
        views["block_tables"] = tables[:, : self.num_seqs + 1]
        used = dict.fromkeys(("token_ids", "positions", "seq_rows", "adapter_slots", "next_ids"), self.num_tokens)
        used |= dict.fromkeys(("logit_rows", "state_reads", "state_writes"), self.num_seqs)
        used["first_rows"] = self.num_seqs + 1
        views |= {name: views[name][:count] for name, count in used.items() if name in views}
        for name, (place, width) in row_places()[0].items():
            views[name] = rows[:, place] if width == 1 else rows[:, place : place + width]
        return views
