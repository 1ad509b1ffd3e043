"""Every kernel of a step has a name that says what it does, a time, and bytes and operations that add up."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from tests.builders import write_tiny_hf_llama
from tinyvllm.bench.kernel_profile import greedy_tokens, one_case, profile_case
from tinyvllm.bench.latency import Case
from tinyvllm.bench.subject import Subject
from tinyvllm.config import EngineConfig, SamplingParams
from tinyvllm.device.jit_replay import choose_capture
from tinyvllm.errors import DeviceError
from tinyvllm.execution.cost import CostCounter
from tinyvllm.execution.inspector import RunnerInspector
from tinyvllm.execution.runner import load_runner
from tinyvllm.profiling.chips import CHIPS
from tinyvllm.profiling.fusion_table import fusion_as_json, fusion_table
from tinyvllm.profiling.kernels import Kernel, merge_cores, tabulate
from tinyvllm.profiling.profile_report import profile_table
from tinyvllm.profiling.trace import parse_trace
from tinyvllm.scheduling.plan import Scheduled, StepPlan
from tinyvllm.scheduling.request import Request

from tinygrad.helpers import Context  # isort: skip  (tinyvllm makes its settings first)

NUM_LAYERS, HIDDEN, HEADS, HEAD_DIM, FFN, QKV = 2, 64, 4, 16, 96, (4 + 2 * 2) * 16  # of TinyLlama
CONTEXT = 20
CONFIG = EngineConfig(model="tiny", max_num_seqs=2, max_model_len=64, max_num_batched_tokens=16, token_buckets=(16,))


@pytest.fixture(scope="module")
def inspectors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RunnerInspector]]:
    """The same model twice: with steps that were traced, and with those that the first left on disk."""
    files = write_tiny_hf_llama(tmp_path_factory.mktemp("model"))
    cache: Path = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINYVLLM_CACHE", str(cache))
        loaded = []
        for _ in range(2):
            runner = load_runner(files, CONFIG)
            runner.warm_up()
            loaded.append(runner)
    assert loaded[1].store is not None and loaded[1].store.num_steps_read
    yield [RunnerInspector(runner) for runner in loaded]
    for runner in loaded:
        runner.close()


def decode_plan(*contexts: int) -> StepPlan:
    params = SamplingParams(temperature=0.0, max_tokens=None)
    requests = [
        Request(str(i), [7] * (context + 1), params, tables=[list(range(1 + 4 * i, 5 + 4 * i))])
        for i, context in enumerate(contexts)
    ]
    return StepPlan(tuple(Scheduled(request, request.num_tokens - 1, 1) for request in requests))


def prefill_plan(count: int) -> StepPlan:
    request = Request("0", [7] * count, SamplingParams(), tables=[[1, 2, 3, 4]])
    return StepPlan((Scheduled(request, 0, count),))


@pytest.mark.parametrize("which", [0, 1], ids=["traced", "kept"])
@pytest.mark.parametrize("plan", [decode_plan(CONTEXT), decode_plan(5, 9), prefill_plan(11)], ids=["1", "2", "prefill"])
def test_kernels_are_named_by_what_they_do(inspectors: list[RunnerInspector], which: int, plan: StepPlan) -> None:
    profile = inspectors[which].profile(plan, repeats=1, warmup=0)
    labels = [kernel.label for kernel in profile.kernels]
    for layer in range(NUM_LAYERS):
        for operation in ("qkv", "attention", "attention out", "gate up", "down"):
            assert labels.count(f"layer {layer} · {operation}") == 1, labels
    assert labels[0] == "embed" and labels.count("head") == 1 and labels[-1] == "sample"
    assert not any("other" in label for label in labels)


def test_traced_and_kept_steps_get_the_same_names(inspectors: list[RunnerInspector]) -> None:
    first, second = (
        [(kernel.label, kernel.program, kernel.nbytes, kernel.flops) for kernel in profile.kernels]
        for profile in (inspector.profile(decode_plan(CONTEXT), repeats=1, warmup=0) for inspector in inspectors)
    )
    assert first == second


def test_bytes_are_those_of_the_step(inspectors: list[RunnerInspector]) -> None:
    plan = decode_plan(CONTEXT)
    profile, cost = inspectors[0].profile(plan, repeats=1, warmup=0), inspectors[0].cost(plan)
    assert sum(kernel.nbytes or 0 for kernel in profile.kernels) == cost.moved_bytes
    assert profile.num_kernels == cost.num_kernels


def test_keys_before_a_window_are_not_read(inspectors: list[RunnerInspector]) -> None:
    runner, plan = inspectors[0].runner, decode_plan(CONTEXT, 3)
    graph, config = runner.captures.graph_for(plan), runner.model_config
    of_layer = config.kv_bytes_per_token(2) // NUM_LAYERS  # the pool is float16
    windowed = copy(runner.model)
    windowed.config = replace(config, layer_kinds=(config.layers[0], replace(config.layers[1], window=8)))
    full, narrow = (
        CostCounter(model, runner.pool, 16).count("", graph.calls, graph.inputs, plan)
        for model in (runner.model, windowed)
    )
    assert full.kv_read_bytes == 2 * (CONTEXT + 3) * of_layer
    assert narrow.kv_read_bytes == (CONTEXT + 3 + 7 + 3) * of_layer
    assert full.moved_bytes - narrow.moved_bytes == full.nbytes - narrow.nbytes == (CONTEXT - 7) * of_layer


def test_operations_are_two_for_each_weight_and_four_for_each_element_attended(
    inspectors: list[RunnerInspector],
) -> None:
    profile = inspectors[0].profile(decode_plan(CONTEXT, 7), repeats=1, warmup=0)
    flops = {row.label: row.flops for row in tabulate(profile.kernels)}
    assert flops["qkv"] == 2 * 2 * NUM_LAYERS * HIDDEN * QKV
    assert flops["gate up"] == 2 * 2 * NUM_LAYERS * HIDDEN * 2 * FFN
    assert flops["down"] == 2 * 2 * NUM_LAYERS * HIDDEN * FFN
    assert flops["attention"] == 4 * NUM_LAYERS * HEADS * HEAD_DIM * (CONTEXT + 1 + 7 + 1)
    assert flops["embed"] == flops["sample"] == 0


def test_a_prompt_attends_to_what_is_before_each_token(inspectors: list[RunnerInspector]) -> None:
    profile = inspectors[0].profile(prefill_plan(11), repeats=1, warmup=0)
    flops = {row.label: row.flops for row in tabulate(profile.kernels)}
    assert flops["attention"] == 4 * NUM_LAYERS * HEADS * HEAD_DIM * (11 * 12 // 2)
    assert flops["kv write"] == 0
    # one row of logits, whatever the prompt's length
    assert flops["head"] == 2 * HIDDEN * inspectors[0].runner.model_config.vocab_size


def test_a_profile_changes_nothing(inspectors: list[RunnerInspector]) -> None:
    plan = decode_plan(CONTEXT)
    before = inspectors[0].runner.execute(plan).token_ids
    inspectors[0].profile(decode_plan(3), repeats=2, warmup=1)
    assert inspectors[0].runner.execute(plan).token_ids == before


def test_stamps_lie_in_order_on_every_core(inspectors: list[RunnerInspector]) -> None:
    profile = inspectors[0].profile(decode_plan(CONTEXT), repeats=2, warmup=0)
    for device in {launch.device for launch in profile.launches}:
        launches = [launch for launch in profile.launches if launch.device == device]
        ends = [launch.start_ns + round(launch.seconds * 1e9) for launch in launches]
        assert all(end <= launch.start_ns for end, launch in zip(ends, launches[1:], strict=False))
    assert all(launch.seconds >= 0 for launch in profile.launches)


def test_the_shares_of_cores_are_one_kernel_with_the_slowest_time() -> None:
    shares = [
        Kernel("qkv", 0, "qkv_1", "CPU", 2.0, 10, 1),
        Kernel("qkv", 0, "qkv_1", "CPU:1", 3.0, 20, 2),
        Kernel("qkv", 1, "qkv_1", "CPU", 1.0, 5, 5),
    ]
    merged = merge_cores(shares)
    assert [(k.label, k.seconds, k.nbytes, k.flops, k.shares) for k in merged] == [
        ("layer 0 · qkv", 3.0, 30, 3, 2),
        ("layer 1 · qkv", 1.0, 5, 5, 1),
    ]


@pytest.mark.sweep  # by default, logs of tinygrad's lines: tests/profiling/test_trace.py
def test_a_log_of_debug_2_and_a_profile_have_the_same_kernels(
    inspectors: list[RunnerInspector], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Context(DEBUG=2):
        watched = load_runner(write_tiny_hf_llama(tmp_path), replace(CONFIG, decode_buckets=(2,)))
        watched.warm_up()
        loading = parse_trace(capsys.readouterr().out).kernels()
        assert {kernel.operation for kernel in loading} == {"copy"}, "of weights; capturing runs no step"
        for plan in (decode_plan(CONTEXT, 9), prefill_plan(11)):
            output = watched.execute(plan)
            text = capsys.readouterr().out
            trace = parse_trace(text)
            assert trace.num_cut == trace.num_untimed == 0
            shown = [line for line in text.splitlines() if re.search("scheduled|copy|tm.*ms|GFLOPS|GB/s", line)]
            assert len(shown) == len(trace.lines) and all("tm " in line and "GB/s" in line for line in shown)
            lines, profile = trace.kernels(last_steps=1), inspectors[0].profile(plan, repeats=1, warmup=0)
            assert [facts(line) for line in lines] == [facts(kernel) for kernel in profile.kernels]
            for line, kernel in zip(lines, profile.kernels, strict=True):
                # tinygrad rounds the rate of each share to whole GB/s
                assert line.nbytes == pytest.approx(kernel.nbytes, abs=0.51e9 * line.seconds * line.shares)
            if plan.entries[0].start == 0:  # else it reads what else is in the pool
                assert output.token_ids == inspectors[0].runner.execute(plan).token_ids
    watched.close()


def facts(kernel: Kernel) -> tuple[str, int, int]:
    return kernel.label, kernel.count, kernel.shares


def test_a_watched_step_is_captured_by_tinyjit_whatever_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """So no step runs in a graph, in a CUDA chain or in a CPU's tables of commands, none of which prints kernels."""
    with caplog.at_level("WARNING", "tinyvllm"):
        assert choose_capture("replay") == "replay" and not caplog.text
        with Context(DEBUG=2):
            assert choose_capture("replay") == choose_capture("tinyjit") == "tinyjit"
    assert "DEBUG=2: every step runs kernel by kernel" in caplog.text
    monkeypatch.setattr("tinygrad.helpers.JIT.value", 0)
    with Context(DEBUG=2), pytest.raises(DeviceError, match="JIT=0 turns TinyJit off: unset it, or unset DEBUG"):
        load_runner(write_tiny_hf_llama(tmp_path), CONFIG)


