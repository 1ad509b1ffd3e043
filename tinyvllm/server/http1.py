"""uvicorn's HTTP/1.1 connection on httptools, which also serves requests that offer an upgrade. Imports httptools.

Java's HttpClient, for one, offers an upgrade to HTTP/2 (`Upgrade: h2c`) with its first request. A server may ignore the
offer (RFC 9110, section 7.8). But httptools ends a message that contains one after its head, and uvicorn then answers
it without its body (https://github.com/encode/uvicorn/issues/2722).
"""

from __future__ import annotations

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_OFFER_HEADERS = (b"upgrade", b"http2-settings")


class Http1Protocol(HttpToolsProtocol):
    """Ignores offers to upgrade, except to a WebSocket that uvicorn can serve.

    The parser stops with HttpParserUpgrade at the first byte after such a head. A second parser gets the head without
    its offer, and all bytes that follow.
    """

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        try:
            while True:
                try:
                    self.parser.feed_data(data)
                    return
                except httptools.HttpParserUpgrade as stop:
                    if not self._must_parse_again():
                        break
                    data = self._head_without_offer() + data[stop.args[0] :]
                    self.parser = _make_parser(self)
        except httptools.HttpParserError:
            message = "Invalid HTTP request received."
            self.logger.warning(message)
            self.send_400_response(message)
            return
        if self._should_upgrade():
            self.handle_websocket_upgrade()
        else:
            self._unsupported_upgrade_warning()

    def on_headers_complete(self) -> None:
        if not self._must_parse_again():
            super().on_headers_complete()

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
