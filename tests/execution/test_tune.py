"""The search for faster kernels: what it may change, what it remembers, and that it outlives a bad candidate."""

from __future__ import annotations

import itertools
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from multiprocessing import Pipe, connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from tests.execution import tune_workers
from tests.execution.test_mtp import CONFIG as RECURRENT
from tests.families.recipe import write_hf
from tests.families.recipes import RECIPES
from tinyvllm.arrays import Format
from tinyvllm.config import CACHE_DIR_VARIABLE, EngineConfig, ModelFiles
from tinyvllm.errors import DeviceError, TinyvllmError
from tinyvllm.execution import tune as tune_module
from tinyvllm.execution import tune_process, tune_worker
from tinyvllm.execution.buckets import Bucket, choose_bucket
from tinyvllm.execution.graphs import PendingGraph
from tinyvllm.execution.runner import ModelRunner, load_runner
from tinyvllm.execution.tune import (
    MOST_TURNS,
    Duel,
    Trial,
    expected_gain,
    in_order,
    is_alike,
    make_plan,
    search,
    time_in_turn,
)
from tinyvllm.execution.tune_events import Event, Job
from tinyvllm.execution.tune_process import tune
from tinyvllm.execution.tune_worker import run_worker
from tinyvllm.ops.gpu.gemm import GemmSpec
from tinyvllm.ops.kernel import tuning
from tinyvllm.ops.kernel.body import F16
from tinyvllm.ops.kernel.lanes import Mma
from tinyvllm.ops.kernel.tuning import Chosen
from tinyvllm.scheduling.plan import StepOutput, StepPlan
from tinyvllm.scheduling.request import TokenLogprobs

BUCKET = Bucket.decode(2)


@pytest.fixture
def runner(tiny_gguf_files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelRunner]:
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(tmp_path))
    config = EngineConfig("tiny", max_model_len=64, max_num_seqs=2, max_num_batched_tokens=8, num_gpu_blocks_override=9)
    yield load_runner(tiny_gguf_files, config)
    tuning.use(tuning.Choices())


def run_search(runner: ModelRunner, begun: list[Trial] | None = None) -> list[Trial]:
    return list(search(runner, BUCKET, (begun if begun is not None else []).append))


def test_a_search_goes_over_every_tunable_kernel_once_and_is_remembered(runner: ModelRunner) -> None:
    begun: list[Trial] = []
    trials = run_search(runner, begun)
    kernels = {trial.kernel.split()[0] for trial in trials}
    assert kernels == {"qkv", "attention_out", "gate_up", "down", "lm_head"}
    assert begun and {trial.name for trial in begun} <= {trial.name for trial in trials}
    assert all(trial.seconds is not None for trial in trials)
    tuning.current.save()
    path = tuning.current.path
    assert path is not None and path.is_file() and "tinygrad" in path.name
    again = tuning.load_choices(path)
    assert again.chosen == tuning.current.chosen and runner.tuning_name(BUCKET) in again.searched
    assert not runner.is_tuned, "other buckets were not searched"


def invent_times(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[Mapping[str, Chosen]], float]) -> None:
    """Let a step take as long as `seconds` says of the choices with which it was captured."""
    made: dict[int, float] = {}
    ready = tune_module._Steps._ready

    def note(self: Any, graph: Any) -> Any:
        step = ready(self, graph)
        made[id(step)] = seconds(dict(tuning.current.chosen))
        return step

    monkeypatch.setattr(tune_module._Steps, "_ready", note)

    def duel(self: Any, before: Any, after: Any) -> Duel:
        return Duel(made[id(before)], made[id(after)], wins=1.0)

    monkeypatch.setattr(tune_module._Steps, "duel", duel)


