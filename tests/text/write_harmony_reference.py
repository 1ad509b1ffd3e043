"""Write data/harmony_reference.json: what OpenAI's own library makes of completions and conversations of gpt-oss.

Nothing of tinyvllm computes anything here. The library reads its vocabulary from $TIKTOKEN_ENCODINGS_BASE. This script
makes the file there, o200k_base.tiktoken, from the tokenizer.json that scripts/fetch_tokenizers.sh fetches; the library
checks its hash. In an environment of its own:
pip install openai-harmony==0.0.8 && python -m tests.text.write_harmony_reference models/tokenizers/gpt_oss
"""

from __future__ import annotations

import base64
import json
import os
import random
import re
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

OUTPUT = Path(__file__).parent / "data" / "harmony_reference.json"
MARKS = ("start", "channel", "constrain", "message", "end", "call", "return")
DATE = "2026-01-02"

# «end» is the special token, <|end|> the same characters as ordinary text
FORMED = [
    "«channel»analysis«message»Hm.\n\nSo.«end»«start»assistant«channel»final«message» Yes. \n«return»",
    "«channel»analysis«message»Need it.«end»«start»assistant«channel»commentary to=functions.get_weather "
    '«constrain»json«message»{"city": "Köln"}«call»',
    '«channel»commentary to=functions.get_weather«constrain»json«message»{"city":"Rom"}«call»',
    " to=functions.time-now«channel»commentary json«message»{}«call»",
    "«channel»commentary functions.time-now «constrain»json«message»{}«call»",
    "«channel»commentary«message»First this, then that.«end»«start»assistant«channel»commentary "
    "to=functions.get_weather «constrain»json«message»{«call»",
    "«channel»analysis to=browser.search code«message»{}«call»",
    "«channel»analysis«message»a«end»«start»assistant«channel»analysis«message»b«end»"
    "«start»assistant«channel»final«message»c«end»«start»assistant«channel»final«message»d",
    "«channel»final«message»a«end»«start»functions.f to=assistant«channel»commentary«message»b«end»",
    "«channel»final json«message»{}",
    "«channel»final «constrain»json«message»{}",
    "«message»c«end»",
    "«channel»final«message»The text <|end|> is not the token, nor is <|start|>assistant<|channel|>x<|message|>.",
    "«channel»other«message»日本 👍🏽 e\u0301 \x00«return»",
    "«channel»final«message»«constrain» and «message» inside«return»",
]
MALFORMED = [
    "Just text, without any header.",
    "«channel»final",
    "«channel»analysis We should greet.",
    "«channel»analysis«message»cut «start»assistant«channel»final«message»off",
    "«end»«end»text between",
    "«start»«start»assistant«message»a",
    "«channel»final«message»a«end»«channel»final«message»b",
    "«channel»«channel»«message»x",
    "«channel»commentary to=functions.get_weather",
    "«channel»final\nThe header never ends",
]
PIECES = [
    *(f"«{mark}»" for mark in MARKS),
    "«start»assistant«channel»analysis«message»", "«start»assistant«channel»final«message»",
    "«start»assistant", "«end»", "«channel»commentary to=functions.get_weather «constrain»json«message»",
    "analysis", "final", "commentary", " to=python", "words and words", "{}", "<|end|>", "\n", " ", "é",
]  # fmt: skip


HEADERS = [
    "«channel»analysis", "«channel»final", "«channel»commentary", "«channel»commentary to=functions.get_weather json",
    " to=functions.get_weather«channel»commentary «constrain»json", "«channel»analysis to=python", "",
    " to=functions.f.g«channel»analysis", "«channel»commentary to=all", "«channel»final «constrain»json",
]  # fmt: skip
CONTENTS = ["", "Yes.", " \n", "{}", '{"a": "<|end|>"}', "«constrain»", "Über 日本", "a\n\nb"]


