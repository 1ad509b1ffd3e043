"""Tiers below the pool of a device of integers, which answers otherwise if any copy is wrong."""

from __future__ import annotations

import logging
import os
import threading
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.execution.tiered import TieredFlights, TieredRunner, attach, make_rows, make_tiers
from tests.patience import PATIENCE_S, wait_for
from tests.scheduling.fakes import FakeRunner, make_request, make_scheduler, run_alone
from tests.scheduling.test_properties import Traffic, check_traffic
from tests.sweeps import in_both, length, swept
from tinyvllm.config import BlockGroup, EngineConfig, ModelFiles
from tinyvllm.errors import CacheError, TinyvllmError
from tinyvllm.execution.kv_tiers.disk_tier import DiskTier
from tinyvllm.execution.kv_tiers.files import Block, file_name, key_of, read_block, write_block
from tinyvllm.execution.kv_tiers.host_tier import HostTier, divide_rows
from tinyvllm.execution.kv_tiers.rates import PROBE, Rates
from tinyvllm.faults import Fault, planned
from tinyvllm.scheduling.request import Request
from tinyvllm.scheduling.scheduler import Scheduler
from tinyvllm.scheduling.tiers import DISK, HOST, STATE, Key
from tinyvllm.storage.identity import weights_digest

WINDOWS = (BlockGroup(14, 9), BlockGroup(9, 2))
KINDS: list[dict[str, Any]] = [
    {"num_blocks": 12},
    {"num_blocks": 20, "other_groups": WINDOWS, "max_model_len": 60},
    {"num_blocks": 20, "num_state_slots": 12, "checkpoint_interval": 2},
    {"num_blocks": 20, "window": 8, "max_model_len": 40},
    {"num_blocks": 20, "num_state_slots": 9, "checkpoint_interval": 3, "other_groups": (BlockGroup(14, 6),)},
]


class TieredTraffic(Traffic):
    def __init__(self, scheduler: Scheduler, seed: int, depth: int, **fields: Any) -> None:
        super().__init__(scheduler, seed, depth)
        self.runner = attach(scheduler, **fields)
        self.flights = TieredFlights(scheduler, self.runner, depth)
        self.num_moves = 0

    def move(self, arrivals: float, disturbances: float) -> None:
        """Now and then the disk's thread has the time to write all: traffic of small numbers is faster than files."""
        super().move(arrivals=arrivals, disturbances=disturbances)
        tiers = self.runner.tiers
        assert tiers is not None
        self.num_moves += 1
        if tiers.disk is not None and self.num_moves % 8 == 0:
            tiers.disk.wait_idle()
            tiers.poll()

    @property
    def counts(self) -> dict[str, float]:
        assert self.runner.tiers is not None
        return self.runner.tiers.counts()


@in_both
@pytest.mark.parametrize(
    ("kind", "has_disk"),
    swept(product(range(len(KINDS)), (False, True)), [(0, True), (3, False), (4, True)]),
)
def test_random_traffic_answers_as_without_tiers(kind: int, has_disk: bool, tmp_path: Path) -> None:
    folder, num_rows = (tmp_path, 30) if has_disk else (None, 200)
    for seed in range(1 + has_disk):
        scheduler = make_scheduler(**{"max_num_seqs": 6, "max_num_batched_tokens": 16, **KINDS[kind]})
        traffic = TieredTraffic(
            scheduler,
            kind,
            1 + (kind + seed) % 2,
            num_rows=num_rows,
            folder=folder,
            keeps_evicted=not has_disk or bool(seed),
        )
        check_traffic(traffic, length(60, 100))
        tiers = traffic.runner.tiers
        assert tiers is not None
        tiers.flush()
        if tiers.disk is not None:
            tiers.disk.wait_idle()
            tiers.poll()
        tiers.host.audit()
        assert not any(entry.users for shelf in tiers.host._shelves.values() for entry in shelf.entries.values())
        assert traffic.counts["tier_load_bytes"] > 0 and traffic.counts["tier_failures"] == 0, traffic.counts
        if has_disk and seed:  # the second server finds what the first has written
            assert traffic.counts["tier_read_bytes"] > 0
        tiers.close()


def answer(scheduler: Scheduler, runner: TieredRunner, request: Request) -> Request:
    """Run a request to its end, and compare it with its answer alone."""
    scheduler.add(request)
    flights = TieredFlights(scheduler, runner)
    end_s = time.monotonic() + PATIENCE_S
    while scheduler.has_work:
        flights.step()
        assert time.monotonic() < end_s
    assert request.output_ids == run_alone(request)
    return request


