"""Bytes, operations and floors of a tiny model's step, computed by hand; chips have sources; verdicts have reasons."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyvllm.bench.shapes import SHAPES
from tinyvllm.config import ExpertsKind, ModelConfig, Rope, StateKind
from tinyvllm.errors import ProfilingError
from tinyvllm.profiling.chips import CHIPS, Chip, find_chip, guess_chip, measured_chip
from tinyvllm.profiling.digits import rounded
from tinyvllm.profiling.interpreter import Interpreter, LockWait
from tinyvllm.profiling.kernels import Kernel, tabulate
from tinyvllm.profiling.lock_holders import Holder
from tinyvllm.profiling.predict import FACTORS, MEASURED, Measured, predict, predict_prompt
from tinyvllm.profiling.roofline import (
    BYTES_PER_WEIGHT,
    Roofline,
    bytes_per_weight,
    count_work,
    raise_roof,
    row_warnings,
)
from tinyvllm.profiling.verdict import Evidence, Turn, judge

TINY = ModelConfig(
    name="tiny",
    architecture="llama",
    num_layers=2,
    hidden_size=8,
    ffn_size=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    vocab_size=10,
    max_position=64,
    rope=Rope(1e4),
    norm_eps=1e-5,
    tie_embeddings=False,
)
# q and o 8 x 8, k and v 8 x 4, gate, up and down 8 x 16: 576 per layer; the head 10 x 8
LAYER, TABLE = 64 + 64 + 32 + 32 + 3 * 128, 80
CHIP = Chip("toy", bandwidth_gbps=1.0, half_tflops=0.01, source="made up", device="CPU")


def test_a_decode_step_of_a_tiny_model_is_what_it_is_by_hand() -> None:
    work = count_work(TINY, 2.0, 2, [(5, 1)])
    assert work.weight_bytes == 2 * (2 * LAYER + TABLE + 8)  # the head whole, of the embedding one row
    assert work.kv_read_bytes == 5 * 2 * 2 * 4 * 2  # tokens, keys and values, layers, width of a head, bytes
    assert work.kv_written_bytes == 2 * 2 * 4 * 2
    assert work.matrix_flops == 2 * (2 * LAYER + TABLE)
    assert work.attention_flops == 2 * 2 * 2 * (2 * 4) * 6  # two products of two operations, layers, heads, tokens seen


def test_a_tied_table_is_read_once_and_whole() -> None:
    tied = replace(TINY, tie_embeddings=True)
    assert count_work(tied, 2.0, 2, [(5, 1)] * 3).weight_bytes == 2 * (2 * LAYER + TABLE)


def test_a_prompt_gives_one_row_of_logits_and_attends_backwards_only() -> None:
    work = count_work(TINY, 2.0, 2, [(0, 4)])
    assert work.matrix_flops == 2 * (4 * 2 * LAYER + TABLE)
    assert work.attention_flops == 4 * 2 * 8 * (1 + 2 + 3 + 4)
    assert work.kv_read_bytes == 0


@given(st.lists(st.tuples(st.integers(0, 500), st.integers(1, 50)), min_size=1, max_size=5))
def test_a_prompt_in_pieces_calculates_what_the_whole_does(entries: list[tuple[int, int]]) -> None:
    whole = count_work(TINY, 2.0, 2, entries, num_sampled=0)
    pieces = [count_work(TINY, 2.0, 2, [(start + i, 1)], num_sampled=0) for start, n in entries for i in range(n)]
    assert sum(piece.flops for piece in pieces) == whole.flops
    assert sum(piece.kv_written_bytes for piece in pieces) == whole.kv_written_bytes


def test_keys_before_a_window_are_not_read() -> None:
    """Of two layers, the second attends to 4 tokens: its own and 3 before it."""
    windowed = replace(TINY, window=4, windowed=(False, True))
    of_layer = 2 * 4 * 2  # keys and values, width of a head, bytes
    assert count_work(windowed, 2.0, 2, [(5, 1), (2, 7)]).kv_read_bytes == (5 + 2 + 3 + 2) * of_layer
    full, narrow = windowed.layers
    shared = replace(TINY, num_layers=3, layer_kinds=(full, narrow, replace(full, kv_layer=1)))
    assert count_work(shared, 2.0, 2, [(5, 1)]).kv_read_bytes == (5 + 5) * of_layer, "the third reads the second's"


def test_of_experts_as_many_count_as_tokens_are_expected_to_choose() -> None:
    kind = ExpertsKind(num_experts=8, top_k=2, ffn_size=4, shared_size=5)
    sparse = replace(TINY, experts=kind, with_experts=(False, True))
    dense, expert = LAYER + (LAYER - 3 * 128) + TABLE + 8 * 8 + 3 * 8 * 5, 3 * 8 * 4  # with the router and the shared
    one, four = (count_work(sparse, 2.0, 2, [(5, 1)] * count) for count in (1, 4))
    assert one.weight_bytes == 2 * (dense + 8 + 2 * expert)
    assert one.matrix_flops == 2 * (dense + 2 * expert)
    assert four.weight_bytes == pytest.approx(2 * (dense + 4 * 8 + 8 * (1 - 0.75**4) * expert))
    assert four.matrix_flops == 4 * one.matrix_flops
    beside = replace(sparse, experts=replace(kind, is_beside_dense=True))
    assert count_work(beside, 2.0, 2, [(5, 1)]).weight_bytes == one.weight_bytes + 2 * 3 * 128


def test_a_recurrent_layers_state_is_read_and_written_for_each_sequence() -> None:
    state = StateKind(num_heads=2, num_key_heads=1, key_dim=4, value_dim=3, conv_width=4, norm_eps=1e-6)
    hybrid = replace(TINY, state=state, recurrent=(True, False))
    full, work = count_work(TINY, 2.0, 2, [(5, 3), (9, 1)]), count_work(hybrid, 2.0, 2, [(5, 3), (9, 1)])
    assert work.state_bytes == 2 * 2 * 4 * (2 * 4 * 3 + 4 * (4 + 4 + 6)), "two sequences; float32; matrices, columns"
    assert work.kv_bytes == full.kv_bytes / 2, "the other layer's"
    projections = 8 * (14 + 6 + 2 * 2) + 6 * 8  # of q, k and v, of z, of b and a; the output's
    assert full.weight_bytes - work.weight_bytes == 2 * (64 + 64 + 32 + 32 - projections)
    assert work.attention_flops == full.attention_flops / 2 + 7 * 4 * (2 * 4 * 3), "four tokens"


def test_the_floor_is_the_larger_of_two() -> None:
    memory, compute = Roofline(CHIP, 1e6, 1e6, 0.01), Roofline(CHIP, 1e6, 1e9, 0.2)
    assert memory.floor_s == pytest.approx(1e-3) and memory.is_memory_bound
    assert compute.floor_s == pytest.approx(0.1) and not compute.is_memory_bound
    assert memory.utilization == pytest.approx(0.1)
    assert memory.knee == pytest.approx(10)
    assert memory.achieved_gbps == pytest.approx(0.1)


def test_more_than_all_is_a_warning_and_not_a_triumph() -> None:
    assert Roofline(CHIP, 1e6, 1e6, 1e-3).warnings() == []
    (warning,) = Roofline(CHIP, 1.043e6, 1e6, 1e-3).warnings()
    assert "104%" in warning and "byte count is wrong" in warning
    (warning,) = Roofline(CHIP, 1, 2e9, 0.1).warnings()
    assert "200%" in warning and "operation count" in warning


def test_every_chip_says_who_says_so() -> None:
    assert {"m1", "m1-ultra", "m2-max", "m3-ultra", "m4-pro", "m5-max", "h100", "h200", "rtx-4090"} <= set(CHIPS)
    for chip in CHIPS.values():
        assert len(chip.source) > 20 and chip.device in FACTORS
        assert 60 <= chip.bandwidth_gbps <= 8000 and 2 <= chip.half_tflops <= 1000


def test_larger_chips_of_a_family_are_not_slower() -> None:
    for family in ("m1", "m2", "m3", "m4", "m5"):
        sizes = [CHIPS[name] for name in (family, f"{family}-pro", f"{family}-max", f"{family}-ultra") if name in CHIPS]
        assert [chip.bandwidth_gbps for chip in sizes] == sorted(chip.bandwidth_gbps for chip in sizes)
        assert [chip.half_tflops for chip in sizes] == sorted(chip.half_tflops for chip in sizes)


@pytest.mark.parametrize(
    ("hardware", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("A100-SXM4-80GB", "a100-80gb"),
        ("Apple M4", "m4"),
        ("Apple M4 Pro", "m4-pro"),
        ("AMD EPYC 9B14", None),
        ("CPU", None),
        # near to a name in the table, but other chips
        ("NVIDIA A100-SXM4-40GB", None),
        ("NVIDIA GH200 480GB", None),
        ("Quadro M4000", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("Apple M4 Max", None),  # 410 or 546 GB/s
    ],
)
def test_a_chip_is_known_by_what_the_device_calls_itself(hardware: str, name: str | None) -> None:
    chip = guess_chip(hardware)
    assert (None if chip is None else chip.name) == name


def test_variants_of_a_chip_are_told_apart_by_their_cores() -> None:
    for family, cores in (("m3", 30), ("m4", 32), ("m5", 32)):
        hardware, small = f"Apple {family.upper()} Max", CHIPS[f"{family}-max-{cores}"]
        assert guess_chip(hardware, cores) is small and guess_chip(hardware, 40) is CHIPS[f"{family}-max"]
        assert small.bandwidth_gbps < CHIPS[f"{family}-max"].bandwidth_gbps and guess_chip(hardware, 36) is None
    seven = guess_chip("Apple M1", 7)
    assert seven is not None and seven.bandwidth_gbps == 68.25 and seven.half_tflops == pytest.approx(2.29)


def test_no_roof_that_was_measured_is_below_what_a_kernel_reached() -> None:
    """A busy machine's test once found 0.013 TFLOP/s, where a kernel of a prompt reached 0.2."""
    kernels = [
        Kernel("gate up", 0, "gate_up", "CPU", 1e-3, 2e6, 0.2e9),
        Kernel("norm", 0, "norm", "CPU", 1e-6, 1e6, 5e9),  # too short to be timed well
        Kernel("head", None, "head", "CPU", 1e-3, 30e6, 1.0),
        Kernel("sum", 0, "sum", "CPU", 1e-5, 0.9e6),  # few bytes, from a cache
    ]
    low = measured_chip("cpu", 10e9, 0.013e12, "CPU")
    roof = raise_roof(low, kernels)
    assert roof.half_tflops == pytest.approx(0.2) and roof.bandwidth_gbps == pytest.approx(30)
    assert "the test found 0.013 TFLOP/s, but a kernel reached 0.2" in roof.source
    assert raise_roof(measured_chip("cpu", 60e9, 1e12, "CPU"), kernels).source == low.source
    assert raise_roof(CHIP, kernels) is CHIP, "a rate from a data sheet stays"
    rows = tabulate(kernels, "operation", roof)
    assert all((row.roof_share or 0) <= 1.01 for row in rows if row.label in ("gate up", "head"))
    assert row_warnings(rows, roof) == []
    (warning,) = row_warnings(tabulate(kernels[:1], "operation", low), low)
    assert "gate up is at 1538% of the roof of cpu" in warning