def test_the_fastest_candidate_is_chosen_and_traced(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row per pass takes half as long in the down projection, and nothing else matters."""
    one_row = (("rows_per_pass", 1),)
    invent_times(monkeypatch, lambda chosen: 0.5 if one_row in chosen.values() else 1.0)
    trials = run_search(runner)
    assert [value for value in tuning.current.chosen.values() if value] == [one_row]
    (kept,) = [trial for trial in trials if trial.is_kept and trial.chosen]
    assert (trials[-1].kernel, trials[-1].before_s, trials[-1].seconds) == (tune_module.WHOLE_STEP, 1.0, 0.5)
    assert tuning.current.slow >= {trial.name for trial in trials if trial.chosen} - {kept.name}
    with tuning.current.watching() as asked:
        runner.captures.remake(BUCKET)
    assert sum(tuning.choose(spec).rows_per_pass == 1 for spec in asked.values()) == 1  # type: ignore[attr-defined]


def test_gains_of_several_kernels_add_up(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """A candidate that was begun before another one was kept is compared again, beside that one."""
    monkeypatch.setattr(tune_module, "num_workers", lambda: 64)
    monkeypatch.setattr(tune_module._Steps, "is_on_cpu", False)
    one_row = (("rows_per_pass", 1),)
    invent_times(monkeypatch, lambda chosen: 1.0 - 0.1 * sum(value == one_row for value in chosen.values()))
    trials = run_search(runner)
    kept = [trial for trial in trials if trial.is_kept and trial.chosen]
    assert len(kept) > 1 and kept[-1].seconds == trials[-1].seconds == pytest.approx(1.0 - 0.1 * len(kept))
    assert all(trial.seconds == pytest.approx(trial.before_s - 0.1) for trial in kept)


def test_a_candidate_that_changes_a_token_is_bad(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    execute = runner.execute

    def wrong(plan: StepPlan) -> StepOutput:
        output = execute(plan)
        has_changed = any(tuning.current.chosen.values())
        return replace(output, token_ids=tuple(token + has_changed for token in output.token_ids))

    monkeypatch.setattr(runner, "execute", wrong)
    invent_times(monkeypatch, lambda chosen: 0.001 if any(chosen.values()) else 1.0)
    trials = run_search(runner)
    tried = [trial for trial in trials if trial.chosen]
    assert tried and all(trial.seconds is None for trial in tried)
    assert tuning.current.bad == {trial.name for trial in tried}
    assert not any(tuning.current.chosen.values())
    begun: list[Trial] = []
    run_search(runner, begun)
    assert not begun, "what was bad is not tried again"


@pytest.mark.parametrize(
    ("token", "chosen", "top", "is_right"),
    [
        (7, -2.0, ((7, -2.0), (8, -2.04)), True),
        (8, -2.01, ((8, -2.01), (7, -2.02)), True),  # they have changed places
        (8, -2.01, ((8, -2.01), (7, -2.2)), False),  # 7 was as likely as 8 before
        (9, -2.01, ((9, -2.01), (7, -2.02)), False),  # 9 was not
        (7, -2.1, ((7, -2.1), (8, -2.2)), False),
        (7, float("nan"), ((7, float("nan")),), False),
    ],
)
def test_other_orders_of_sums_may_exchange_tokens_that_are_as_likely(
    token: int, chosen: float, top: tuple[tuple[int, float], ...], *, is_right: bool
) -> None:
    expected = StepOutput((7,), (TokenLogprobs(-2.0, ((7, -2.0), (8, -2.03), (9, -2.5))),))
    assert is_alike(StepOutput((token,), (TokenLogprobs(chosen, top),)), expected) == is_right


@pytest.mark.parametrize(("before", "after", "num_turns"), [(0.004, 0.001, MOST_TURNS), (0.001, 0.02, 3)])
def test_steps_are_timed_in_turn(monkeypatch: pytest.MonkeyPatch, before: float, after: float, num_turns: int) -> None:
    """Until it is known whether the second one wins in four of five turns."""
    ran: list[str] = []
    now_s = 0.0

    def run(name: str, seconds: float) -> None:
        nonlocal now_s
        ran.append(name)
        now_s += seconds

    monkeypatch.setattr(tune_module, "time", SimpleNamespace(perf_counter=lambda: now_s))
    duel = time_in_turn(mock.Mock(), partial(run, "a", before), partial(run, "b", after), 0.002)
    assert [duel.before_s, duel.seconds] == pytest.approx([before, after])
    assert duel.is_gain == (before > after)
    in_order = (["a", "b", "b", "a"] * MOST_TURNS)[: 2 * num_turns]
    first, *turns = [name for name, _ in itertools.groupby(ran)]
    assert first == "b" and turns == [name for name, _ in itertools.groupby(in_order)]


@pytest.mark.parametrize(
    ("seconds", "wins", "is_gain"), [(0.9, 1.0, True), (0.9, 0.7, False), (0.997, 1.0, False), (1.1, 0.0, False)]
)
def test_a_gain_is_large_and_often_enough(seconds: float, wins: float, *, is_gain: bool) -> None:
    assert Duel(1.0, seconds, wins).is_gain == is_gain


def test_a_search_stops_in_time_and_goes_on_where_it_stopped(runner: ModelRunner) -> None:
    begun: list[Trial] = []
    for trial in search(runner, BUCKET, begun.append, time.monotonic() + 3600):
        if trial.chosen:
            break
    assert len(begun) == 1 and runner.tuning_name(BUCKET) not in tuning.current.searched
    assert not [trial for trial in search(runner, BUCKET, begun.append, 0.0) if trial.chosen]
    assert len(begun) == 1 and runner.tuning_name(BUCKET) not in tuning.current.searched
    run_search(runner, begun)
    assert len({trial.name for trial in begun}) == len(begun) > 1
    assert runner.tuning_name(BUCKET) in tuning.current.searched


@pytest.mark.parametrize("seconds", [0.5, 2.0])
def test_choices_make_steps_of_their_own(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """And a search that finds nothing makes none."""
    digest = tuning.current.digest
    invent_times(monkeypatch, lambda chosen: seconds if any(chosen.values()) else 1.0)
    run_search(runner)
    assert (tuning.current.digest != digest) == (seconds < 1.0)


def test_candidates_that_may_gain_most_come_first() -> None:
    """A kernel that takes most of a step is searched first, and its candidates by their predicted times."""
    shape = dict(mma=Mma("CUDA", F16), format=Format("float16", 16), x_dtype=F16, num_rows=65536, num_cols=4096)
    specs = {name: GemmSpec(name=name, **shape, num_tokens=256, has_wgmma=True) for name in ("rare", "frequent")}
    order = in_order(specs, {"rare": 1, "frequent": 32}, 1e-3)
    assert order[0][0] == "frequent" and [key for key, _ in order].count("rare") == len(order) // 2
    times = [replace(specs["rare"], chosen=chosen).predicted_s or 0.0 for key, chosen in order if key == "rare"]
    assert times == sorted(times) and len(times) > 4, times
    assert expected_gain(0.9) > expected_gain(1.0) > expected_gain(1.1) > 0
    assert expected_gain(0.5) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("bucket", [Bucket.decode(1), BUCKET, Bucket(8, False, 2)], ids=lambda bucket: bucket.name)
def test_a_plan_fills_its_bucket(runner: ModelRunner, bucket: Bucket) -> None:
    plan = make_plan(runner, bucket)
    assert (plan.num_tokens, plan.is_decode) == (bucket.num_tokens, bucket.is_decode)
    blocks = [block for entry in plan.entries for block in entry.request.tables[0]]
    assert len(set(blocks)) == len(blocks) and 0 not in blocks and max(blocks) < runner.capacity.num_blocks


def test_the_plan_of_a_graph_for_short_contexts_runs_in_no_other(runner: ModelRunner) -> None:
    pair = [Bucket.decode(2, 40), BUCKET]
    with mock.patch.object(type(runner), "buckets", pair):
        assert [choose_bucket(pair, make_plan(runner, bucket)) for bucket in pair] == pair


def test_a_step_that_is_checked_reads_no_state_that_steps_write(tmp_path: Path) -> None:
    """Else a candidate would be compared with what another state gave."""
    config = replace(RECURRENT, speculative_config=None)  # with the sizes of test_mtp.py, which shares programs
    runner, bucket = load_runner(write_hf(tmp_path / "tiny", RECIPES["qwen3_5"]), config), Bucket.decode(8)
    runner.captures.remake(bucket)
    checked, timed = make_plan(runner, bucket, 5), make_plan(runner, bucket)
    first = runner.execute(checked)
    runner.execute(timed)
    assert runner.execute(checked).logprobs == first.logprobs


def run_process(tmp_path: Path, worker: object, budget_s: float = 3600.0) -> tuple[tune_process.Outcome, list[Event]]:
    events: list[Event] = []
    job = Job(EngineConfig("tiny"), kind=str(tmp_path / "choices.json"))
    return tune(job, budget_s, events.append, worker), events  # type: ignore[arg-type]


def test_a_search_that_goes_well_is_complete(tmp_path: Path) -> None:
    outcome, events = run_process(tmp_path, tune_workers.well)
    assert (outcome.is_complete, outcome.num_tried, outcome.num_bad) == (True, tune_workers.NUM_CANDIDATES, 0)
    assert [event.what for event in events][:4] == ["ready", "bucket", "prepare", "begin"]


@pytest.fixture
def hung(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The patience with a worker is over when it hangs, and not before. The file is there from then on."""
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(tmp_path))
    hangs, hung = tmp_path / tune_workers.HANGS, tmp_path / "hung"

    def wait_for_events(sources: Sequence[Any], timeout_s: float) -> list[Any]:
        while not (ready := connection.wait(sources, 0.05)):
            if hangs.exists() and not connection.wait(sources, 0):
                hangs.rename(hung)
                return []
        return ready

    monkeypatch.setattr(tune_process, "wait", wait_for_events)
    return hung


