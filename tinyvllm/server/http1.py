"""uvicorn's HTTP/1.1 connection on httptools, which also serves requests that offer an upgrade. Imports httptools.

Java's HttpClient, for one, offers an upgrade to HTTP/2 (`Upgrade: h2c`) with its first request. A server may ignore the
offer (RFC 9110, section 7.8). But httptools ends a message that contains one after its head, and uvicorn then answers
it without its body (https://github.com/encode/uvicorn/issues/2722).
"""

from __future__ import annotations

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from tinyvllm.server.context import TRAILERS
from tinyvllm.server.trailers import TrailerCycle, reads_trailers

_OFFER_HEADERS = (b"upgrade", b"http2-settings")
MAX_HEAD_BYTES = 64 << 10  # of a request's head; the parser itself has no limit, and h11 has this one
_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class HeadTooLargeError(Exception):
    """Raised in the parser's callbacks, to end it."""


class Http1Protocol(HttpToolsProtocol):
    """Ignores offers to upgrade, except to a WebSocket that uvicorn can serve.

    The parser stops with HttpParserUpgrade at the first byte after such a head. A second parser gets the head without
    its offer, and all bytes that follow.
    """

    _num_unparsed = 0  # bytes that have arrived of a head that is not complete
    _num_head_bytes = 0  # of the current head's parsed fields
    _is_in_head = False

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        try:
            while True:
                try:
                    self.parser.feed_data(data)
                    self._limit_head(len(data))
                    return
                except httptools.HttpParserUpgrade as stop:
                    if not self._must_parse_again():
                        break
                    data = self._head_without_offer() + data[stop.args[0] :]
                    self.parser = _make_parser(self)
        except (httptools.HttpParserError, HeadTooLargeError) as error:
            self._refuse(is_too_large=HeadTooLargeError in (type(error), type(error.__context__)))
            return
        if self._should_upgrade():
            self.handle_websocket_upgrade()
        else:
            self._unsupported_upgrade_warning()

    def _refuse(self, *, is_too_large: bool) -> None:
        if is_too_large:
            self.transport.write(_TOO_LARGE)
            self.transport.close()
            return
        message = "Invalid HTTP request received."
        self.logger.warning(message)
        self.send_400_response(message)

    def _limit_head(self, num_bytes: int) -> None:
        """Count bytes that may belong to a head. Raises HeadTooLargeError."""
        self._num_unparsed = self._num_unparsed + num_bytes if self._is_in_head else 0
        if self._num_unparsed > MAX_HEAD_BYTES:
            raise HeadTooLargeError

    def on_message_begin(self) -> None:
        self._is_in_head, self._num_head_bytes, self._num_unparsed = True, 0, 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._num_head_bytes += len(name) + len(value)
        if self._num_head_bytes > MAX_HEAD_BYTES:
            raise HeadTooLargeError
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        if self._must_parse_again():
            return
        wants_trailers = self.parser.get_http_version() == "1.1" and reads_trailers(self.headers)
        if wants_trailers:
            self.scope["extensions"] = {TRAILERS: {}}
        super().on_headers_complete()
        if wants_trailers and type(self.cycle) is RequestResponseCycle:  # its task has not started yet
            self.cycle.__class__ = TrailerCycle

    def on_message_complete(self) -> None:
        if not self._must_parse_again():
            super().on_message_complete()

    def _must_parse_again(self) -> bool:
        """Whether the head that has just been parsed has an offer to ignore. CONNECT has no body to lose."""
        return self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT" and not self._should_upgrade()

    def _head_without_offer(self) -> bytes:
        """The parsed head, which offers nothing any more and is otherwise the same."""
        version = self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version)]
        for name, value in self.headers:
            if name == b"connection":
                value = b", ".join(o for option in value.split(b",") if (o := option.strip()).lower() != b"upgrade")
            if name not in _OFFER_HEADERS:
                lines.append(b"%b: %b" % (name, value))
        return b"\r\n".join([*lines, b"", b""])


def _make_parser(protocol: Http1Protocol) -> httptools.HttpRequestParser:
    """A parser as uvicorn makes it: a request may follow one that asked to close the connection."""
    parser = httptools.HttpRequestParser(protocol)
    parser.set_dangerous_leniencies(lenient_data_after_close=True)
    return parser