def test_measurements_that_predictions_are_checked_against_are_in_the_docs() -> None:
    docs = Path(__file__).parents[2] / "docs"
    text = "".join((docs / page).read_text(encoding="utf-8") for page in ("PERFORMANCE.md", "EXPERIMENTS.md"))
    for measured in MEASURED:
        assert re.search(rf"(?<![\d,.]){measured.tok_s:,g}(?![\d,.])", text), measured.title


def test_an_unknown_chip_lists_the_known_ones() -> None:
    assert find_chip("Apple M4 Pro") is CHIPS["m4-pro"]
    with pytest.raises(ProfilingError, match="m4-pro"):
        find_chip("m9")
    with pytest.raises(ProfilingError, match="Q4_K"):
        bytes_per_weight("Q3_K")


# -- verdicts ---------------------------------------------------------------------------------------------------------


def evidence(kernels: list[Kernel], step_s: float, roof: Roofline | None = None, **more: Any) -> Evidence:
    return Evidence(kernels, step_s, roof or Roofline(CHIP, 1e5, 1e5, step_s), 100, **more)


def held_by(thread: str, num_held: int) -> Interpreter:
    """A hundred probes, of which `num_held` found the lock held by a thread."""
    holders = (Holder(thread, "spin (hog.py:7)", num_held),)
    lock = LockWait(100, num_held, 2_000_000, 5_000_000, 5_000_000, 20_000, 0, holders)
    return Interpreter(10**9, 10**9, (), lock)