@pytest.mark.parametrize(
    ("worker", "message"),
    [
        (tune_workers.dying, "ended with exit code 139 while timing"),
        (tune_workers.hanging, "gave no answer for 120 s while timing"),
        (tune_workers.dying_early, "ended with exit code 139 while preparing"),
        (tune_workers.hanging_early, "gave no answer for 120 s while preparing"),
    ],
    ids=["dies", "hangs", "dies early", "hangs early"],
)
def test_what_a_worker_dies_of_is_remembered_and_another_goes_on(
    tmp_path: Path, hung: Path, worker: object, message: str
) -> None:
    outcome, events = run_process(tmp_path, worker)
    assert (outcome.is_complete, outcome.num_bad) == (True, 1)
    assert outcome.num_tried == tune_workers.NUM_CANDIDATES + 2, "the second worker tries the first two again"
    assert outcome.path is not None and tuning.load_choices(outcome.path).bad == {tune_workers.FATAL}
    (said,) = [event.message for event in events if event.name == tune_workers.FATAL and event.message]
    assert said == f"the process {message} a candidate of kernel in decode 1"


def test_a_worker_does_not_hear_what_interrupts_its_parent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    outcome, _ = run_process(tmp_path, tune_workers.interrupted)
    assert outcome.is_complete and "Process" not in capfd.readouterr().err
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_candidates_that_gained_nothing_are_tried_again_if_wanted(
    runner: ModelRunner, tiny_gguf_files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune_worker, "_load", lambda job, progress: runner)
    first, second = (runner.tuning_name(bucket) for bucket in runner.buckets[:2])
    tuning.current.slow, tuning.current.bad, tuning.current.searched = {"slow"}, {"bad"}, {first, second}
    tuning.current.save()

    def found() -> tuning.Choices:
        assert tuning.current.path is not None
        return tuning.load_choices(tuning.current.path)

    def ignore(*arguments: object) -> Iterator[Trial]:
        assert (found().slow, found().bad, found().searched) == (set(), {"bad"}, {second})
        yield from ()

    monkeypatch.setattr(tune_worker, "search", ignore)
    here, there = Pipe()
    run_worker(replace(real_job(tiny_gguf_files, runner.buckets[0].name), is_again=True), there)
    assert [here.recv().what for _ in range(4)] == ["ready", "bucket", "saved", "stopped"]
    assert (found().slow, found().searched) == (set(), {second}), "nor are they saved again from memory"


