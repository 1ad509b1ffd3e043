"""What takes the general kernels is noted once a layer, in words."""

from __future__ import annotations

import logging

import pytest

from tinyvllm.ops.coverage import Coverage, in_words


def test_layers_of_one_reason_are_one_line(caplog: pytest.LogCaptureFixture) -> None:
    coverage = Coverage()
    assert (coverage.count, coverage.lines()) == (0, [])
    with caplog.at_level(logging.WARNING):
        for layer in (3, 4, 5, 9, 4):
            coverage.take_general("attention", "a window and sinks", layer)
        coverage.take_general("attention", "", 7)  # covered
        coverage.take_general("lm_head: a product", "a softcap")
    assert coverage.lines() == [
        "layers 3-5, 9: attention with a window and sinks takes the general kernel",
        "lm_head: a product with a softcap takes the general kernel",
    ]
    assert coverage.count == 5
    assert len(caplog.messages) == 2
    assert caplog.messages[0].startswith("layer 3: attention with a window and sinks takes the general kernel")


def test_what_was_watched_can_be_restored() -> None:
    first, second = Coverage(), Coverage()
    first.take_general("attention", "sinks", 0)
    with first.watching() as notes:
        first.take_general("attention", "sinks", 0)  # again: the step that is watched has it too
        first.take_general("attention", "sinks", 1)
    first.take_general("attention", "sinks", 2)
    second.restore(notes)
    assert second.lines() == ["layers 0-1: attention with sinks takes the general kernel"]


@pytest.mark.parametrize(
    ("names", "text"), [([], ""), (["a"], "a"), (["a", "b"], "a and b"), (["a", "b", "c"], "a, b and c")]
)
def test_names_are_joined_in_words(names: list[str], text: str) -> None:
    assert in_words(names) == text