def kernels(**seconds: float) -> list[Kernel]:
    return [Kernel(name, 0, name, "CPU", time, 1.0, 1.0) for name, time in seconds.items()]


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("copy-bound", evidence(kernels(qkv=1e-3, copy=1e-3), 2e-3)),
        ("copy-bound", evidence(kernels(qkv=1e-3), 1e-3, turns=[Turn(2e-3, 1e-3)], copy_s=0.5e-3)),
        ("host-bound", evidence(kernels(qkv=1e-3), 1e-3, turns=[Turn(2e-3, 1e-3)])),
        ("lock contention", evidence(kernels(qkv=1e-3), 1e-3, interpreter=held_by("hog", 40))),
        ("waiting between kernels", evidence(kernels(qkv=1e-3), 2e-3, between_s=1e-3)),
        ("prefill-bound", evidence(kernels(qkv=1e-3), 1e-3, prefill_s=3.0, decode_s=1.0)),
        ("dispatch-bound", evidence([Kernel("norm", i, "n", "CPU", 2e-6) for i in range(50)], 1e-4)),
        ("attention-bound at this context", evidence(kernels(qkv=1e-3, attention=2e-3), 3e-3)),
        ("bandwidth-bound", evidence(kernels(qkv=1e-3), 1e-3, Roofline(CHIP, 0.9e6, 1e6, 1e-3))),
        ("compute-bound", evidence(kernels(qkv=1e-3), 1e-3, Roofline(CHIP, 1e4, 0.9e7, 1e-3))),
        ("below the roof", evidence(kernels(qkv=1e-3), 1e-3, Roofline(CHIP, 1e5, 1e5, 1e-3))),
    ],
)
def test_each_cause_has_its_verdict_with_numbers(name: str, facts: Evidence) -> None:
    first = judge(facts)[0]
    assert first.name == name
    assert any(char.isdigit() for char in first.because) and first.next_step
    assert 0 < first.share <= 1


