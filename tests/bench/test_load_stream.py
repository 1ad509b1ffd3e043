"""The parser of streamed answers: any division of the bytes gives the same events, for every server's format."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyvllm.bench.load_answers import Answer, Share, pack_share, unpack_share
from tinyvllm.bench.load_stream import Response, parse_server_timing

USAGE = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}


def completion(text: str, **more: Any) -> dict[str, Any]:
    return {"id": "cmpl-1", "choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": None}], **more}


def chat(**delta: Any) -> dict[str, Any]:
    return {"id": "chatcmpl-1", "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}


CHAT = [
    chat(role="assistant", content=""),  # the role alone is not text
    chat(role="assistant", content=None),  # as llama.cpp sends it
    chat(reasoning_content="Let me"),
    chat(reasoning=" think"),  # vLLM's newer name
    chat(content="naïve \n data: [DONE]"),
    chat(tool_calls=[{"index": 0, "function": {"arguments": "{"}}]),
    chat(content="end"),
    chat(),
    {"choices": [], "usage": USAGE},
]
COMPLETION = [
    completion("a"),
    completion(" b"),
    completion("", usage=None),
    completion("c"),
    completion("", usage=USAGE),
]


def events(given: list[dict[str, Any]], end: str = "\n", *, has_done: bool = True) -> bytes:
    lines = [f"data: {json.dumps(event)}{end}{end}" for event in given]
    return "".join([f": a comment{end}{end}", *lines, f"data: [DONE]{end}{end}" * has_done]).encode()


def chunked(body: bytes, size: int = 50) -> bytes:
    parts = [body[place : place + size] for place in range(0, len(body), size)]
    chunks = [b"%X;name=value\r\n%s\r\n" % (len(part), part) for part in parts]
    return b"".join([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", *chunks, b"0\r\nTrailer: x\r\n\r\n"])


def sized(body: bytes, status: str = "200 OK", more: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\n{more}\r\n".encode() + body


def until_closed(body: bytes) -> bytes:
    return b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + body


def parse(data: bytes, cuts: list[int] | None = None, *, is_closed: bool = False) -> tuple[Answer, Response]:
    """Parse `data` in pieces; the piece with number n arrives at n seconds."""
    answer = Answer()
    response = Response(answer)
    places = [0, *sorted(cuts or ()), len(data)]
    pieces = [data[start:stop] for start, stop in itertools.pairwise(places)]
    for number, piece in enumerate(pieces):
        response.take(piece, float(number))
    if is_closed:
        response.take_end(float(len(pieces)))
    return answer, response


FRAMINGS: dict[str, Callable[[bytes], bytes]] = {"chunked": chunked, "sized": sized, "until closed": until_closed}


@given(
    st.sampled_from(sorted(FRAMINGS)),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.sampled_from(["chat", "completion"]),
    st.lists(st.integers(0, 2000), max_size=40),
)
def test_any_division_of_the_bytes_gives_the_same_events(framing: str, end: str, api: str, cuts: list[int]) -> None:
    data = FRAMINGS[framing](events(CHAT if api == "chat" else COMPLETION, end))
    answer, response = parse(data, [min(cut, len(data)) for cut in cuts], is_closed=framing == "until closed")
    assert (len(answer.text_s), answer.num_input, answer.num_output) == (5 if api == "chat" else 3, 7, 5)
    assert answer.error is None and response.is_complete and response.keeps_alive == (framing != "until closed")
    assert list(answer.text_s) == sorted(answer.text_s)


def test_the_server_s_own_times_are_read_from_the_head_and_replaced_by_the_trailer() -> None:
    at_start = 'Server-Timing: queue;dur=1.5, relay;desc="a door", total;dur="4"\r\n'
    answer, _ = parse(sized(events(COMPLETION), more=at_start))
    assert answer.server_ms == {"queue": 1.5, "total": 4.0}
    head, _, rest = chunked(events(COMPLETION)).partition(b"\r\n\r\n")
    with_trailer = rest.replace(b"0\r\nTrailer: x\r\n", b"0\r\nserver-timing: decode;dur=9.25, total;dur=12\r\n")
    data = b"%b\r\n%b\r\n%b" % (head, at_start.encode(), with_trailer)
    for cuts in ([], list(range(1, len(data)))):
        answer, _ = parse(data, cuts)
        assert answer.server_ms == {"decode": 9.25, "total": 12.0}
    assert parse(chunked(events(COMPLETION)))[0].server_ms is None
    assert parse_server_timing("a;dur=x, b;DUR=2 , ;;") == {"b": 2.0}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_single_bytes_give_the_same_events(end: str) -> None:
    data = chunked(events(COMPLETION, end), size=3)
    answer, response = parse(data, list(range(1, len(data))))
    assert (len(answer.text_s), answer.num_output, response.is_complete) == (3, 5, True)


def test_event_has_the_time_of_the_read_that_completed_it() -> None:
    data = sized(events(COMPLETION))
    first, second = data.index(b" b"), data.index(b'"c"')
    answer, _ = parse(data, [first, second])
    assert list(answer.text_s) == [0.0, 1.0, 2.0]
    assert list(parse(data)[0].text_s) == [0.0, 0.0, 0.0]


def test_data_of_several_lines_is_one_event() -> None:
    body = b'data: {"choices":\ndata: [{"text": "a"}]}\n\ndata:[DONE]\n\n'
    assert len(parse(sized(body))[0].text_s) == 1


def test_last_event_may_lack_its_empty_line() -> None:
    assert len(parse(sized(b'data: {"choices": [{"text": "a"}]}'))[0].text_s) == 1


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        ("429 Too Many Requests", b'{"error": {"message": "too many"}}', "429: too many"),
        ("404 Not Found", b'{"detail": "Not Found"}', '404: {"detail": "Not Found"}'),
        ("500 Internal Server Error", b"oh", "500: oh"),
        ("503 Service Unavailable", b"", "503"),
        ("502 Bad Gateway", b'{"error": "no backend"}', "502: no backend"),
    ],
)
def test_refusal_is_told_with_the_servers_message(status: str, body: bytes, error: str) -> None:
    data = sized(body, status)
    answer, response = parse(data, list(range(1, len(data))))
    assert answer.error == error and response.is_complete and response.keeps_alive
    assert not parse(sized(body, status, "Connection: close\r\n"))[1].keeps_alive


@pytest.mark.parametrize("error", [{"message": "the step failed", "code": 500}, "the step failed"])
def test_error_within_the_stream_is_the_answers_error(error: Any) -> None:
    answer, _ = parse(chunked(events([completion("a"), {"error": error}])))
    assert (answer.error, len(answer.text_s)) == ("the step failed", 1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (chunked(events(COMPLETION))[:-1], "in the middle"),
        (sized(events(COMPLETION))[:-1], "in the middle"),
        (until_closed(events(COMPLETION, has_done=False)), "in the middle"),
        (b"HTTP/1.1 200 OK\r\n", "before it answered"),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "not HTTP/1.1"),
        (sized(b"data: {oops}\n\n"), "malformed"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabcdef\r\n", "instead of CRLF"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", "invalid literal"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-3\r\n", "size is b'-3'"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1" * 70000, "longer than 65536"),
        (b"HTTP/1.1 200 OK\r\nName: " + b"x" * 70000, "longer than 65536"),
    ],
)
def test_cut_or_malformed_answer_is_an_error(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(data, is_closed=True)


@given(st.lists(st.lists(st.floats(0, 1e6), max_size=5), max_size=5), st.lists(st.floats(0, 1), max_size=3))
def test_share_is_the_same_after_it_was_handed_over(texts: list[list[float]], late_s: list[float]) -> None:
    share = Share([], cpu_s=0.25)
    share.late_s.extend(late_s)
    for number, times in enumerate(texts):
        answer = Answer(number / 7, num_input=number or None, error="naïve\n" if number % 2 else None)
        answer.text_s.extend(times)
        share.answers.append(answer)
    packed = pack_share(share)
    assert unpack_share(packed) == share
    assert len(packed) <= 60 + 90 * len(texts) + 8 * (len(late_s) + sum(map(len, texts)))  # 8 bytes an event