def test_only_the_first_worker_forgets_what_gained_nothing(tmp_path: Path) -> None:
    jobs: list[Job] = []

    def watch(job: Job, end_s: float, tally: Any, report: object, work: object) -> None:
        jobs.append(job)
        tally.path = str(tmp_path / "choices.json")
        tally.is_done = len(jobs) == 2
        tally.begun = None if tally.is_done else Event("prepare", name="candidate")

    with mock.patch.object(tune_process, "_watch_worker", watch):
        tune(Job(EngineConfig("tiny"), is_again=True), 60.0, lambda event: None)
    assert [job.is_again for job in jobs] == [True, False]


def test_what_a_worker_refuses_is_said_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(TinyvllmError, match=r"^no step is called 'decode 3'$"):
        run_process(tmp_path, tune_workers.refusing)


class Died(BaseException):
    """Of a process: no handler of exceptions sees it."""


@pytest.mark.parametrize("part", ["begin_again", "advance"])
def test_a_candidate_is_announced_before_it_is_traced_and_compiled(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    owner: Any = runner.captures if part == "begin_again" else PendingGraph
    work = getattr(owner, part)

    def die(*arguments: Any) -> Any:
        if any(tuning.current.chosen.values()):
            raise Died
        return work(*arguments)

    monkeypatch.setattr(owner, part, die)
    prepared: list[Trial] = []
    begun: list[Trial] = []
    with pytest.raises(Died):
        list(search(runner, BUCKET, begun.append, prepare=prepared.append))
    assert not begun and {trial.place for trial in prepared} == {1}


def test_the_oldest_candidate_is_announced_while_other_processes_work(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, so that a watcher finds that they hang."""
    monkeypatch.setattr(tune_module, "num_workers", lambda: 3)
    monkeypatch.setattr(tune_module._Steps, "is_on_cpu", False)
    monkeypatch.setattr(tune_module._Candidate, "can_advance", False)
    waits = iter(range(3))

    def sleep(seconds: float) -> None:
        if next(waits, None) is None:
            raise Died

    monkeypatch.setattr(tune_module, "time", SimpleNamespace(**{**vars(time), "sleep": sleep}))
    prepared: list[Trial] = []
    with pytest.raises(Died):
        list(search(runner, BUCKET, lambda trial: None, prepare=prepared.append))
    assert [trial.place for trial in prepared] == [1, 2, 3, 1]


def real_job(files: ModelFiles, *buckets: str) -> Job:
    config = EngineConfig("tiny", max_model_len=64, max_num_seqs=2, max_num_batched_tokens=8, num_gpu_blocks_override=9)
    return Job(config, files, buckets=buckets)


@pytest.mark.sweep
def test_a_real_worker_that_dies_while_it_traces_is_outlived(
    tiny_gguf_files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(tmp_path))
    events: list[Event] = []
    outcome = tune(real_job(tiny_gguf_files, BUCKET.name), 300.0, events.append, tune_workers.dying_real)
    dead = [event for event in events if event.message.startswith("the process ended with exit code 139")]
    assert outcome.is_complete and outcome.path is not None and outcome.num_bad == len(dead) == 1
    assert tuning.load_choices(outcome.path).bad == {event.name for event in dead}


def test_names_of_steps_that_do_not_exist_are_an_error_of_the_worker(
    runner: ModelRunner, tiny_gguf_files: ModelFiles
) -> None:
    """It has loaded the model, which decides which steps there are."""
    here, there = Pipe()
    with mock.patch.object(tune_worker, "_load", lambda job, progress: runner):
        run_worker(real_job(tiny_gguf_files, "decode 1", "decode 3"), there)
    event = here.recv()
    assert event.what == "refused" and event.message.startswith(
        "no step is called 'decode 3': with these flags there are decode 1, "
    )


def test_a_bucket_has_a_share_of_the_time_with_those_that_are_still_to_be_searched(
    runner: ModelRunner, tiny_gguf_files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, *others = runner.buckets
    tuning.current.searched |= {runner.tuning_name(bucket) for bucket in others}
    ends: list[float] = []

    def search(runner: ModelRunner, bucket: Bucket, begin: object, end_s: float, prepare: object) -> Iterator[Trial]:
        ends.append(end_s)
        yield from ()

    monkeypatch.setattr(tune_worker, "_load", lambda job, progress: runner)
    monkeypatch.setattr(tune_worker, "search", search)
    monkeypatch.setattr(tune_worker, "time", SimpleNamespace(monotonic=lambda: 100.0))
    here, there = Pipe()
    run_worker(replace(real_job(tiny_gguf_files), end_s=200.0), there)
    assert ends == [150.0, 200.0], "half, and then all that is left"
    events = []
    while here.poll():
        try:
            events.append(here.recv())
        except EOFError:
            break
    saved = {event.bucket: event.message for event in events if event.what == "saved"}
    assert saved == {first.name: "nothing to tune", second.name: "nothing to tune"} | {
        bucket.name: "searched before" for bucket in others
    }


def test_a_spent_budget_ends_the_search_and_blames_nobody(
    tmp_path: Path, hung: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(monotonic=lambda: 4.0 if hung.exists() else 0.0)
    monkeypatch.setattr(tune_process, "time", clock)
    outcome, _ = run_process(tmp_path, tune_workers.hanging, budget_s=4.0)
    assert (outcome.is_complete, outcome.num_bad) == (False, 0)


@pytest.mark.parametrize(
    ("worker", "why"),
    [
        (tune_workers.failing, "failed (ModelError: there is no such model) while loading the model"),
        (tune_workers.silent, "ended with exit code 3 while loading the model"),
        (tune_workers.dying_in_a_step, "ended with exit code 3 in decode 1, while no candidate was tried"),
    ],
    ids=["fails", "dies", "dies in a step"],
)
def test_a_worker_that_ends_without_a_candidate_is_an_error(tmp_path: Path, worker: object, why: str) -> None:
    with pytest.raises(DeviceError, match=f"^the search's process {re.escape(why)}$"):
        run_process(tmp_path, worker)
