from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyvllm.text.stop import StopChecker

FEW = st.text(alphabet="abc", max_size=12)
STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=5), max_size=4).map(tuple)


def cut_whole(text: str, stops: tuple[str, ...], include: bool) -> tuple[str, str | None]:
    """The plain reference: the stop string that is complete first, the longest of those that end at one place."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def run(checker: StopChecker, chunks: list[str]) -> tuple[str, str | None]:
    """All text that comes out, and the stop string."""
    out = ""
    for chunk in chunks:
        text, stop = checker.push(chunk)
        out += text
        if stop is not None:
            return out + checker.flush(), stop
    return out + checker.flush(), None


@given(st.lists(FEW, max_size=6), STOPS, st.booleans())
def test_any_chunks_give_what_the_whole_text_gives(chunks: list[str], stops: tuple[str, ...], include: bool) -> None:
    assert run(StopChecker(stops, include), chunks) == cut_whole("".join(chunks), stops, include)


@given(FEW, STOPS)
def test_no_more_is_held_back_than_could_begin_a_stop_string(text: str, stops: tuple[str, ...]) -> None:
    out, stop = StopChecker(stops, include=False).push(text)
    if stop is None:
        ends = (text[len(text) - length :] for length in range(len(text), -1, -1))
        held = next(end for end in ends if not end or any(stop.startswith(end) for stop in stops))
        assert out + held == text


@pytest.mark.parametrize(("include", "expected"), [(False, "Hello"), (True, "Hello\n\nUser:")])
def test_stop_string_across_chunks_is_cut_unless_included(include: bool, expected: str) -> None:
    chunks = ["Hel", "lo\n", "\nUs", "er: more"]
    assert run(StopChecker(("\n\nUser:",), include), chunks) == (expected, "\n\nUser:")


def test_text_that_only_began_a_stop_string_comes_out() -> None:
    checker = StopChecker(("</end>",), include=False)
    assert checker.push("a</en") == ("a", None)
    assert checker.push("x") == ("</enx", None)
    assert checker.push("</") == ("", None)
    assert checker.flush() == "</"
    assert checker.flush() == ""


def test_without_stop_strings_all_text_passes() -> None:
    checker = StopChecker((), include=False)
    assert checker.push("anything") == ("anything", None)
    assert checker.flush() == ""


def test_nothing_comes_out_after_a_stop_string() -> None:
    checker = StopChecker(("b",), include=False)
    assert checker.push("abc") == ("a", "b")
    assert checker.push("more") == ("", "b")
    assert checker.flush() == ""


def test_long_stop_strings_of_one_letter_take_linear_time() -> None:
    """The case that is quadratic for those who compare every suffix: a run that almost matches, again and again."""
    checker = StopChecker(("a" * 20_000 + "b",), include=False)
    out = "".join(checker.push("a" * 20_000 + "c")[0] for _ in range(5))
    assert len(out) == 5 * 20_001
