"""Which shapes are captured, and which of them a plan takes."""

from __future__ import annotations

import re

import pytest

from tests.execution.driver import make_request
from tinyvllm.config import Capacity, EngineConfig
from tinyvllm.errors import InvariantError, TinyvllmError
from tinyvllm.execution.buckets import Bucket, choose_bucket, make_buckets
from tinyvllm.scheduling.plan import Scheduled, StepPlan


def sizes(buckets: list[Bucket]) -> tuple[list[int], list[int]]:
    """(decode, prefill)."""
    decode = [bucket.num_tokens for bucket in buckets if bucket.is_decode]
    return decode, [bucket.num_tokens for bucket in buckets if not bucket.is_decode]


@pytest.mark.parametrize(
    ("seqs", "tokens", "decode", "prefill"),
    [
        (16, 256, [1, 2, 4, 8, 16], [16, 64, 256]),
        (1, 8, [1], [8]),
        (12, 300, [1, 2, 4, 8, 12], [16, 64, 256, 300]),
    ],
)
def test_buckets_grow_to_their_limits(seqs: int, tokens: int, decode: list[int], prefill: list[int]) -> None:
    config = EngineConfig("tiny", max_num_seqs=seqs, max_num_batched_tokens=tokens)
    assert sizes(make_buckets(config)) == (decode, prefill)


def test_given_buckets_are_sorted_and_taken_once() -> None:
    config = EngineConfig("tiny", decode_buckets=(16, 1, 4, 4), token_buckets=(256, 32))
    assert sizes(make_buckets(config)) == ([1, 4, 16], [32, 256])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("decode_buckets", (1, 8), "--decode-buckets is (1, 8): the largest must equal --max-num-seqs (16)"),
        ("decode_buckets", (1, 32), "--decode-buckets is (1, 32): the largest must equal --max-num-seqs (16)"),
        (
            "token_buckets",
            (0, 256),
            "--token-buckets is (0, 256): the largest must equal --max-num-batched-tokens",
        ),
    ],
)
def test_buckets_that_do_not_end_at_the_limit_are_refused(field: str, value: tuple[int, ...], message: str) -> None:
    with pytest.raises(TinyvllmError, match=re.escape(message)):
        make_buckets(EngineConfig("tiny", **{field: value}))


def make_plan(*counts: tuple[int, int]) -> StepPlan:
    """Entries of (tokens in this step, tokens that stay for later)."""
    return StepPlan(tuple(Scheduled(make_request([1] * (count + rest)), 0, count) for count, rest in counts))


BUCKETS = [Bucket(1, True), Bucket(4, True), Bucket(8, False), Bucket(32, False)]


@pytest.mark.parametrize(
    ("counts", "name"),
    [
        ([(1, 0)], "decode 1"),
        ([(1, 0)] * 2, "decode 4"),
        ([(1, 0)] * 4, "decode 4"),
        ([(2, 0)], "prefill 8"),
        ([(1, 3)], "prefill 8"),  # one token that does not sample: the decode graph would sample it
        ([(1, 0), (1, 1)], "prefill 8"),
        ([(1, 0), (8, 0)], "prefill 32"),
    ],
)
def test_a_plan_takes_the_smallest_bucket_of_its_kind(counts: list[tuple[int, int]], name: str) -> None:
    assert choose_bucket(BUCKETS, make_plan(*counts)).name == name


def test_a_plan_for_which_there_is_no_bucket_is_our_bug() -> None:
    with pytest.raises(InvariantError, match=r"no bucket for a plan of 33 tokens .* among \['decode 1'"):
        choose_bucket(BUCKETS, make_plan((33, 0)))


def test_layouts_hold_the_longest_sequence() -> None:
    capacity = Capacity(num_blocks=100, block_size=16, max_model_len=100, max_num_seqs=4, max_num_batched_tokens=32)
    decode, prefill = Bucket(2, True).layout(capacity), Bucket(32, False).layout(capacity)
    assert (decode.num_tokens, decode.num_seqs, decode.max_blocks, decode.block_size) == (2, 2, 7, 16)
    assert (prefill.num_tokens, prefill.num_seqs, prefill.max_blocks) == (32, 4, 7)