def start(folder: Path | None, **fields: Any) -> tuple[Scheduler, TieredRunner]:
    """A server with a pool of 40 blocks of 4 tokens, and what is below it."""
    scheduler = make_scheduler(40)
    return scheduler, attach(scheduler, folder=folder, keeps_evicted=folder is None, **fields)


def stop(runner: TieredRunner) -> None:
    assert runner.tiers is not None and runner.tiers.disk is not None
    runner.tiers.flush()
    runner.tiers.close()


PROMPT = list(range(100, 141))  # 10 blocks and a token


def test_a_restart_finds_prefixes_on_disk_but_not_of_another_salt_model_or_text(tmp_path: Path) -> None:
    scheduler, runner = start(tmp_path)
    assert answer(scheduler, runner, make_request("first", PROMPT)).num_cached_tokens == 0
    stop(runner)
    scheduler, runner = start(tmp_path)
    others = make_request("others", PROMPT)
    others.hash_seed = b"another salt"
    assert answer(scheduler, runner, others).num_cached_tokens == 0
    assert answer(scheduler, runner, make_request("changed", [*PROMPT[:8], 7, *PROMPT[9:]])).num_cached_tokens == 8
    again = answer(scheduler, runner, make_request("again", [*PROMPT, 1, 2, 3]))
    assert again.num_cached_tokens == 40 and runner.plans[-1].num_tokens <= 4
    assert runner.tiers is not None
    assert runner.tiers.counts()["tier_disk_hits"] == 40
    stop(runner)
    scheduler, runner = start(tmp_path, digest=b"another model   ")
    assert answer(scheduler, runner, make_request("foreign", PROMPT)).num_cached_tokens == 0
    stop(runner)


def test_damaged_truncated_and_foreign_files_are_ignored_and_deleted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scheduler, runner = start(tmp_path)
    first = answer(scheduler, runner, make_request("first", PROMPT))
    stop(runner)
    folder = tmp_path / (b"d" * 16).hex()
    names = [file_name(Key(0, block_hash)) for block_hash in first.block_hashes[:10]]
    assert {*names} <= {path.name for path in folder.iterdir()}
    content = (folder / names[5]).read_bytes()
    harms = {
        "its checksum is wrong": content[:-1] + bytes([content[-1] ^ 1]),
        "bytes instead of": content[:-3],
        "it has more bytes": content + b"x",
        "not a KV block of this version": b"tvllm-kv\x63" + content[9:],
        "of another model or other tokens": content[:16] + b"another model   " + content[32:],
    }
    for reason, harmed in harms.items():
        (folder / names[5]).write_bytes(harmed)
        (folder / "notes.txt").write_text("not ours")
        scheduler, runner = start(tmp_path)
        caplog.clear()
        assert answer(scheduler, runner, make_request("again", PROMPT)).num_cached_tokens == 20, reason
        assert reason in caplog.text
        assert runner.tiers is not None and runner.tiers.counts()["tier_failures"] == 1
        stop(runner)  # which writes the block again
        assert (folder / names[5]).read_bytes() == content and (folder / "notes.txt").exists()
    (folder / names[3]).unlink()  # another server's doing, while this one runs
    scheduler, runner = start(tmp_path)
    (folder / names[0]).unlink()
    assert answer(scheduler, runner, make_request("again", PROMPT)).num_cached_tokens == 0
    stop(runner)


def test_the_folder_is_bounded_and_the_least_recently_used_files_go_first(tmp_path: Path) -> None:
    scheduler, runner = start(tmp_path, max_disk_bytes=20 * 128)
    prompts = [[number] * 41 for number in range(4)]
    for number, prompt in enumerate(prompts):
        answer(scheduler, runner, make_request(f"r{number}", prompt, max_tokens=1))
        assert runner.tiers is not None and runner.tiers.disk is not None
        runner.tiers.flush()
        runner.tiers.disk.wait_idle()
        time.sleep(0.02)  # so that times of files differ
    stop(runner)
    sizes = [path.stat().st_size for path in tmp_path.rglob("*.kv")]
    assert 0 < sum(sizes) <= 20 * 128
    scheduler, runner = start(tmp_path)
    found = [
        answer(scheduler, runner, make_request(f"s{n}", prompt)).num_cached_tokens for n, prompt in enumerate(prompts)
    ]
    assert found[0] == found[1] == 0 and found[3] == 40, found
    stop(runner)


