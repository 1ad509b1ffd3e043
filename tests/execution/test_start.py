"""A second start finds what the first one made, and answers the same; it is counted, not timed."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.builders import write_tiny_gguf
from tests.execution.driver import TINY, generate, make_request
from tests.sweeps import swept
from tinyvllm.config import CACHE_DIR_VARIABLE, EngineConfig, ModelFiles
from tinyvllm.device.program_store import ProgramStore
from tinyvllm.execution import step_code
from tinyvllm.execution.inspector import RunnerInspector
from tinyvllm.execution.runner import ModelRunner, load_runner
from tinyvllm.ops.cpu.backend import CpuBackend

from tinygrad.codegen import to_program_cache  # isort: skip  (tinyvllm makes its settings first)

CONFIG = dataclasses.replace(TINY, decode_buckets=(2,))
NUM_STEPS = 2 * 2  # decode 2, prefill 8; each with sampling as it is and from processed logits
PROMPTS = [[5, 9, 200, 13, 64, 7, 7, 31, 90, 18, 2], [31, 7]]


@dataclasses.dataclass(frozen=True)
class FirstStart:
    """What a cold start left and did."""

    root: Path
    num_programs: int
    tokens: list[list[int]]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, tiny_gguf_files: ModelFiles) -> FirstStart:
    root = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_DIR_VARIABLE, str(root))
        store, tokens = start(tiny_gguf_files)
    assert store.num_steps_read == 0
    assert store.num_programs_compiled > 0
    return FirstStart(root, store.num_programs_compiled, tokens)


@pytest.fixture
def cache(first: FirstStart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A separate cache, as the first start left it."""
    shutil.copytree(first.root, tmp_path / "cache")
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "programs"


def start(files: ModelFiles, config: EngineConfig = CONFIG) -> tuple[ProgramStore, list[list[int]]]:
    """A new runner, as in a process that has compiled nothing: the store that it used, and what it generates."""
    with mock.patch.dict(to_program_cache, clear=True):
        runner = load_runner(files, config)
        runner.warm_up()
    assert runner.store is not None
    return runner.store, tokens_of(runner)


def tokens_of(runner: ModelRunner) -> list[list[int]]:
    requests = [make_request(prompt, name=str(i), logprobs=2) for i, prompt in enumerate(PROMPTS)]
    generate(runner, requests, 12, chunk=5)
    return [request.output_ids for request in requests]


def counts(store: ProgramStore) -> tuple[int, int]:
    """Steps that were found, programs that were compiled."""
    return store.num_steps_read, store.num_programs_compiled


def test_a_restored_step_says_what_takes_the_general_kernels(
    cache: Path, tiny_gguf_files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that comes from the disk is not traced again, and its operations have said it when it was. The CPU has no
    general kernels: one is pretended to be. The programs are there."""
    for step in cache.glob("*/step-*"):
        step.unlink()
    linear = CpuBackend.linear

    def noted(backend: CpuBackend, name: str, *args: Any) -> Any:
        backend.coverage.take_general(f"{name}: a product", "a softcap" if name == "lm_head" else "")
        return linear(backend, name, *args)

    monkeypatch.setattr(CpuBackend, "linear", noted)
    for num_read in (0, NUM_STEPS):
        runner = load_runner(tiny_gguf_files, CONFIG)
        runner.warm_up()
        assert runner.store is not None and runner.store.num_steps_read == num_read
        lines = RunnerInspector(runner).general_operations
        assert lines == ["lm_head: a product with a softcap takes the general kernel"]
        assert runner.num_general_operations == 1


def test_a_second_start_compiles_nothing_and_answers_the_same(
    first: FirstStart, cache: Path, tiny_gguf_files: ModelFiles
) -> None:
    store, tokens = start(tiny_gguf_files)
    assert counts(store) == (NUM_STEPS, 0)
    assert store.num_programs_read == 0  # a step brings its programs along
    assert tokens == first.tokens


def test_the_cache_can_be_left_out_and_changes_no_token(
    first: FirstStart, tiny_gguf_files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(tmp_path))
    runner = load_runner(tiny_gguf_files, dataclasses.replace(CONFIG, compile_cache=False))
    runner.warm_up()
    assert runner.store is None
    assert list(tmp_path.iterdir()) == []
    assert tokens_of(runner) == first.tokens


def test_other_weights_of_the_same_shape_find_the_same_steps(first: FirstStart, cache: Path, tmp_path: Path) -> None:
    store, tokens = start(write_tiny_gguf(tmp_path / "other.gguf", seed=12))
    assert counts(store) == (NUM_STEPS, 0)
    assert tokens != first.tokens


def test_other_settings_make_their_own_steps_out_of_the_same_programs(
    first: FirstStart, cache: Path, tiny_gguf_files: ModelFiles
) -> None:
    store, tokens = start(tiny_gguf_files, dataclasses.replace(CONFIG, max_num_seqs=3, decode_buckets=(2, 3)))
    assert store.num_steps_read == 2  # the decode graph that was there; prefill now gathers 3 rows
    assert 0 < store.num_programs_compiled < first.num_programs
    assert store.num_programs_read > 0
    assert tokens == first.tokens


@pytest.mark.parametrize("are_all", swept([False, True], [False]), ids=["some", "all"])
def test_damaged_files_are_rebuilt(first: FirstStart, cache: Path, tiny_gguf_files: ModelFiles, are_all: bool) -> None:
    """All steps, and some or all of the programs that they are made of."""
    steps = set(cache.glob("*/step-*"))
    programs = sorted(set(cache.glob("*/*")) - steps)
    damaged = programs if are_all else programs[::8]
    for path in [*steps, *damaged]:
        path.write_bytes(path.read_bytes()[:-1])
    store, tokens = start(tiny_gguf_files)
    assert store.num_steps_read == 0 and 0 < store.num_programs_compiled <= len(damaged)
    assert store.num_programs_compiled + store.num_programs_read == first.num_programs
    assert not (are_all and store.num_programs_read)
    assert tokens == first.tokens
    assert counts(start(tiny_gguf_files)[0]) == (NUM_STEPS, 0)


def test_after_a_change_of_our_code_steps_are_traced_again(
    first: FirstStart, cache: Path, tiny_gguf_files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_code, "sources_digest", lambda: "edited")
    store, tokens = start(tiny_gguf_files)
    assert counts(store) == (0, 0)  # kernels that are as they were need no compiler
    assert store.num_programs_read == first.num_programs
    assert tokens == first.tokens


def test_a_cache_that_others_can_write_is_not_used(
    cache: Path, tiny_gguf_files: ModelFiles, caplog: pytest.LogCaptureFixture
) -> None:
    cache.chmod(0o777)
    assert load_runner(tiny_gguf_files, CONFIG).store is None
    assert "chmod go-w" in caplog.text
