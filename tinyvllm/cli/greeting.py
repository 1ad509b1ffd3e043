"""What `tinyvllm serve` prints when it is ready: its address and what to try next, on one screen."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tinyvllm.cli.terminal import out

LABEL_WIDTH = 16
MAX_NAMES = 4
QUESTION = "What is the capital of France?"
ANSWER_TOKENS = 100  # at most: a small model may go on for as long as its context
UNIX = "unix:"
MIN_AGENT_TOKENS = 16_384  # Claude Code's first prompt has about 12,000


@dataclass(frozen=True, kw_only=True)
class Greeting:
    """The facts in the greeting. None: unknown, or not worth mentioning."""

    address: str  # http://HOST:PORT, https://HOST:PORT or unix:PATH
    names: Sequence[str]  # of the models, in the API; the first is used in the examples
    apis: Sequence[str]  # of ServerSettings
    needs_key: bool
    can_chat: bool  # whether the first model has a chat template
    context_tokens: int | None = None
    num_slots: int | None = None  # requests that run at once

    def show(self) -> None:
        for line in self.lines():
            out.print(line, highlight=False, markup=False)

    def lines(self) -> Iterator[str]:
        """The first line has the address; with OpenAI's API, the second is a command to paste into a shell."""
        yield self._headline()
        if "openai" in self.apis:
            yield self._curl_openai()
        elif "ollama" in self.apis:
            yield self._curl_ollama()
        elif "anthropic" in self.apis:
            yield self._curl_anthropic()
        yield ""
        if not self._is_unix:
            yield _labeled("Web page", f"{self.address}/")
            yield from self._settings()
        yield _labeled("More clients", "docs/CLIENTS.md")

    def _headline(self) -> str:
        verb = "is" if len(self.names) == 1 else "are"
        facts = []
        if self.context_tokens is not None:
            facts.append(f"{self.context_tokens:,} tokens of context")
        if self.num_slots is not None:
            facts.append(f"{self.num_slots} request{'s' * (self.num_slots != 1)} at once")
        told = f" ({', '.join(facts)})" if facts else ""
        names = ", ".join(self.names[:MAX_NAMES])
        if len(self.names) > MAX_NAMES:
            names += f" and {len(self.names) - MAX_NAMES} more"
        return f"{names} {verb} served on {self.address}{told} until Ctrl-C. Try:"

    def _settings(self) -> Iterator[str]:
        """One line for each API that is on: environment variables as in docs/CLIENTS.md."""
        key = "KEY" if self.needs_key else "none"
        model = shlex.quote(self.names[0])
        if "openai" in self.apis:
            yield _labeled("OpenAI clients", f"OPENAI_BASE_URL={self.address}/v1 OPENAI_API_KEY={key}")
        if "anthropic" in self.apis and self.can_chat:
            variables = f"ANTHROPIC_BASE_URL={self.address} ANTHROPIC_AUTH_TOKEN={key}"
            if self.context_tokens is None or self.context_tokens >= MIN_AGENT_TOKENS:
                yield _labeled("Claude Code", f"{variables} ANTHROPIC_MODEL={model} claude")
            else:
                yield _labeled("Anthropic SDKs", variables)
        if "ollama" in self.apis and not self.needs_key:  # most of them cannot send a key
            yield _labeled("Ollama clients", f"OLLAMA_HOST={self.address}")

    def _curl_openai(self) -> str:
        body: dict[str, object] = {"model": self.names[0], "max_tokens": ANSWER_TOKENS}
        if self.can_chat:
            path = "/v1/chat/completions"
            body["messages"] = [{"role": "user", "content": QUESTION}]
        else:
            path = "/v1/completions"
            body["prompt"] = "The capital of France is"
        return self._curl(path, body)

    def _curl_ollama(self) -> str:
        options = {"num_predict": ANSWER_TOKENS}
        body = {"model": self.names[0], "prompt": QUESTION, "stream": False, "options": options}
        return self._curl("/api/generate", body)

    def _curl_anthropic(self) -> str:
        messages = [{"role": "user", "content": QUESTION}]
        return self._curl("/v1/messages", {"model": self.names[0], "max_tokens": ANSWER_TOKENS, "messages": messages})

    def _curl(self, path: str, body: dict[str, object]) -> str:
        """A command to paste into a shell, with KEY in place of a real key, which must not reach a log."""
        target = f"{self.address}{path}"
        if self._is_unix:
            target = f"--unix-socket {shlex.quote(self.address.removeprefix(UNIX))} http://localhost{path}"
        # curl does not trust a self-signed certificate
        insecure = "-k " if self.address.startswith("https:") else ""
        key = " -H 'Authorization: Bearer KEY'" if self.needs_key else ""
        text = shlex.quote(json.dumps(body, ensure_ascii=False))
        return f"curl {insecure}{target}{key} -H 'Content-Type: application/json' -d {text}"

    @property
    def _is_unix(self) -> bool:
        return self.address.startswith(UNIX)


def _labeled(label: str, text: str) -> str:
    return f"  {label:<{LABEL_WIDTH}}{text}"