def test_two_servers_share_a_folder(tmp_path: Path) -> None:
    servers = [start(tmp_path), start(tmp_path)]
    answer(*servers[0], make_request("first", PROMPT))
    tiers = servers[0][1].tiers
    assert tiers is not None and tiers.disk is not None
    tiers.flush()
    tiers.disk.wait_idle()
    other = servers[1][1].tiers
    assert other is not None and other.disk is not None
    other.disk._scan()  # as it does from time to time
    assert answer(*servers[1], make_request("again", PROMPT)).num_cached_tokens == 40
    for _, runner in servers:
        stop(runner)


def test_a_folder_that_was_removed_is_made_again(tmp_path: Path) -> None:
    """Another server removes empty folders when it deletes old files; people remove caches."""
    scheduler, runner = start(tmp_path)
    (tmp_path / (b"d" * 16).hex()).rmdir()
    answer(scheduler, runner, make_request("first", PROMPT))
    stop(runner)
    assert len(list(tmp_path.rglob("*.kv"))) >= 10


def test_a_full_disk_or_an_unusable_folder_is_logged_once_and_serving_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with planned(Fault("tier.write", "os", times=1000)):
        scheduler, runner = start(tmp_path)
        answer(scheduler, runner, make_request("first", PROMPT))
        stop(runner)
    assert caplog.text.count("KV blocks cannot be written") == 1 and "No space left" in caplog.text
    assert not list(tmp_path.rglob("*.kv")) and not list(tmp_path.rglob(".*.kv*"))
    caplog.clear()
    (tmp_path / "file").write_text("")
    scheduler, runner = start(tmp_path / "file")
    answer(scheduler, runner, make_request("second", PROMPT))
    stop(runner)
    assert caplog.text.count("cannot be used") == 1
    shared = tmp_path / "shared" / (b"d" * 16).hex()
    shared.mkdir(parents=True)
    shared.chmod(0o777)
    scheduler, runner = start(tmp_path / "shared")
    answer(scheduler, runner, make_request("third", PROMPT))
    assert "nobody else can write" in caplog.text and not runner.tiers.has_disk  # type: ignore[union-attr]
    stop(runner)


@pytest.mark.parametrize("how", ["os", "memory", "device"])
def test_failing_copies_and_reads_cost_no_request(how: str, tmp_path: Path) -> None:
    scheduler, runner = start(tmp_path)
    with planned(Fault("tier.copy_out", how), Fault("tier.write", how, at=3)):
        answer(scheduler, runner, make_request("first", PROMPT))
        answer(scheduler, runner, make_request("second", [*PROMPT, *PROMPT]))
        stop(runner)
    scheduler, runner = start(tmp_path)
    with planned(Fault("tier.read", how, at=2), Fault("tier.allocate", how, at=5)):
        answer(scheduler, runner, make_request("again", PROMPT))
    stop(runner)


def test_a_copy_to_the_device_that_fails_ends_the_step_and_leaves_no_wrong_block() -> None:
    scheduler, runner = start(None)
    answer(scheduler, runner, make_request("first", PROMPT))
    answer(scheduler, runner, make_request("other", 120, max_tokens=1))  # takes the pool
    scheduler.add(victim := make_request("victim", PROMPT))
    with planned(Fault("tier.copy_in", "device")), pytest.raises(RuntimeError):
        TieredFlights(scheduler, runner).step()
    scheduler.finish(victim, "error")
    again = answer(scheduler, runner, make_request("again", PROMPT))
    assert again.num_cached_tokens == 0 or runner.tiers.counts()["tier_host_hits"]  # type: ignore[union-attr]
    runner.tiers.host.audit()  # type: ignore[union-attr]


@pytest.mark.parametrize("is_written", [False, True])
def test_blocks_of_a_request_that_failed_are_forgotten_everywhere(is_written: bool, tmp_path: Path) -> None:
    scheduler, runner = start(tmp_path)
    scheduler.add(request := make_request("r", PROMPT, max_tokens=50))
    flights = TieredFlights(scheduler, runner)
    for _ in range(2):
        flights.step()
    assert runner.tiers is not None and runner.tiers.disk is not None and runner.tiers.has_backlog
    if is_written:
        runner.tiers.flush()
        runner.tiers.disk.wait_idle()
        assert list(tmp_path.rglob("*.kv"))
    scheduler.finish(request, "error")
    runner.tiers.flush()
    runner.tiers.disk.wait_idle()
    assert not list(tmp_path.rglob("*.kv"))
    stop(runner)


