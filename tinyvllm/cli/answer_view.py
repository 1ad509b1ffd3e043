"""How an answer appears while it is generated: verbatim, or as Markdown in a terminal."""

from __future__ import annotations

import asyncio
import re
import sys
import time
from typing import Protocol

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.segment import Segment
from rich.text import Text

from tinyvllm.cli.terminal import out

# A model's output must not control the terminal: all control characters but tab and newline.
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
MIN_DRAW_S = 1 / 15  # between redraws of the last block
MAX_DRAW_SHARE = 0.2  # of the time, at most, that drawing takes


class AnswerView(Protocol):
    """Shows one answer."""

    def reasoning(self, text: str) -> None: ...

    def content(self, text: str) -> None: ...

    def close(self, note: str = "") -> None:
        """End the answer, with a note after its text."""

    def abandon(self) -> None:
        """End an answer that failed, and its line if one was begun."""


def make_view(*, plain: bool, shows_reasoning: bool = True) -> AnswerView:
    """Markdown if stdout is a terminal and `plain` is False. Without shows_reasoning, only a terminal shows it."""
    if out.is_terminal and not out.is_dumb_terminal and not plain:
        return MarkdownView(out)
    return PlainView(shows_reasoning=shows_reasoning or out.is_terminal)


def write(text: str) -> None:
    """Write a piece of an answer to stdout and flush it. A terminal gets no control characters."""
    sys.stdout.write(CONTROLS.sub("", text) if out.is_terminal else text)
    sys.stdout.flush()


class PlainView:
    """Shows the text verbatim, after the reasoning, which is dimmed on a terminal or left out."""

    def __init__(self, *, shows_reasoning: bool) -> None:
        self._shows_reasoning = shows_reasoning
        self._has_reasoning = self._has_content = False

    def reasoning(self, text: str) -> None:
        if self._shows_reasoning:
            self._has_reasoning = True
            out.print(Text(CONTROLS.sub("", text), style="dim"), end="", soft_wrap=True)

    def content(self, text: str) -> None:
        if self._has_reasoning and not self._has_content:
            write("\n\n")
        self._has_content = True
        write(text)

    def close(self, note: str = "") -> None:
        write(f" {note}\n" if note else "\n")

    def abandon(self) -> None:
        if self._has_reasoning or self._has_content:
            self.close()


class MarkdownView:
    """Prints a block permanently once the next one begins. The last block is redrawn as it grows, and only as much of
    its end as fits on the screen, so that the scrollback stays complete."""

    def __init__(self, console: Console) -> None:
        from tinyvllm.cli import markdown  # here: with its parser and colors it takes 0.1 s to import

        self._split, self._fenced, self._render = markdown.split_blocks, markdown.fenced_code, markdown.TerminalMarkdown
        self._console = console
        self._pending = ""  # the source of the last block
        self._has_printed = False
        self._has_reasoning = False
        self._tail = _Tail()
        self._live: Live | None = None
        self._next_draw_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def reasoning(self, text: str) -> None:
        self._has_reasoning = True
        self._console.print(Text(CONTROLS.sub("", text), style="dim"), end="", soft_wrap=True)

    def content(self, text: str) -> None:
        if self._has_reasoning:
            self._has_reasoning = False
            self._console.print("\n")
        self._pending += CONTROLS.sub("", text)
        if self._live is None:
            self._live = Live(self._tail, console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        if "\n" in text:
            self._print_finished()
        self._draw()

    def close(self, note: str = "") -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        rest, self._pending = self._pending, ""
        if self._live is not None:
            self._tail.inner = None
            self._print(rest)
            self._live.stop()
            self._live = None
        elif self._has_reasoning:
            self._console.print()
        if note:
            self._console.print(Text(note, style="dim"))

    def abandon(self) -> None:
        self.close()

    def _print_finished(self) -> None:
        """Print all blocks but the last. Only whole lines tell where a block ends: `2` may become `2. two`."""
        whole, newline, line = self._pending.rpartition("\n")
        *finished, last = self._split(whole + newline)
        if finished:
            self._pending = last + line
            self._set_tail(follows_block=True)  # first: it is drawn below what is printed
            self._print("".join(finished))

    def _print(self, source: str) -> None:
        for block in self._split(source):
            if not block.strip():
                continue
            if self._has_printed:
                self._console.print()
            self._has_printed = True
            code = self._fenced(block)
            if code is None:
                self._console.print(_Trimmed(self._render(block)), soft_wrap=False, end="")
            else:
                self._console.print(code, soft_wrap=True)  # a long line stays one line when it is copied

    def _draw(self) -> None:
        now_s = time.monotonic()
        if self._live is None:
            return
        if now_s < self._next_draw_s:
            self._draw_later(self._next_draw_s - now_s)
            return
        self._set_tail(follows_block=self._has_printed)
        self._live.refresh()
        end_s = time.monotonic()
        self._next_draw_s = end_s + max(MIN_DRAW_S, (end_s - now_s) / MAX_DRAW_SHARE)

    def _draw_later(self, seconds: float) -> None:
        """Draw the text that has arrived after a delay, even if nothing more arrives."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._draw_in_time)

    def _draw_in_time(self) -> None:
        self._timer = None
        self._draw()

    def _set_tail(self, *, follows_block: bool) -> None:
        self._tail.inner = self._render(self._pending) if self._pending.strip() else None
        self._tail.follows_block = follows_block


class _Tail:
    """The last lines of a renderable, as many as the screen holds. None: an empty line, where the text will begin.

    The renderable is replaced in place: what is printed above is then written together with the new one."""

    def __init__(self) -> None:
        self.inner: RenderableType | None = None
        self.follows_block = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines: list[list[Segment]] = [[]] if self.inner is None or self.follows_block else []
        if self.inner is not None:
            lines += _trimmed_lines(self.inner, console, options)
        for line in lines[-max(1, console.height - 2) :]:
            yield from line
            yield Segment.line()


class _Trimmed:
    """A renderable without rich's padding at the ends of lines, which would be copied too."""

    def __init__(self, inner: RenderableType) -> None:
        self._inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in _trimmed_lines(self._inner, console, options):
            yield from line
            yield Segment.line()


def _trimmed_lines(inner: RenderableType, console: Console, options: ConsoleOptions) -> list[list[Segment]]:
    """Without spaces at the ends of lines, and empty lines at both ends."""
    options = options.update(height=None, no_wrap=False, overflow="fold")  # where the console's own are soft wraps
    lines = console.render_lines(inner, options, pad=False)
    for line in lines:
        while line and not line[-1].text.strip():
            line.pop()
        if line:
            line[-1] = Segment(line[-1].text.rstrip(), line[-1].style)
    filled = [index for index, line in enumerate(lines) if line]
    return lines[filled[0] : filled[-1] + 1] if filled else []