def completions() -> list[str]:
    chance = random.Random(14)
    made = []
    for _ in range(80):
        messages = [f"{chance.choice(HEADERS)}«message»{chance.choice(CONTENTS)}" for _ in range(chance.randint(1, 4))]
        made.append("«end»«start»assistant".join(messages) + chance.choice(["", "«return»", "«call»"]))
    return [*FORMED, *MALFORMED, *dict.fromkeys(made)]


def pieces_of(text: str) -> list[str]:
    """`text` cut into special tokens, in «», and ordinary text."""
    return [piece for piece in re.split(r"(«\w+»)", text) if piece]


class Library:
    def __init__(self, tokenizer_json: Path) -> None:
        with tempfile.TemporaryDirectory() as directory:
            write_ranks(tokenizer_json, Path(directory) / "o200k_base.tiktoken")
            os.environ["TIKTOKEN_ENCODINGS_BASE"] = directory
            import openai_harmony

            self.library = openai_harmony
            self.encoding = openai_harmony.load_harmony_encoding("HarmonyGptOss")

    def ids(self, text: str) -> list[int]:
        found: list[int] = []
        for piece in pieces_of(text):
            allowed = {"allowed_special": "all"} if piece.startswith("«") else {"disallowed_special": ()}
            found += self.encoding.encode(re.sub(r"«(\w+)»", r"<|\1|>", piece), **allowed)
        return found

    def read(self, text: str) -> dict[str, Any]:
        try:
            messages = self.encoding.parse_messages_from_completion_tokens(
                self.ids(text), self.library.Role.ASSISTANT, strict=False
            )
        except Exception as error:  # the library's own class is not exported
            return {"text": text, "error": str(error)[:60]}
        found = [
            [one.author.role.value, one.channel, one.recipient, "".join(part.text for part in one.content)]
            for one in messages
        ]
        return {"text": text, "messages": found}

    def render(self, chat: dict[str, Any]) -> str:
        library, role = self.library, self.library.Role
        system = library.SystemContent.new().with_conversation_start_date(DATE)
        system = system.with_reasoning_effort(library.ReasoningEffort[chat.get("effort", "medium").upper()])
        if "identity" in chat:
            system = system.with_model_identity(chat["identity"]).with_browser_tool().with_python_tool()
        messages = [library.Message.from_role_and_content(role.SYSTEM, system)]
        developer = library.DeveloperContent.new()
        if "instructions" in chat:
            developer = developer.with_instructions(chat["instructions"])
        if "tools" in chat:
            functions = [tool["function"] for tool in chat["tools"]]
            described = [library.ToolDescription.new(**function) for function in functions]
            developer = developer.with_function_tools(described)
        if "instructions" in chat or "tools" in chat:
            messages.append(library.Message.from_role_and_content(role.DEVELOPER, developer))
        for said in chat["harmony"]:
            messages.append(self.message(**said))
        conversation = library.Conversation.from_messages(messages)
        ids = self.encoding.render_conversation_for_completion(conversation, role.ASSISTANT)
        return str(self.encoding.decode_utf8(ids))

    def message(self, author: str, text: str, channel: str = "", to: str = "", type: str = "") -> Any:
        role = self.library.Role
        roles = {"user": role.USER, "assistant": role.ASSISTANT}
        made = self.library.Author(role=roles.get(author, role.TOOL), name=None if author in roles else author)
        message = self.library.Message.from_author_and_content(made, text)
        message = message.with_channel(channel) if channel else message
        message = message.with_recipient(to) if to else message
        return message.with_content_type(type) if type else message