def test_what_is_being_restored_does_not_give_way_to_what_falls_out_meanwhile() -> None:
    scheduler = make_scheduler(13)  # 12 blocks of 4 tokens
    runner = attach(scheduler, num_rows=11)
    prompts = [[number] * 42 for number in range(3)]
    for number, prompt in enumerate([*prompts, *prompts]):  # each takes the pool from the others, and fills the tier
        answer(scheduler, runner, make_request(f"r{number}", prompt, max_tokens=4))
    assert runner.tiers is not None
    answer(scheduler, runner, make_request("again", [*prompts[1], 7], max_tokens=1))
    counts = runner.tiers.counts()
    assert counts["tier_host_hits"] >= 40 and counts["tier_skipped"] > 0, counts
    runner.tiers.host.audit()


def test_a_reset_forgets_the_pool_and_if_asked_the_tiers(tmp_path: Path) -> None:
    scheduler, runner = start(tmp_path)
    manager = scheduler.block_manager
    answer(scheduler, runner, make_request("first", PROMPT))
    assert runner.tiers is not None and runner.tiers.disk is not None
    runner.tiers.flush()
    runner.tiers.disk.wait_idle()
    probe = make_request("probe", PROMPT)
    assert [manager.num_found(probe, depth) for depth in range(3)] == [10, 10, 10]
    manager.reset(with_tiers=False)
    assert [manager.num_found(probe, depth) for depth in range(3)] == [0, 0, 10]
    assert answer(scheduler, runner, make_request("again", PROMPT)).num_cached_tokens == 40
    manager.reset(with_tiers=True)
    assert [manager.num_found(probe, depth) for depth in range(3)] == [0, 0, 0]
    runner.tiers.disk.wait_idle()
    assert not list(tmp_path.rglob("*.kv"))
    manager.audit()
    stop(runner)


def test_requests_with_one_prefix_share_its_reading_and_a_slow_disk_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler, runner = start(tmp_path)
    answer(scheduler, runner, make_request("first", PROMPT))
    stop(runner)
    scheduler, runner = start(tmp_path)
    requests = [make_request(f"r{number}", [*PROMPT, number]) for number in range(3)]
    with planned() as plan:
        for request in requests:
            scheduler.add(request)
        answer(scheduler, runner, make_request("last", [*PROMPT, 9]))
    assert plan.reached["tier.read"] == 10
    assert [request.num_cached_tokens for request in requests] == [40] * 3
    stop(runner)
    scheduler, runner = start(tmp_path)
    monkeypatch.setattr("tinyvllm.execution.kv_tiers.tiers.FETCH_S", 0.05)
    with planned(Fault("tier.read", "delay", delay_s=0.5, times=9)):
        scheduler.add(aborted := make_request("aborted", [*PROMPT, 1]))
        assert scheduler.is_fetching
        answer(scheduler, runner, make_request("hasty", PROMPT[:9]))
        assert scheduler.abort("aborted") is None or aborted.finish_reason == "abort"
    runner.tiers.disk.close()  # type: ignore[union-attr]


def test_what_does_not_pay_is_computed_but_tried_now_and_then() -> None:
    rates = Rates()
    assert rates.pays(16, 1 << 30, DISK)  # nothing is known yet
    rates.note_computed(1000, 1.0)
    rates.note_loaded(10**9, 1.0)
    assert rates.pays(1000, 5 * 10**8, HOST) and rates.pays(1000, 5 * 10**8, DISK)
    rates.note_read(10**8, 1.0)
    assert rates.pays(1000, 5 * 10**7, DISK)
    assert sum(rates.pays(1000, 5 * 10**8, DISK) for _ in range(10 * PROBE)) == 10
    assert rates.pays(1000, 5 * 10**8, HOST)
    rates.note_computed(8, 1e-9)  # too few tokens to tell
    assert rates.tokens_per_s == 1000


