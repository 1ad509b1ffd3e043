"""Split a model's reasoning from its answer: text between marks, `<think>` … `</think>` in most families."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tinyvllm.errors import TinyvllmError
from tinyvllm.text.tools.marks import MarkFinder

if TYPE_CHECKING:
    from tinyvllm.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ReasoningFormat:
    """The marks around reasoning in a family of models."""

    begin: str
    end: str
    head: str = ""  # what follows `begin`, and belongs to it
    named_by: str = ""  # a text by which the family's chat templates are recognized; "": `end`

    def shows_special_tokens(self, tokenizer: Tokenizer) -> bool:
        """Whether special tokens must be kept in the output's text, because the marks are among them."""
        from tinyvllm.text.tools.base import special_id  # here: grammars load NumPy, and --help lists the formats

        return any(special_id(tokenizer, text) is not None for text in (self.begin, self.end))

    def is_named_in(self, template_source: str) -> bool:
        return (self.named_by or self.end) in template_source

    def starts_inside(self, prompt: str) -> bool:
        """Whether the prompt ends inside reasoning, because the chat template writes the opening mark."""
        return prompt.rfind(self.begin) > prompt.rfind(self.end) and not prompt[prompt.rfind(self.begin) :].count(
            "\n\n"
        )

    def prefix(self, prompt: str, tokenizer: Tokenizer) -> str:
        """A Lark grammar of the reasoning that may precede the `@answer` of a grammar: see GrammarSpec.prefix."""
        from tinyvllm.text.grammar import lark_string  # here: grammars load NumPy, and --help lists the formats
        from tinyvllm.text.tools.base import mark

        if prompt.rstrip().endswith(self.end):  # as when the template was told to disable reasoning
            return ""
        end = mark(tokenizer, self.end)
        thought = f"thought: TEXT {end}" if end.startswith("<[") else f"thought[lazy]: TEXT {end}"
        head = f"{lark_string(self.head)} " if self.head else ""
        begin = "" if self.starts_inside(prompt) else f"{mark(tokenizer, self.begin)} {head}"
        start = "reasoning @answer" if not begin else "reasoning @answer | @answer"
        return f"start: {start}\nreasoning: {begin}thought BLANKS\n{thought}\nTEXT: /(.|\\n)*/\nBLANKS: /\\n{{0,2}}/\n"

    def parser(self, prompt: str) -> ReasoningParser:
        return ReasoningParser(self, self.starts_inside(prompt))


FORMATS = {
    "think": ReasoningFormat("<think>", "</think>"),
    "mistral": ReasoningFormat("[THINK]", "[/THINK]"),
    "gemma4": ReasoningFormat("<|channel>", "<channel|>", head="thought\n"),
    # only if calls are in another format: text/tools/harmony.py reads reasoning and calls at once
    "harmony": ReasoningFormat("<|channel|>analysis<|message|>", "<|end|>", named_by="<|channel|>analysis"),
    "granite": ReasoningFormat("Here is my thought process:", "Here is my response:"),
}
# vLLM's names
ALIASES = {name: "think" for name in ("qwen3", "deepseek_r1", "deepseek_v3", "glm45", "smollm3", "exaone4", "olmo3")}
ALIASES["openai_gptoss"] = "harmony"


def find_reasoning_format(name: str | None, template_source: str) -> ReasoningFormat | None:
    """The format of that name, else the first whose marks are in the chat template. None for "none" or no match.

    Raises TinyvllmError for an unknown name."""
    if name is None:
        return next((format for format in FORMATS.values() if format.is_named_in(template_source)), None)
    if name == "none":
        return None
    known = ALIASES.get(name, name)
    if known not in FORMATS:
        raise TinyvllmError(f"--reasoning-parser is {name!r}: choose from none, {', '.join([*FORMATS, *ALIASES])}")
    return FORMATS[known]


class ReasoningParser:
    """Splits one message. Reasoning comes first, and only once; later marks are ordinary text."""

    def __init__(self, format: ReasoningFormat, is_inside: bool) -> None:
        self._begin = MarkFinder(format.begin + format.head)
        self._end = MarkFinder(format.end)
        self._state = "inside" if is_inside else "before"
        self._is_blank = True  # only whitespace was read in this state; it is dropped around the marks
        self._blanks = ""

    def push(self, text: str) -> tuple[str, str]:
        """(reasoning, content) that are now final."""
        reasoning, content = "", ""
        for position, character in enumerate(text):
            if self._state == "after" and not self._is_blank:
                return reasoning, content + text[position:]
            more_reasoning, more_content = self._read(character)
            reasoning += more_reasoning
            content += more_content
        return reasoning, content

    def _read(self, character: str) -> tuple[str, str]:
        if self._state == "before":
            return "", self._read_before(character)
        if self._state == "inside":
            text, is_found = self._end.read(character)
            reasoning = self._without_blanks(text)
            if is_found:
                self._state, self._is_blank, self._blanks = "after", True, ""
            return reasoning, ""
        if self._is_blank and character.isspace():
            return "", ""
        self._is_blank = False
        return "", character

    def _read_before(self, character: str) -> str:
        if not self._begin.held and character.isspace():
            self._blanks += character
            return ""
        text, is_found = self._begin.read(character)
        if is_found:
            self._state, self._blanks = "inside", ""
        if not text:
            return ""
        self._state, self._is_blank = "after", False  # no reasoning at all
        text, self._blanks = self._blanks + text + self._begin.held, ""
        return text

    def _without_blanks(self, text: str) -> str:
        """Reasoning without leading and trailing whitespace."""
        if self._is_blank:
            text = text.lstrip()
        if not text:
            return ""
        self._is_blank = False
        text = self._blanks + text
        kept = text.rstrip()
        self._blanks = text[len(kept) :]
        return kept

    def flush(self) -> tuple[str, str]:
        """The rest, when no more text follows."""
        if self._state == "before":
            return "", self._blanks + self._begin.held
        if self._state == "inside":
            return self._without_blanks(self._end.held), ""
        return "", ""
