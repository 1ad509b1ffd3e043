"""A layer shared out to several cores of a CPU gives what one core gives, and its kernels wait for one another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tinygrad import Tensor, dtypes

from tests.builders import without_logits_processing, write_tiny_gguf, write_tiny_hf_llama
from tests.ops.attention import Case, make_history, make_layer
from tests.ops.builders import Piece, make_pool, make_step, make_step_of, normal
from tests.ops.kernel.examples import add_one_kernel
from tests.reference_model import next_logprobs
from tests.sweeps import swept
from tinyvllm.config import EngineConfig, SamplingParams
from tinyvllm.device.cpu_replay import _waits
from tinyvllm.device.handle import open_device, upload
from tinyvllm.device.recording import Call, RecordedStep, record
from tinyvllm.device.replay import make_replay
from tinyvllm.device.scratch import Scratch
from tinyvllm.execution.runner import ModelRunner, load_runner
from tinyvllm.ops.backend import pool_groups
from tinyvllm.ops.cpu.backend import CpuBackend
from tinyvllm.ops.cpu.sharded import Sharded
from tinyvllm.ops.kernel.body import empty, run_kernel
from tinyvllm.ops.step_inputs import StepLayout
from tinyvllm.scheduling.plan import Scheduled, StepPlan
from tinyvllm.scheduling.request import Request

SETTINGS: dict[str, Any] = {
    "max_model_len": 64,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
    "kv_cache_dtype": "float32",
    "decode_buckets": (4,),
    "token_buckets": (32,),
}


def generate(runner: ModelRunner, prompts: list[list[int]], count: int) -> list[tuple[list[int], list[float]]]:
    """Greedy tokens and their logprobs of all prompts in one batch, the prompts in chunks of 20."""
    requests = []
    for i, prompt in enumerate(prompts):
        request = Request(str(i), prompt, SamplingParams(temperature=0.0, logprobs=0, max_tokens=count))
        request.tables = [list(range(1 + 4 * i, 5 + 4 * i))]
        requests.append(request)
    logprobs: list[list[float]] = [[] for _ in prompts]
    while any(len(request.output_ids) < count for request in requests):
        plan, budget = [], 20
        for request in requests:
            take = min(request.num_pending, budget)
            if take and len(request.output_ids) < count:
                plan.append(Scheduled(request, request.num_computed, take))
                budget -= take
        step = StepPlan(tuple(plan))
        sampled, output = step.sampled, runner.execute(step)
        for entry in plan:
            entry.request.num_computed += entry.count
        for entry, token, logprob in zip(sampled, output.token_ids, output.logprobs, strict=True):
            entry.request.output_ids.append(token)
            assert logprob is not None
            logprobs[int(entry.request.request_id)].append(logprob.chosen)
    return [(request.output_ids, found) for request, found in zip(requests, logprobs, strict=True)]


@pytest.mark.parametrize(
    ("quant", "cores", "kv"),
    swept(
        [
            (None, 2, "float32"),
            ("Q4_1", 2, "float32"),
            ("Q8_0", 3, "float32"),
            ("Q4_0", 9, "float32"),
            ("Q8_0", 3, "q8_0"),
            ("Q4_0", 9, "q8_0"),
        ],
        [("Q8_0", 3, "float32"), ("Q4_0", 9, "float32")],
    ),
)
def test_several_cores_generate_what_numpy_does(tmp_path: Path, quant: str | None, cores: int, kv: str) -> None:
    """Shards are uneven: 4 KV heads among 3 cores, 3 panels of hidden columns among 2 cores or 9. Of these, two share
    each KV head, and one has no part in attention. No request asks for logits processing, and nothing is compiled for
    it."""
    shape: dict[str, Any] = {
        "hidden": 96,
        "heads": 8,
        "kv_heads": 4,
        "head_dim": 32,
        "ffn": 160,
        "layers": 2,
        "tie": quant is None,
    }
    files = (
        write_tiny_hf_llama(tmp_path / "model", **shape)
        if quant is None
        else write_tiny_gguf(tmp_path / "model.gguf", quant=quant, **shape)
    )
    prompts = [[7, 3, 9, 1, 4] * 6, [5], [200, 100, 50, 25]]
    with without_logits_processing():
        found = generate(_runner(files, cores, kv), prompts, 8)
    # x is rounded for packed weights, and sums in another order may move a key over the edge between two codes
    tolerance = 1e-4 if quant is None else 1e-3 if kv == "float32" else 5e-3
    for prompt, (tokens, logprobs) in zip(prompts, found, strict=True):
        rows = next_logprobs(files, [*prompt, *tokens[:-1]], len(tokens), kv)
        assert rows.argmax(axis=1).tolist() == tokens
        np.testing.assert_allclose(logprobs, rows.max(axis=1), atol=tolerance)


def test_tinyjit_captures_the_programs_of_shares_of_different_sizes(tmp_path: Path) -> None:
    """As with DEBUG=2. Capturing compares them with the recorded ones."""
    shape: dict[str, Any] = dict(hidden=96, heads=3, kv_heads=3, head_dim=32, ffn=160, layers=1, tie=False)
    files = write_tiny_gguf(tmp_path / "model.gguf", quant="Q4_1", **shape)
    runner = _runner(files, 2, "float32", "tinyjit")
    assert any(len({call.buffers[0].device for call in graph.calls}) == 2 for graph in runner.captures.graphs.values())


def _runner(files: object, cores: int, kv: str, capture: str = "replay") -> ModelRunner:
    more = SETTINGS | {"kv_cache_dtype": kv, "capture": capture}
    config = EngineConfig("tiny", cpu_cores=cores, compile_cache=False, **more)
    runner = load_runner(files, config)  # type: ignore[arg-type]
    runner.warm_up()
    return runner


def test_cores_that_share_a_kv_head_read_the_queries_of_their_own_parts() -> None:
    """A layer that reads another's keys has only queries, and each core's are in one part (Gemma 4 E2B)."""
    layout, cols = StepLayout(24, 3, 4, 8), (128, 128)
    case = Case(4, 1, 64, layout, False, widths=(2, 2, 2), normed=True)
    buffer, rows = make_step(layout, [Piece(5, 10), Piece(0, 9)]), normal(24, 256, seed=7)
    keys, values = make_history(case)
    found = []
    for cores in (1, 2):
        ops = CpuBackend(open_device(cores), None)
        pool = make_pool(ops, case.kind, 8, "float32", keys, values)
        kind = replace(case.kind, kv_layer=0)
        layer = replace(make_layer(ops, case), index=1, kind=kind, qkv_cols=(256,))
        left, right = (np.ascontiguousarray(half) for half in np.split(rows, 2, axis=1))
        qkv = upload(rows, "CPU") if cores == 1 else Sharded((upload(left, "CPU"), upload(right, "CPU:1")), cols)
        step = make_step_of(ops, layout, buffer, pool)
        outs: list[Tensor] = []

        def trace(outs: list[Tensor] = outs, ops: Any = ops, parts: Any = (qkv, layer, step)) -> Tensor:
            outs[:] = [part.realize() for part in ops.parts_of(ops.attend([parts[0]], *parts[1:]))]
            return outs[-1]

        make_replay(ops.device, record(trace))()
        ops.device.wait()
        found.append(np.concatenate([out.numpy().reshape(24, -1) for out in outs], axis=1))
    np.testing.assert_allclose(found[1][:19], found[0][:19], atol=1e-6)


def test_shares_of_different_sizes_have_one_program() -> None:
    """3 KV heads among 2 cores: both run the programs of two heads, in which their number is data. Two prompts, and
    the tokens after them."""
    case = Case(6, 3, 32, StepLayout(24, 2, 4, 8), False)
    steps = [(case.layout, [Piece(0, 10), Piece(0, 9)], 19), (StepLayout(2, 2, 4, 8), [Piece(10), Piece(9)], 2)]
    hosts, found = [normal(heads * case.dim, 64, seed=heads) for heads in (6, 3, 3)], []
    for cores in (1, 2):
        ops = CpuBackend(open_device(cores), None, [case.kind])
        matrices, layer = ops.stacked(hosts, case.kv_heads), make_layer(ops, case)
        pool = ops.make_pool(pool_groups([case.kind]), 9, 8, "float32")
        for layout, pieces, used in steps:
            step = make_step_of(ops, layout, make_step(layout, pieces), pool, is_decode=used == 2)
            x = upload(normal(layout.num_tokens, 64, seed=used), "CPU")
            outs: list[Tensor] = []

            def trace(outs: list[Tensor] = outs, ops: Any = ops, parts: Any = (x, matrices, layer, step)) -> Tensor:
                qkv = ops.linear("qkv", parts[0], parts[1], parts[3].num_tokens)
                outs[:] = [part.realize() for part in ops.parts_of(ops.attend(qkv, *parts[2:]))]
                return outs[-1]

            recorded = record(trace)
            make_replay(ops.device, recorded)()
            ops.device.wait()
            found.append(np.concatenate([out.numpy().reshape(layout.num_tokens, -1)[:used] for out in outs], axis=1))
            programs = {call.target.src[-1].arg for call in recorded.calls}
            assert len(recorded.calls) == cores * len(programs) > 0, "each core runs each program once"
        sizes = [
            [c.target.src[0].arg.estimates.mem for c in recorded.calls if c.buffers[0].device == core]
            for core in ops.cores
        ]
    np.testing.assert_allclose(found[2], found[0], atol=1e-5)
    np.testing.assert_allclose(found[3], found[1], atol=1e-5)
    assert all(2 * less == more for less, more in zip(*sizes, strict=True)), "operations and bytes are those of a share"


def test_a_chain_across_cores_runs_in_order_again_and_again() -> None:
    """Each core reads, where it lies, what the other has just written; scratch memory is used again on the way."""
    device, size = open_device(2), 4096
    start = Tensor.zeros(size, device="CPU").contiguous().realize()

    def trace() -> Tensor:
        x = start
        for i in range(20):
            x = run_kernel(add_one_kernel(size), [empty(size, device="CPU:1" if i % 2 else "CPU")], [x])[0]
        return x.realize()

    step = record(trace)
    assert [call.buffers[0].device for call in step.calls] == ["CPU", "CPU:1"] * 10
    run = make_replay(device, step)
    for _ in range(50):
        run()
        device.wait()
        assert (np.frombuffer(step.output.uop.base.buffer.as_memoryview(), np.float32) == 20).all()


def test_steps_share_memory_where_a_later_one_uses_fewer_cores() -> None:
    device, size = open_device(2), 64
    start = Tensor.zeros(size, device="CPU").contiguous().realize()

    def trace(*devices: str) -> Tensor:
        x = start
        for name in devices:
            x = run_kernel(add_one_kernel(size), [empty(size, device=name)], [x])[0]
        return x.realize()

    both, one = record(lambda: trace("CPU", "CPU:1", "CPU")), record(lambda: trace("CPU", "CPU"))
    for step, expected in zip(Scratch().place(both, one), (3, 2), strict=True):
        make_replay(device, step)()
        device.wait()
        assert (np.frombuffer(step.output.uop.base.buffer.as_memoryview(), np.float32) == expected).all()


def test_waits_name_the_other_cores_last_call_once() -> None:
    """Calls 0 (core 0) -> 1 (core 1) -> 2 (core 0), and 3 (core 1), which needs what 1 has waited for already."""

    class Target:
        class arg:
            outs = (0,)

    first, second, third, fourth = (Tensor.zeros(8).contiguous().realize().uop.base.buffer for _ in range(4))
    calls = tuple(Call(Target, buffers) for buffers in ((first,), (second, first), (third, second), (fourth, first)))
    step = RecordedStep(calls, Tensor.zeros(1, dtype=dtypes.int), (), len(calls), ())
    assert _waits([0, 1, 0, 1], step) == [[], [0], [1], []]