@pytest.mark.parametrize("follows_steps", [True, False])
def test_copies_that_do_not_follow_the_steps_wait_for_those_that_use_the_blocks(follows_steps: bool) -> None:
    waits: list[int] = []
    tiers = make_tiers(FakeRunner(4), wait=lambda: waits.append(1))
    for copies in tiers._copies.values():
        copies.follows_steps = follows_steps
        copies.runner.pools[0].update(dict.fromkeys(range(100), 5))  # type: ignore[attr-defined]
    tiers._follows_steps = follows_steps
    old, new = Key(0, b"old"), Key(0, b"new")
    tiers.sealed(old, 1, b"")
    tiers.launched()
    tiers.collected()
    tiers.launched()
    tiers.sealed(new, 2, b"")  # perhaps computed by the step in flight
    tiers.evict(old, 1, b"")
    tiers.before_step()
    assert not waits and tiers.has(old, b"")
    tiers.evict(new, 2, b"")
    tiers.before_step()
    assert len(waits) == (not follows_steps)
    tiers.restore(old, 3)
    tiers.before_step()
    assert len(waits) == 2 * (not follows_steps)
    tiers.collected()
    tiers.restore(new, 4)
    tiers.before_step()
    assert len(waits) == 2 * (not follows_steps)


def test_host_memory_gives_up_the_least_recently_used_and_never_what_is_in_use() -> None:
    host = HostTier({0: 8, STATE: 4}, {0: 3, STATE: 1}, make_rows, ahead=False)
    keys = [Key(0, bytes([number])) for number in range(5)]
    entries = [host.reserve(key, b"") for key in keys[:3]]
    assert None not in entries and host.reserve(keys[3], b"") is None
    for entry in entries[1:]:
        assert entry is not None
        entry.is_ready = True
        host.release(entry)
    assert host.touch(keys[1]) and host.reserve(keys[3], b"") is not None
    assert [host.entry(key) is not None for key in keys] == [True, True, False, True, False]
    assert (
        host.find(keys[1], b"") is not None and host.find(keys[1], b"other") is None and host.find(keys[0], b"") is None
    )
    assert host.reserve(Key(STATE, b"x"), b"") is not None and host.used_bytes == 3 * 8 + 4
    host.clear()
    assert entries[0] is not None
    host.release(entries[0])
    host.audit()
    assert divide_rows(1000, {0: 10, 1: 20}, {0: 8, 1: 1}) == {0: 80, 1: 10}
    assert divide_rows(1, {0: 10}, {0: 8}) == {0: 1}


def test_files_are_named_by_their_keys_and_hold_what_they_say(tmp_path: Path) -> None:
    for kind in (STATE, 0, 12):
        key = Key(kind, bytes(range(16)))
        assert key_of(file_name(key)) == key
    for name in ("x.kv", "0" * 32 + ".x.kv", "0" * 32 + ".1.txt", "g" * 32 + ".1.kv"):
        assert key_of(name) is None
    block, data = Block(b"d" * 16, Key(0, b"h" * 16), b"tokens"), np.arange(100, dtype=np.uint8)
    size = write_block(tmp_path, block, data)
    assert size == os.path.getsize(tmp_path / block.name)
    out = np.zeros(100, np.uint8)
    read_block(tmp_path, block, out)
    assert np.array_equal(out, data)
    with pytest.raises(CacheError, match="other tokens"):
        read_block(tmp_path, Block(block.digest, block.key, b"TOKENS"), out)


def test_weights_are_identified_by_their_content(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    content = rng.integers(0, 255, size=3 << 20, dtype=np.uint8)
    paths = [tmp_path / name for name in ("a.gguf", "b.gguf")]
    for path in paths:
        content.tofile(path)
    digests = [weights_digest(ModelFiles("gguf", path, "x")) for path in paths]
    assert digests[0] == digests[1]
    content[1 << 20 : (1 << 20) + 8192] += 1
    content.tofile(paths[0])
    assert weights_digest(ModelFiles("gguf", paths[0], "x")) != digests[0]


def test_an_unfinished_file_of_a_writer_that_died_is_deleted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / (b"d" * 16).hex()
    folder.mkdir(parents=True, mode=0o700)
    stale, young = folder / f".{'0' * 32}.1.kv.77", folder / f".{'1' * 32}.1.kv.78"
    for path in (stale, young):
        path.write_bytes(b"x")
    os.utime(stale, (0, 0))
    with caplog.at_level(logging.WARNING):
        DiskTier(tmp_path, b"d" * 16, 1 << 30, 1 << 20).close()
    assert not stale.exists() and young.exists() and not caplog.text


def test_a_scan_that_fails_does_not_end_the_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: DiskTier) -> None:
        raise PermissionError("no")

    disk = DiskTier(tmp_path, b"d" * 16, 1 << 30, 1 << 20)
    disk.wait_idle()
    monkeypatch.setattr("tinyvllm.execution.kv_tiers.disk_tier.RESCAN_S", 0.01)
    monkeypatch.setattr(DiskTier, "_scan", fail)
    disk.wait_idle()  # from now on, the shorter time holds
    wait_for(lambda: "cannot be put in order" in caplog.text)
    assert disk._thread.is_alive()
    monkeypatch.undo()
    disk.wait_idle()
    disk.close()