def write_ranks(tokenizer_json: Path, path: Path) -> None:
    """The byte-level vocabulary as tiktoken's lines of base64 and rank."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    byte_of = {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}
    vocabulary = json.loads(tokenizer_json.read_text(encoding="utf-8"))["model"]["vocab"]
    lines = (
        base64.b64encode(bytes(byte_of[character] for character in text)) + f" {rank}\n".encode()
        for text, rank in sorted(vocabulary.items(), key=lambda entry: entry[1])
    )
    path.write_bytes(b"".join(lines))


# ---- Conversations: `messages` in OpenAI's chat format, `harmony` as the library takes them ----

QUESTION = "What's the weather in Köln?"
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Its name."},
                "unit": {"type": "string", "enum": ["C", "F"], "default": "C"},
                "days": {"type": "array", "items": {"type": "integer"}},
            },
            "required": ["city"],
        },
    },
}


def call(call_id: str, **arguments: Any) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": "get_weather", "arguments": arguments}}


def called(**arguments: Any) -> dict[str, Any]:
    to = "functions.get_weather"
    text = json.dumps(arguments, ensure_ascii=False)
    return {"author": "assistant", "text": text, "channel": "commentary", "to": to, "type": "json"}


def result(text: str) -> dict[str, Any]:
    return {"author": "functions.get_weather", "text": text, "channel": "commentary", "to": "assistant"}


ASKED = {"author": "user", "text": QUESTION}
CHATS: dict[str, dict[str, Any]] = {
    "question": {"messages": [{"role": "user", "content": QUESTION}], "harmony": [ASKED], "effort": "low"},
    "builtin": {
        "messages": [{"role": "user", "content": QUESTION}],
        "harmony": [ASKED],
        "identity": "You are a test.",
    },
    "turns": {
        "messages": [
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": "Sunny.", "reasoning_content": "I guess."},
            {"role": "user", "content": "And now?"},
        ],
        "harmony": [
            ASKED,
            {"author": "assistant", "text": "I guess.", "channel": "analysis"},
            {"author": "assistant", "text": "Sunny.", "channel": "final"},
            {"author": "user", "text": "And now?"},
        ],
        "effort": "high",
    },
    "results": {
        "messages": [
            {"role": "user", "content": QUESTION},
            {
                "role": "assistant",
                "content": "",
                "reasoning_content": "I need both.",
                "tool_calls": [call("a", city="Köln"), call("b", city="Rom")],
            },
            {"role": "tool", "tool_call_id": "b", "content": '{"degrees": 30}'},
            {"role": "tool", "tool_call_id": "a", "content": 'It\'s "21" degrees.'},
        ],
        "harmony": [
            ASKED,
            {"author": "assistant", "text": "I need both.", "channel": "analysis"},
            called(city="Köln"),
            result('It\'s "21" degrees.'),
            called(city="Rom"),
            result('{"degrees": 30}'),
        ],
        "tools": [TOOL],
    },
    "preamble": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": QUESTION},
            {
                "role": "assistant",
                "content": "I'll look.",
                "reasoning_content": "I need it.",
                "tool_calls": [call("a", city="Köln")],
            },
            {"role": "tool", "tool_call_id": "a", "content": "21"},
        ],
        "harmony": [
            ASKED,
            {"author": "assistant", "text": "I need it.", "channel": "analysis"},
            {"author": "assistant", "text": "I'll look.", "channel": "commentary"},
            called(city="Köln"),
            result("21"),
        ],
        "instructions": "Be brief.",
        "tools": [TOOL],
    },
}


def main(directory: Path) -> None:
    library = Library(directory / "tokenizer.json")
    read = [library.read(text) for text in completions()]
    chats = {name: library.render(chat) for name, chat in CHATS.items()}
    ids = [library.ids(text) for text in FORMED]
    ends = sorted(library.encoding.stop_tokens_for_assistant_actions())
    lines = ",\n".join(json.dumps(one, ensure_ascii=False) for one in read)
    OUTPUT.write_text(
        f'{{"made_by": "openai-harmony {version("openai-harmony")}",\n"ends": {ends},\n"completions": [\n{lines}\n],\n'
        f'"ids": {json.dumps(ids)},\n"chats": {json.dumps(chats, ensure_ascii=False, indent=0)}}}\n',
        encoding="utf-8",
    )
    print(f"wrote {OUTPUT}: {sum('messages' in one for one in read)} of {len(read)} completions can be read")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