def test_many_kernels_with_work_to_do_are_no_dispatch() -> None:
    """Kernels that take equally long because they do the same work."""
    busy = [Kernel("qkv", i, "qkv", "CPU", 1e-3, 0.3e6, 1.0) for i in range(50)]
    assert "dispatch-bound" not in [finding.name for finding in judge(evidence(busy, 0.05))]


def test_causes_outside_of_the_kernels_come_first_and_others_are_not_lost() -> None:
    facts = evidence(kernels(attention=1e-3), 1e-3, Roofline(CHIP, 0.9e6, 1e6, 1e-3), turns=[Turn(3e-3, 1e-3)])
    assert [finding.name for finding in judge(facts)] == [
        "host-bound",
        "attention-bound at this context",
        "bandwidth-bound",
    ]


def test_neither_a_lock_that_is_free_nor_one_that_the_engine_itself_holds_is_contention() -> None:
    free = evidence(kernels(qkv=1e-3), 1e-3, interpreter=held_by("hog", 20))
    own = evidence(kernels(qkv=1e-3), 1e-3, interpreter=held_by("MainThread", 90))
    assert {finding.name for facts in (free, own) for finding in judge(facts)} == {"below the roof"}


def test_a_turn_that_was_disturbed_once_does_not_make_the_host_the_limit() -> None:
    """Parts of different turns are never subtracted: here a second passed once, and packing takes 0.15 ms each time."""
    turns = [Turn(0.02015, 0.02)] * 9 + [Turn(1.06, 0.02)]
    assert "host-bound" not in [finding.name for finding in judge(evidence(kernels(qkv=1e-3), 1e-3, turns=turns))]


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        (  # profiled on a busy machine: these were once called "waiting between kernels 27.0 ms of 67.8"
            evidence(kernels(qkv=40.8e-3), 39e-3, turns=[Turn(58.1e-3, 57.9e-3)], between_s=27e-3, profiled_s=67.8e-3),
            "the step as served 39.000 ms, with its kernels timed 67.800 ms (+74%); "
            "the step as served 39.000 ms, in turns with the host's work 57.900 ms (+48%)",
        ),
        (
            evidence(kernels(qkv=14e-3), 10e-3, profiled_s=11e-3),
            "with its kernels timed 11.000 ms, the sum of its kernels 14.000 ms (+27%)",
        ),
        (
            evidence(kernels(qkv=10e-3), 10e-3, turns=[Turn(11e-3, 10e-3)], served_s=20e-3),
            "a turn with every stage timed 11.000 ms, a turn as served 20.000 ms (+82%)",
        ),
        (
            evidence(kernels(qkv=1e-3), 1e-3, doubt="the grade of trust is D: it moved"),
            "the grade of trust is D: it moved",
        ),
    ],
)
def test_figures_that_disagree_have_no_verdict(facts: Evidence, says: str) -> None:
    (finding,) = judge(facts)
    assert finding.is_withheld and finding.because == says
    assert finding.headline == f"no verdict: {says}; measure again when the machine is quiet"
    document = finding.as_json()
    assert document["name"] == "no verdict" and len(document["disagreements"]) == says.count("(+")  # type: ignore[arg-type]