@pytest.mark.parametrize(
    ("mode", "owner", "remedy"),
    [
        (0o777, 0, "chmod go-w"),
        (0o775, 0, "chmod go-w"),
        (0o755, 1, "belongs to user"),
        (0o1777, 0, ""),
        (0o755, 0, ""),
    ],
)
def test_a_root_in_which_others_could_replace_folders_is_not_used(
    mode: int,
    owner: int,
    remedy: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    root = tmp_path / "kv"
    root.mkdir()
    root.chmod(mode)
    real_stat = os.stat

    def stat_of(path: Any, **how: Any) -> os.stat_result:
        info = real_stat(path, **how)
        if Path(path) != root:
            return info
        fields = list(info)
        fields[4] = os.getuid() + owner  # st_uid
        return os.stat_result(fields)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", stat_of)
        disk = DiskTier(root, b"d" * 16, 1 << 30, 1 << 20)
    disk.close()
    assert disk.is_usable == (not remedy) == (not caplog.text)
    if remedy:
        assert remedy in caplog.text and f"{mode:04o}" in caplog.text and str(root) in caplog.text
        assert not list(root.iterdir())


def test_a_new_root_is_private_whatever_the_umask(tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        disk = DiskTier(tmp_path / "kv", b"d" * 16, 1 << 30, 1 << 20)
    finally:
        os.umask(umask)
    disk.close()
    assert disk.is_usable and (tmp_path / "kv").stat().st_mode & 0o777 == 0o700


def test_folders_and_files_of_others_under_the_root_are_left_alone(tmp_path: Path) -> None:
    empty, theirs, ours = tmp_path / "mine", tmp_path / "notes", tmp_path / ("ab" * 16)
    for folder in (empty, theirs, ours):
        folder.mkdir()
    files = [theirs / file_name(Key(0, b"h" * 16)), theirs / ".draft.kv.1", tmp_path / ".draft.kv.1"]
    for path in files:
        path.write_bytes(b"x" * 1000)
        os.utime(path, (0, 0))
    disk = DiskTier(tmp_path, b"d" * 16, 0, 1 << 20)
    disk._trim()
    disk.close()
    assert empty.is_dir() and all(path.exists() for path in files) and not ours.exists()
    assert disk.used_bytes == 0


def put(disk: DiskTier, key: Key) -> bool:
    """Whether a block could be written."""
    results: list[bool] = []
    disk.write(key, b"tokens", np.zeros(100, np.uint8), results.append)
    disk.wait_idle()
    return results[0]


def test_a_folder_in_a_blocks_place_costs_that_block_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    disk = DiskTier(tmp_path, b"d" * 16, 1 << 30, 1 << 20)
    taken, free, later = (Key(0, bytes([number]) * 16) for number in range(3))
    (tmp_path / (b"d" * 16).hex() / file_name(taken)).mkdir()
    assert not put(disk, taken) and not disk.is_paused and disk.num_failed == 1
    assert put(disk, free) and "is not written" in caplog.text
    with planned(Fault("tier.write", "os")):
        assert not put(disk, later) and disk.is_paused and "No space left" in caplog.text
    disk.close()


def test_what_was_to_be_written_before_a_reset_is_forgotten_with_the_rest(tmp_path: Path) -> None:
    disk = DiskTier(tmp_path, b"d" * 16, 1 << 30, 1 << 20)
    gate, key, data = threading.Event(), Key(0, b"h" * 16), np.zeros(100, np.uint8)
    disk.write(key, b"tokens", data, lambda is_written: None, lambda: (gate.wait(PATIENCE_S), None)[1])
    disk.clear()
    gate.set()
    disk.wait_idle()
    assert not disk.has(key) and not list(tmp_path.rglob("*.kv")) and disk.used_bytes == 0
    disk.close()


def test_a_limit_of_the_disk_without_a_folder_is_refused() -> None:
    with pytest.raises(TinyvllmError, match=r"--kv-disk-size is 50, .* name one with --kv-disk-cache"):
        EngineConfig("m", kv_offloading_size=1.0, kv_disk_size=50.0)
    assert EngineConfig("m", kv_disk_cache="kv").kv_disk_bytes == 16 << 30
    assert EngineConfig("m", kv_disk_cache="kv", kv_disk_size=0.5).kv_disk_bytes == 1 << 29
