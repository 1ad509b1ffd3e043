"""Markdown in a terminal: rich's, but for text to read as it comes and to copy."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich import markdown
from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.syntax import Syntax
from rich.text import Text

# Tags stay visible: with HTML on, rich would drop <div> from an answer about HTML.
PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
CODE_THEME = "ansi_dark"  # the terminal's own colors


def split_blocks(source: str) -> list[str]:
    """The source of each block at the top level, in order; joined, they are `source`."""
    starts = [token.map[0] for token in PARSER.parse(source) if token.level == 0 and token.map and token.nesting >= 0]
    lines = source.splitlines(keepends=True)
    cuts = [0, *starts[1:], len(lines)]
    return ["".join(lines[start:end]) for start, end in itertools.pairwise(cuts)]


def fenced_code(block: str) -> Text | None:
    """The block as text to copy, if it is fenced code; else None."""
    tokens = PARSER.parse(block)
    if len(tokens) != 1 or tokens[0].type != "fence":
        return None
    return _code_text(tokens[0].content, tokens[0].info)


def _code_text(code: str, info: str) -> Text:
    """Without padding or background, which would be copied too, so its fences stay."""
    language = info.strip().partition(" ")[0]
    text = Text(f"```{language}\n", style="dim", no_wrap=False, overflow="fold")
    lines = Syntax("", language or "text", theme=CODE_THEME, background_color="default").highlight(code.rstrip("\n"))
    lines.rstrip()
    plain = Text(overflow="fold")
    plain.append_text(text).append_text(lines).append("\n```", style="dim")
    return plain


class _Paragraph(markdown.Paragraph):
    @classmethod
    def create(cls, markdown: markdown.Markdown, token: Token) -> _Paragraph:
        return cls(justify="default")  # "left" pads each line with spaces


class _Heading(markdown.Heading):
    LEVEL_ALIGN = {"h1": "default"}  # noqa: RUF012 - rich's own declaration

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        text = self.text.copy()
        text.stylize("bold")
        yield text


class _Code(markdown.CodeBlock):
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield _code_text(str(self.text), self.lexer_name if self.lexer_name != "text" else "")


class _ListItem(markdown.ListItem):
    def render_number(self, console: Console, options: ConsoleOptions, number: int, last_number: int) -> RenderResult:
        """With a dot after the number, as it is written."""
        width = len(str(last_number)) + 3
        lines = console.render_lines(self.elements, options.update(width=options.max_width - width), style=self.style)
        style = console.get_style("markdown.item.number", default="none")
        for index, line in enumerate(lines):
            yield Segment(f"{number}. ".rjust(width) if index == 0 else " " * width, style)
            yield from line
            yield Segment.line()


class TerminalMarkdown(markdown.Markdown):
    """Markdown whose line breaks are kept, as models mean them, and whose links show their address."""

    elements = {  # noqa: RUF012 - rich's own declaration
        **markdown.Markdown.elements,
        "paragraph_open": _Paragraph,
        "heading_open": _Heading,
        "fence": _Code,
        "code_block": _Code,
        "list_item_open": _ListItem,
    }

    def __init__(self, source: str) -> None:
        super().__init__("", code_theme=CODE_THEME, hyperlinks=False)
        self.markup = source
        self.parsed = PARSER.parse(source)
        _keep_line_breaks(self.parsed)


def _keep_line_breaks(tokens: Iterable[Token]) -> None:
    for token in tokens:
        if token.type == "softbreak":
            token.type = "hardbreak"
        _keep_line_breaks(token.children or ())