def test_figures_that_nearly_agree_have_a_verdict() -> None:
    turns = [Turn(12.2e-3, 12e-3)]
    near = evidence(kernels(qkv=10e-3), 10e-3, turns=turns, profiled_s=12.4e-3, between_s=2.4e-3, served_s=15e-3)
    tiny = evidence(kernels(qkv=5e-5), 6e-5, profiled_s=1e-4)  # the clocks' own time
    assert not any(finding.is_withheld for facts in (near, tiny) for finding in judge(facts))
    assert "disagreements" not in judge(near)[0].as_json()


def test_a_thread_that_holds_the_lock_explains_why_figures_disagree() -> None:
    facts = evidence(kernels(qkv=1e-3), 1e-3, profiled_s=3e-3, interpreter=held_by("hog", 40))
    assert [finding.name for finding in judge(facts)] == ["lock contention"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(4.61428, "4.61"), (0.0130999, "0.0131"), (3350, "3,350"), (989.4, "989"), (0.0, "0"), (9.996, "10.00")],
)
def test_numbers_have_three_significant_digits(value: float, text: str) -> None:
    assert rounded(value) == text


# -- predictions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measured", MEASURED, ids=lambda measured: measured.title)
def test_predictions_are_near_what_was_measured(measured: Measured) -> None:
    """Within 16 %. The worst are 8B's 4-bit weights at batch 8 and its float16 at 64; the command prints them too."""
    assert abs(measured.error_of(measured.predict(SHAPES[measured.shape]))) < 0.16


def test_a_prompt_in_pieces_reads_the_weights_for_each_and_multiplies_as_often() -> None:
    shape, chip = SHAPES["llama-3.2-1b"], CHIPS["m4"]
    whole, pieces = (predict_prompt(shape, "float16", chip, 1000, step) for step in (1000, 300))
    assert pieces.work.attention_flops == whole.work.attention_flops
    assert pieces.work.kv_written_bytes == whole.work.kv_written_bytes
    assert pieces.work.weight_bytes == 4 * whole.work.weight_bytes and pieces.num_kernels == 4 * whole.num_kernels
    assert pieces.work.kv_read_bytes == (300 + 600 + 900) * shape.kv_bytes_per_token(2) and not whole.work.kv_read_bytes
    assert pieces.tok_s < whole.tok_s < whole.roof_tok_s
    with pytest.raises(ProfilingError, match="at least 1"):
        predict_prompt(shape, "float16", chip, 0, 512)


@pytest.mark.parametrize("name", CHIPS)
@pytest.mark.parametrize("kind", BYTES_PER_WEIGHT)
def test_no_prediction_is_above_the_roof(name: str, kind: str) -> None:
    for batch in (1, 2, 64):
        prediction = predict(SHAPES["llama-3.2-1b"], kind, CHIPS[name], batch, 256)
        assert 0 < prediction.tok_s < prediction.roof_tok_s
        assert prediction.step_s > Roofline(CHIPS[name], prediction.work.nbytes, prediction.work.flops, 1).floor_s
        assert len(prediction.assumptions) > 3


def test_the_original_s_model_on_its_chip_is_units_made_explicit() -> None:
    """2.07 GB of TinyLlama's weights at 120 GB/s: at most 57.9 tokens per second."""
    prediction = predict(SHAPES["tinyllama-1.1b"], "float16", CHIPS["m4"], 1, 0)
    assert prediction.work.weight_bytes == pytest.approx(2.069e9, rel=1e-3)
    assert prediction.roof_tok_s == pytest.approx(120e9 / 2.069e9, rel=1e-3)


def test_a_measured_chip_has_the_measured_rates() -> None:
    chip = measured_chip("cpu", 40e9, 2e11, "CPU")
    assert chip.bandwidth_gbps == pytest.approx(40) and chip.half_tflops == pytest.approx(0.2)
    assert predict(SHAPES["smollm2-135m"], "Q4_1", chip, 1, 128).num_kernels == 30 * 5 + 6


def test_a_latent_is_stored_and_read_once_for_all_heads() -> None:
    config = SHAPES["glm-4.7-flash"]
    latent = 2 * 47 * (512 + 64)  # bytes of float16, in all layers
    assert config.kv_bytes_per_token(2) == latent
    work = count_work(config, 2.0, 2, [(1000, 1), (0, 3)])
    assert (work.kv_read_bytes, work.kv_written_bytes) == (1000 * latent, 4 * latent)
    per_key = 2 * 20 * (512 + 64 + 512)
    assert work.attention_flops == 47 * per_key * (1001 + 1 + 2 + 3)