def test_all_steps_of_a_prompt_are_profiled_together(inspectors: list[RunnerInspector]) -> None:
    """Of 40 tokens, in steps of 16."""
    config = inspectors[0].runner.model_config
    subject, chip = Subject("tiny", config), CHIPS["m4"]
    one, three = (
        profile_case(inspectors[0], subject, one_case(Case("prefill", 1, n), repeats=1, warmup=1, seed=0), chip)
        for n in (16, 40)
    )
    assert three.profile.bucket == f"3 x {one.profile.bucket}" and three.context == 0
    assert three.profile.num_dispatches == 3 * one.profile.num_dispatches
    assert three.counts["kernels"] == one.counts["kernels"], "the most of a step"
    attended, head = (
        HEADS * HEAD_DIM * 4 * NUM_LAYERS,
        2 * config.vocab_size * HIDDEN,
    )  # the last step's alone has logits
    products = [report.roofline.flops - attended * n * (n + 1) // 2 - head for report, n in ((one, 16), (three, 40))]
    assert products[1] * 16 == products[0] * 40
    assert three.turn_s > 0 and three.roofline.seconds == three.profile.step_s


def test_every_count_of_a_step_has_its_limit_beside_it(inspectors: list[RunnerInspector]) -> None:
    work = one_case(Case("decode", 2, CONTEXT), repeats=1, warmup=1, seed=0)
    report = profile_case(inspectors[0], Subject("tiny", inspectors[0].runner.model_config), work, CHIPS["m4"])
    counts = report.counts
    assert counts["kernels"] == report.profile.num_kernels and counts["graph_launches"] == counts["syncs"] == 1
    is_shared = any(kernel.shares > 1 for kernel in report.profile.kernels)
    assert (counts["barriers"] > 0) == is_shared, "cores wait for each other"
    assert {name for name, limit in report.limits.items() if counts[name] > limit} == set()
    text = Console(width=200, file=io.StringIO(), record=True)
    text.print(profile_table(report, "layer"))
    assert f"barriers {counts['barriers']}, graph launches 1 (at most 1), syncs 1 (at most 3)" in text.export_text()


def test_unfused_kernels_are_more_and_generate_the_same_tokens(
    inspectors: list[RunnerInspector], tmp_path: Path
) -> None:
    runner = load_runner(write_tiny_hf_llama(tmp_path), replace(CONFIG, unfused=True))
    runner.warm_up()
    both = (inspectors[0], RunnerInspector(runner))
    work = one_case(Case("decode", 1, CONTEXT), repeats=1, warmup=1, seed=0)
    fused, unfused = (profile_case(one, Subject("tiny", runner.model_config), work, CHIPS["m4"]) for one in both)
    tokens = [greedy_tokens(one.runner, 12, seed=1) for one in both]
    runner.close()
    assert tokens[0] == tokens[1] and len(tokens[0]) == 12
    extra = {row.label for row in unfused.rows("operation")} - {row.label for row in fused.rows("operation")}
    assert {"attention norm", "ffn norm", "final norm", "finish"} == extra
    assert unfused.profile.num_kernels > fused.profile.num_kernels and unfused.moved_bytes > fused.moved_bytes
    console = Console(width=160, file=io.StringIO(), record=True)
    console.print(fusion_table(fused, unfused, tokens))
    text = console.export_text()
    saved = unfused.profile.num_kernels - fused.profile.num_kernels
    assert f"fusing saves {saved} kernels" in text and "both generate the same 12 tokens" in text
    assert fusion_as_json(fused, unfused, [[1, 2, 3], [1, 2, 4]])["equal_tokens"] == 2


def test_a_pool_that_the_copy_engine_reads_is_counted(inspectors: list[RunnerInspector]) -> None:
    """tinygrad does not see its reads: such an argument is neither an input nor an output of the program."""
    runner, plan = inspectors[0].runner, decode_plan(CONTEXT)
    graph, counter = runner.captures.graph_for(plan), CostCounter(runner.model, runner.pool, 16)
    bases = {id(tensor.uop.base.buffer.base) for tensor in runner.pool.tensors_of(0)}
    call, places = next(
        (call, places)
        for call in graph.calls
        if (places := [i for i, buffer in enumerate(call.buffers) if id(buffer.base) in bases])
        and set(places) <= set(call.target.arg.ins)
    )
    arg = call.target.arg
    unseen = replace(
        arg, ins=tuple(i for i in arg.ins if i not in places), outs=tuple(i for i in arg.outs if i not in places)
    )
    hidden = replace(call, target=call.target.replace(arg=unseen))
    written = sum(i in arg.outs for i in places) * runner.model_config.kv_bytes_per_token(2) // NUM_LAYERS // 2
    moved = [counter.moved_by(one, graph.inputs, plan) for one in (call, hidden)]
    assert moved[0] - moved[1] == written
