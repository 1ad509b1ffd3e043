"""The content of messages: a string, or parts of which this server reads the text parts."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator

# Content parts that models here cannot read, because they read text only: what each holds
MEDIA = {
    "image": "an image",
    "image_url": "an image",
    "input_image": "an image",
    "computer_screenshot": "an image",
    "input_audio": "audio",
    "audio_url": "audio",
    "video_url": "a video",
    "file": "a file",
    "input_file": "a file",
}
# The field that holds a part's text, by the part's type.
_TEXT_FIELDS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "reasoning_text": "text",
    "summary_text": "text",
    "refusal": "refusal",
}


def join_parts(value: object) -> object:
    """Content as one string. Text parts are joined by newlines, as vLLM does for text-only templates."""
    if not isinstance(value, list):
        return value
    texts: list[str] = []
    for position, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind in MEDIA:
            raise ValueError(f"part {position} is {MEDIA[kind]} ({kind}), but this model runs text only: leave it out")
        text = part.get(_TEXT_FIELDS[kind]) if isinstance(kind, str) and kind in _TEXT_FIELDS else None
        if not isinstance(text, str):
            shown = "not an object" if kind is None else f"of type {ascii(kind)[:40]}"
            raise ValueError(f'part {position} is {shown}: only {{"type": "text", "text": "..."}} is supported')
        texts.append(text)
    return "\n".join(texts)


def note_media(value: object) -> object:
    """A tool result with notes in place of what is not text. It is not refused, because the client cannot take back the
    call, and an agent could not continue."""
    if not isinstance(value, list):
        return value
    return [
        {"type": "text", "text": f"({MEDIA[part['type']]}, which this model cannot read, has been left out)"}
        if isinstance(part, dict) and isinstance(part.get("type"), str) and part["type"] in MEDIA
        else part
        for part in value
    ]


_Sent = str | list[dict[str, object]] | None
Content = Annotated[str | None, BeforeValidator(join_parts, json_schema_input_type=_Sent)]
