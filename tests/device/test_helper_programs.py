"""A CPU's helper programs are made once for all starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tinyvllm.device import cpu_replay, helper_programs
from tinyvllm.device.handle import open_device

from tinygrad.codegen import do_to_program  # isort: skip  (tinyvllm makes its settings first)


@pytest.mark.parametrize("has_folder", [True, False])
def test_a_helper_program_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_folder: bool) -> None:
    made = []

    def make(*args: object) -> object:
        made.append(args)
        return do_to_program(*args)

    monkeypatch.setattr(helper_programs, "do_to_program", make)
    open_device(2, tmp_path if has_folder else None)
    made.clear()  # what opening the device may have made
    try:
        for expected in (1, 1 if has_folder else 2):
            monkeypatch.setattr(helper_programs, "_made", {})
            cpu_replay._run_table.cache_clear()
            cpu_replay._run_table()
            assert len(made) == expected
    finally:
        helper_programs.keep(None)
    assert any(tmp_path.glob("CPU_helpers-*/program-*")) == has_folder
