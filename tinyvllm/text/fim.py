"""Fill in the middle: prompts that ask for the text between a prefix and a suffix (Bavarian et al. 2022).

A model trained for it has tokens that mark the two parts. The tokens determine how the parts are arranged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Marks:
    """How one family of models writes the parts."""

    prefix: str
    suffix: str
    middle: str | None  # None: nothing marks the place of the answer
    is_suffix_first: bool = False


# Of tokens that two families share, the arrangement is that of the more common family.
KNOWN_MARKS = (
    Marks("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder, CodeGemma, Granite 4
    Marks("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite Code, Stable Code
    Marks("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    Marks("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
    Marks("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek-Coder
    Marks("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>", is_suffix_first=True),  # CodeGeeX4
    Marks("<[fim-prefix]>", "<[fim-suffix]>", "<[fim-middle]>", is_suffix_first=True),  # Seed-Coder
    Marks("[PREFIX]", "[SUFFIX]", None, is_suffix_first=True),  # Codestral
)

# Tokens that follow the middle where a model goes on: padding, or the next file of a repository
END_TEXTS = (
    "<|fim_pad|>",
    "<fim_pad>",
    "<fim-pad>",
    "<|repo_name|>",
    "<repo_name>",
    "<reponame>",
    "<|file_sep|>",
    "<file_sep>",
    "<|file_separator|>",
    "<filename>",
    "▁<EOT>",
)


@dataclass(frozen=True)
class FillInTheMiddle:
    """The ids that mark the parts of one model's prompts, and those that end its answer besides EOS."""

    prefix_id: int
    suffix_id: int
    middle_id: int | None
    is_suffix_first: bool
    end_ids: frozenset[int]

    def arrange(self, prefix: Sequence[int], suffix: Sequence[int]) -> list[int]:
        """The prompt. prefix, suffix: the ids of the two texts."""
        parts = [[self.prefix_id, *prefix], [self.suffix_id, *suffix]]
        if self.is_suffix_first:
            parts.reverse()
        return [*parts[0], *parts[1], *([] if self.middle_id is None else [self.middle_id])]


def find_marks(
    id_of: Callable[[str], int | None], text_of: Callable[[int], str | None], stated: Mapping[str, int]
) -> FillInTheMiddle | None:
    """The marks in a vocabulary for filling in the middle; None if it has none.

    stated: the ids that a GGUF file names, by "prefix", "suffix", "middle", "pad", "rep" and "sep". Their texts say how
    the parts are arranged; unknown ones are arranged as most are.
    """
    ends = {found for text in END_TEXTS if (found := id_of(text)) is not None}
    ends |= {stated[name] for name in ("pad", "rep", "sep") if name in stated}
    if {"prefix", "suffix", "middle"} <= stated.keys():
        ids = stated["prefix"], stated["suffix"], stated["middle"]
        known = (marks for marks in KNOWN_MARKS if marks.prefix == text_of(ids[0]))
        return _made(ids, next(known, KNOWN_MARKS[0]), ends)
    for marks in KNOWN_MARKS:
        prefix, suffix = id_of(marks.prefix), id_of(marks.suffix)
        middle = None if marks.middle is None else id_of(marks.middle)
        if prefix is not None and suffix is not None and (middle is None) == (marks.middle is None):
            return _made((prefix, suffix, middle), marks, ends)
    return None


def _made(ids: tuple[int, int, int | None], marks: Marks, ends: set[int]) -> FillInTheMiddle:
    prefix, suffix, middle = ids
    return FillInTheMiddle(
        prefix_id=prefix,
        suffix_id=suffix,
        middle_id=None if marks.middle is None else middle,
        is_suffix_first=marks.is_suffix_first,
        end_ids=frozenset({*ends, prefix, suffix, *([] if middle is None else [middle])}),
    )
