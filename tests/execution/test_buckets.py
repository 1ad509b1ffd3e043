"""Which shapes are captured, and which of them a plan takes."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.execution.driver import make_request
from tinyvllm.config import Capacity, EngineConfig, Limits
from tinyvllm.device.handle import DeviceHandle
from tinyvllm.errors import InvariantError, TinyvllmError
from tinyvllm.execution.buckets import (
    FEW_ROWS,
    Bucket,
    choose_bucket,
    first_buckets,
    least_context,
    make_buckets,
    named,
    within,
)
from tinyvllm.execution.limits import device_limits, resolve_limits
from tinyvllm.scheduling.plan import ContinuedPlan, Scheduled, StepPlan


def buckets_of(seqs: int, tokens: int, **config: Any) -> list[Bucket]:
    return make_buckets(Limits(seqs, tokens), EngineConfig("tiny", **config))


def sizes(buckets: list[Bucket]) -> tuple[list[int], list[int]]:
    """(decode, prefill)."""
    decode = [bucket.num_tokens for bucket in buckets if bucket.is_decode]
    return decode, [bucket.num_tokens for bucket in buckets if not bucket.is_decode]


@pytest.mark.parametrize(
    ("seqs", "tokens", "decode", "prefill"),
    [
        (16, 256, [1, 2, 4, 8, 16], [16, 32, 64, 128, 256]),
        (1, 8, [1], [8]),
        (12, 300, [1, 2, 4, 8, 12], [16, 32, 64, 128, 256, 300]),
    ],
)
def test_buckets_grow_to_their_limits(seqs: int, tokens: int, decode: list[int], prefill: list[int]) -> None:
    assert sizes(buckets_of(seqs, tokens)) == (decode, prefill)


def test_buckets_are_found_by_name_with_those_for_short_contexts() -> None:
    buckets = make_buckets(Limits(2, 8), EngineConfig("tiny"), lambda num_rows, verifies: (512,))

    def names(*wanted: str) -> list[str]:
        return [bucket.name for bucket in named(wanted, buckets)]

    assert names("prefill 8", "decode 1") == ["decode 1 up to 512", "decode 1", "prefill 8"]
    assert names("decode 2 up to 512") == ["decode 2 up to 512"]
    known = "decode 1 up to 512, decode 1, decode 2 up to 512, decode 2, prefill 8"
    with pytest.raises(TinyvllmError, match=f"'decode 3', 'prefil 8': with these flags there are {known}$"):
        names("decode 1", "prefil 8", "decode 3")


def test_given_buckets_are_sorted_and_taken_once() -> None:
    assert sizes(buckets_of(16, 256, decode_buckets=(16, 1, 4, 4), token_buckets=(256, 32))) == ([1, 4, 16], [32, 256])


def test_token_counts_where_logits_weigh_have_a_graph_for_few_sequences() -> None:
    """256 rows of logits took a fifth of the step of a prompt of 512 tokens."""
    names = [bucket.name for bucket in buckets_of(256, 8192) if not bucket.is_decode]
    assert names == [
        "prefill 16", "prefill 32", "prefill 64 of 16", "prefill 64", "prefill 128 of 16", "prefill 128",
        "prefill 256 of 16", "prefill 256", "prefill 512 of 16", "prefill 512", "prefill 1024 of 16", "prefill 1024",
        "prefill 2048 of 16", "prefill 2048", "prefill 4096", "prefill 8192",
    ]  # fmt: skip
    assert len(buckets_of(16, 256)) == 10, "where all sequences are few there is one graph a token count"


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
        buckets_of(16, 256, **{field: value})


def make_plan(*counts: tuple[int, int]) -> StepPlan:
    """Entries of (tokens in this step, tokens that stay for later)."""
    return StepPlan(tuple(Scheduled(make_request([1] * (count + rest)), 0, count) for count, rest in counts))


def token_bucket(num_tokens: int, num_seqs: int = 4) -> Bucket:
    return Bucket(num_tokens, False, num_seqs)


BUCKETS = [Bucket.decode(1), Bucket.decode(4), token_bucket(8), token_bucket(32)]


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


def test_decodes_run_in_a_token_bucket_where_there_is_no_other() -> None:
    assert choose_bucket(BUCKETS[2:], make_plan((1, 0))).name == "prefill 8"


def test_prompts_in_small_company_leave_the_other_rows_of_logits_out() -> None:
    buckets = buckets_of(256, 2048)
    assert choose_bucket(buckets, make_plan((500, 0))).name == "prefill 512 of 16"
    assert choose_bucket(buckets, make_plan((480, 0), *[(1, 0)] * 15)).name == "prefill 512 of 16"
    assert choose_bucket(buckets, make_plan((480, 0), *[(1, 0)] * 16)).name == "prefill 512"


def test_rows_that_score_a_prompt_count() -> None:
    request = make_request([1] * 100)
    request.num_prompt_logprobs = 0
    assert choose_bucket(buckets_of(64, 128), StepPlan((Scheduled(request, 0, FEW_ROWS),))).name == "prefill 16"
    assert choose_bucket(buckets_of(64, 128), StepPlan((Scheduled(request, 0, 60),))).name == "prefill 64"


def test_a_plan_for_which_there_is_no_bucket_is_our_bug() -> None:
    with pytest.raises(InvariantError, match=r"no bucket for a plan of 33 tokens, .* among \['decode 1'"):
        choose_bucket(BUCKETS, make_plan((33, 0)))


LIMITS = st.integers(1, 300).flatmap(lambda seqs: st.builds(Limits, st.just(seqs), st.integers(seqs, 9000)))


@given(LIMITS, st.data())
def test_every_plan_within_the_limits_has_a_bucket_and_takes_the_smallest(limits: Limits, data: st.DataObject) -> None:
    buckets = make_buckets(limits, EngineConfig("tiny"))
    num_seqs = data.draw(st.integers(1, limits.max_num_seqs))
    longest = data.draw(st.integers(1, max(1, limits.max_num_batched_tokens // num_seqs)))
    counts = data.draw(
        st.lists(st.tuples(st.integers(1, longest), st.integers(0, 1)), min_size=num_seqs, max_size=num_seqs)
    )
    plan = make_plan(*counts)
    chosen = choose_bucket(buckets, plan)
    assert chosen.holds(plan)
    assert chosen.is_decode == plan.is_decode
    smaller = [bucket for bucket in buckets if bucket.is_decode == chosen.is_decode and bucket != chosen]
    for bucket in smaller:
        if bucket.num_tokens <= chosen.num_tokens and bucket.num_seqs <= chosen.num_seqs:
            assert not bucket.holds(plan)
    first = choose_bucket(first_buckets(buckets), plan)
    assert first.holds(plan), "the first graphs serve everything"
    assert chosen.num_tokens <= first.num_tokens
    if not plan.is_decode and plan.num_tokens > 16:
        assert chosen.num_tokens < 2 * max(plan.num_tokens, len(counts)) or chosen.num_tokens in (16, 32)


@given(LIMITS)
def test_few_graphs_are_captured(limits: Limits) -> None:
    """One a doubling of tokens and of sequences, and at most as many again for few sequences."""
    buckets = make_buckets(limits, EngineConfig("tiny"))
    seqs, tokens = limits.max_num_seqs.bit_length(), limits.max_num_batched_tokens.bit_length()
    assert len(buckets) == len(set(buckets)) <= (seqs + 1) + (tokens + 1) + max(0, seqs - 2)
    assert len({bucket.name for bucket in buckets}) == len(buckets)


def test_layouts_hold_the_longest_sequence() -> None:
    capacity = Capacity(num_blocks=100, block_size=16, max_model_len=100, max_num_seqs=4, max_num_batched_tokens=32)
    decode, prefill = Bucket.decode(2).layout(capacity), token_bucket(32).layout(capacity)
    assert (decode.num_tokens, decode.num_seqs, decode.max_blocks, decode.block_size) == (2, 2, 7, 16)
    assert (prefill.num_tokens, prefill.num_seqs, prefill.max_blocks) == (32, 4, 7)


# -- graphs for short contexts -----------------------------------------------------------------------------------------

SPECULATION = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 4}}
SHORT = 16  # tokens


def short_of_few(num_rows: int, verifies: bool) -> tuple[int, ...]:
    return () if num_rows > 4 else (2 * SHORT,) if verifies else (SHORT // 2, SHORT) if num_rows == 1 else (SHORT,)


def with_short(**config: Any) -> list[Bucket]:
    return make_buckets(Limits(8, 64), EngineConfig("tiny", **config), short_of_few)


def decoding(*lengths: int, drafts: int = 0) -> StepPlan:
    """A plan in which requests of so many tokens decode, each with drafts."""
    requests = [make_request([1] * length) for length in lengths]
    return StepPlan(
        tuple(Scheduled(one, one.num_tokens - 1, 1 + drafts, (2,) * drafts) for one in requests),
    )


def test_steps_of_few_rows_have_a_second_graph_for_short_contexts() -> None:
    buckets = with_short(**SPECULATION)
    names = [bucket.name for bucket in buckets if not bucket.is_for_prompts]
    assert names[:9] == [
        "decode 1 up to 8", "decode 1 up to 16", "decode 1", "decode 2 up to 16", "decode 2", "decode 4 up to 16",
        "decode 4", "decode 8", "verify 2 up to 32",
    ]  # fmt: skip
    assert [bucket.name for bucket in first_buckets(buckets)] == ["prefill 64", "decode 8", "verify 40"]
    assert not any(bucket.max_context for bucket in buckets_of(8, 64)), "only where a backend wants some"
    few = make_buckets(Limits(2, 8), EngineConfig("tiny"), short_of_few)
    assert [bucket.name for bucket in first_buckets(few)] == ["prefill 8", "decode 2"], "these hold everything"


@pytest.mark.parametrize(
    ("plan", "name"),
    [
        (decoding(SHORT // 2), "decode 1 up to 8"),
        (decoding(SHORT // 2 + 1), "decode 1 up to 16"),
        (decoding(SHORT), "decode 1 up to 16"),
        (decoding(SHORT + 1), "decode 1"),
        (decoding(2, 5, SHORT), "decode 4 up to 16"),
        (decoding(2, 5, SHORT + 1), "decode 4"),
        (decoding(*[3] * 5), "decode 8"),
        (decoding(2 * SHORT - 2, drafts=2), "verify 3 up to 32"),
        (decoding(2 * SHORT - 1, drafts=2), "verify 3"),
        (decoding(3, 2 * SHORT - 1, drafts=1), "verify 4 up to 32"),
        (ContinuedPlan(decoding(3, 4), [4, SHORT - 1]), "decode 2 up to 16"),
        (ContinuedPlan(decoding(3, 4), [4, SHORT]), "decode 2"),
    ],
)
def test_a_step_takes_the_graph_of_the_shortest_contexts_that_holds_it(plan: StepPlan, name: str) -> None:
    buckets = with_short(**SPECULATION)
    chosen = choose_bucket(buckets, plan)
    assert chosen.name == name
    assert least_context(chosen, buckets) <= plan.longest <= (chosen.max_context or plan.longest)


def test_the_least_context_of_a_graph_is_more_than_shorter_ones_hold() -> None:
    buckets = with_short()
    assert [least_context(one, buckets) for one in buckets[:5]] == [1, 1 + SHORT // 2, 1 + SHORT, 1, 1 + SHORT]


def test_without_adapters_a_step_of_a_long_context_takes_no_graph_with_them() -> None:
    names = [choose_bucket(with_short(enable_lora=True), decoding(length)).name for length in (SHORT, SHORT + 1)]
    assert names == ["decode 1 up to 16", "decode 1"]


def test_graphs_for_short_contexts_are_left_out_where_all_contexts_are_nearly_as_short() -> None:
    buckets = with_short()
    assert within(buckets, 2 * SHORT) == buckets
    assert within(buckets, 2 * SHORT - 1) == [bucket for bucket in buckets if bucket.max_context != SHORT]


def test_a_short_contexts_inputs_have_tables_for_no_longer_one() -> None:
    capacity = Capacity(num_blocks=100, block_size=8, max_model_len=100, max_num_seqs=4, max_num_batched_tokens=32)
    assert [Bucket.decode(2, limit).layout(capacity).max_blocks for limit in (16, 17, None)] == [2, 3, 13]


# -- limits that nobody gave ------------------------------------------------------------------------------------------


class Opened(DeviceHandle):
    """A device with so much memory."""

    free_bytes = 0

    def free_memory(self) -> int:
        return self.free_bytes


def opened(name: str, gib: int = 16) -> DeviceHandle:
    device = Opened(name, name != "CPU", name in ("CPU", "METAL", "CL"), (name,) if name == "CPU" else ())
    object.__setattr__(device, "free_bytes", gib << 30)
    return device


@pytest.mark.parametrize(
    ("device", "limits"),
    [
        (opened("CPU", 500), Limits(16, 256)),
        (opened("METAL", 100), Limits(16, 512)),
        (opened("CL"), Limits(16, 512)),
        (opened("CUDA", 23), Limits(128, 2048)),
        (opened("CUDA", 139), Limits(256, 8192)),
    ],
    ids=["cpu", "metal", "opencl", "cuda", "cuda of much memory"],
)
def test_limits_follow_the_device(device: DeviceHandle, limits: Limits) -> None:
    assert device_limits(device) == resolve_limits(EngineConfig("tiny"), device) == limits


def test_a_limit_that_was_given_is_kept_and_the_other_fitted_to_it() -> None:
    def resolve(**given: Any) -> Limits:
        return resolve_limits(EngineConfig("tiny", **given), opened("CPU"))

    assert resolve(max_num_seqs=3, max_num_batched_tokens=7) == Limits(3, 7)
    assert resolve(max_num_seqs=1000) == Limits(1000, 1000)
    assert resolve(max_num_seqs=4) == Limits(4, 256)
    assert resolve(max_num_batched_tokens=8) == Limits(8, 8)
    assert resolve(max_num_batched_tokens=64) == Limits(16, 64)


def drafted(*entries: tuple[int, int], prompt: int = 0) -> StepPlan:
    """A plan of requests with so many (pending tokens, drafts), and perhaps of a prompt."""
    scheduled = []
    for pending, num_drafts in entries:
        request = make_request([1] * 20)
        scheduled.append(Scheduled(request, 20 - pending, pending + num_drafts, (2,) * num_drafts))
    if prompt:
        scheduled.append(Scheduled(make_request([1] * prompt), 0, prompt))
    return StepPlan(tuple(scheduled))


def test_steps_with_drafts_have_graphs_of_their_own() -> None:
    buckets = buckets_of(8, 256, **SPECULATION)
    assert [bucket.name for bucket in buckets if bucket.is_verify] == [
        "verify 2", "verify 3", "verify 4", "verify 5", "verify 6", "verify 8", "verify 12", "verify 16", "verify 32",
        "verify 40",
    ]  # fmt: skip
    assert not any(bucket.is_verify for bucket in buckets_of(8, 256))
    assert [bucket.name for bucket in first_buckets(buckets)] == ["prefill 256", "decode 8", "verify 40"]


@pytest.mark.parametrize(
    ("plan", "name"),
    [
        (drafted((1, 4)), "verify 5"),
        (drafted((1, 2), (1, 0)), "verify 4"),
        (drafted((3, 2)), "verify 5"),  # tokens computed again
        (drafted((1, 0), (1, 0)), "decode 2"),
        (drafted((1, 3), prompt=3), "verify 8"),
        (drafted((1, 3), prompt=60), "prefill 64"),
        (drafted((1, 0), prompt=3), "prefill 16"),
    ],
)
def test_a_plan_with_drafts_runs_in_the_smallest_graph_for_it(plan: StepPlan, name: str) -> None:
    assert choose_bucket(buckets_of(8, 256, **SPECULATION), plan).name == name


def test_a_step_of_one_sequence_holds_all_its_drafts() -> None:
    assert [bucket.name for bucket in buckets_of(1, 8, **SPECULATION) if bucket.is_verify][-1] == "verify 5"
    assert [bucket.name for bucket in buckets_of(1, 3, **SPECULATION) if bucket.is_verify][-1] == "verify 3"
