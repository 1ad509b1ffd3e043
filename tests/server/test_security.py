"""API keys, requests of other origins, TLS, and Unix sockets."""

from __future__ import annotations

import ssl
import stat
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme
import uvicorn

from tests.server.client import client_of, error_of
from tests.server.fake_engine import FakeEngine, serving
from tinyvllm.cli.server_flags import ListenFlags, ServerFlags
from tinyvllm.errors import TinyvllmError
from tinyvllm.server.app import make_app
from tinyvllm.server.security import KeyRing
from tinyvllm.server.settings import Cors, gather_api_keys
from tinyvllm.server.sockets import TlsFiles, address_of, bind, bind_unix, closing, is_public

KEYS = ("first-key-1", "second-key")
CLOSED = ("/v1/models", "/v1/models/tiny", "/engine/state", "/openapi.json", "/nowhere")
OPEN = ("/", "/health", "/ready", "/ping", "/version", "/metrics", "/static/app.js")


@pytest.mark.parametrize("path", CLOSED)
async def test_a_key_is_required(path: str) -> None:
    async with client_of(FakeEngine(), api_keys=KEYS) as client:
        for header in (None, "Bearer", "Bearer ", "Bearer first-key-2", "Basic first-key-1", "first-key-1", "Bearer é"):
            headers: Any = {} if header is None else {"authorization": header.encode("latin-1")}
            response = await client.get(path, headers=headers)
            assert response.status_code == 401 and error_of(response)["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer" and response.headers["x-request-id"]
        for key in KEYS:
            response = await client.get(path, headers={"authorization": f"bearer {key}"})
            assert response.status_code in (200, 404)
            assert (await client.get(path, headers={"x-api-key": key})).status_code in (200, 404)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/messages", {"type": "error", "error": {"type": "authentication_error"}}),
        ("/v1/messages/count_tokens", {"type": "error", "error": {"type": "authentication_error"}}),
        ("/api/chat", {"error": ...}),
        ("/v1/messages2", {"error": {"type": "invalid_request_error", "code": "invalid_api_key"}}),
    ],
)
async def test_an_error_has_the_format_of_the_paths_api(path: str, body: dict[str, Any]) -> None:
    async with client_of(FakeEngine(), api_keys=KEYS) as client:
        answer = (await client.post(path, headers={"x-api-key": "wrong"}, json={})).json()
    if body["error"] is ...:
        assert "API key" in answer["error"]
    else:
        assert answer["error"] == answer["error"] | body["error"] and "API key" in answer["error"]["message"]
        assert answer.get("type") == body.get("type")


async def test_generation_needs_a_key_and_probes_do_not() -> None:
    engine = FakeEngine()
    async with client_of(engine, api_keys=KEYS) as client:
        for path in ("/v1/completions", "/v1/chat/completions"):
            assert (await client.post(path, json={"prompt": "x"})).status_code == 401
        assert not engine.calls
        for path in OPEN:
            assert (await client.get(path)).status_code == 200, path
        assert (await client.post("/static/app.js")).status_code == 401


async def test_without_keys_none_is_required() -> None:
    async with client_of(FakeEngine()) as client:
        assert (await client.get("/v1/models", headers={"authorization": "Bearer anything"})).status_code == 200


def test_a_large_body_without_a_key_is_read_and_refused() -> None:
    with serving(FakeEngine(), api_keys=KEYS) as url:
        response = httpx.post(url + "/v1/completions", json={"prompt": "x" * 2_000_000})
    assert response.status_code == 401


def test_keys_are_stored_as_hashes() -> None:
    ring = KeyRing(KEYS)
    assert ring.holds("first-key-1") and ring.holds("second-key") and not ring.holds("first-key-") and ring
    assert not any(key in repr(vars(ring)) for key in KEYS)
    assert not KeyRing(())


def test_keys_come_from_three_places(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# a comment\n  file-key-1  \n\nfile-key-2\n")
    given = gather_api_keys(["flag-key-1", "file-key-1"], str(file), "env-key-1\nenv-key-2")
    assert given == ("flag-key-1", "file-key-1", "file-key-2", "env-key-1", "env-key-2")
    assert gather_api_keys([], None, None) == ()


@pytest.mark.parametrize("key", ["short", "with a space", "schlüssel-1", "tab\tulator", ""])
def test_a_bad_key_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(TinyvllmError, match="at least 8") as refused:
        gather_api_keys([key], None, None)
    assert not key or key not in str(refused.value)


@pytest.mark.parametrize("content", ["", "# nothing\n\n"])
def test_a_file_without_keys_does_not_open_the_server(tmp_path: Path, content: str) -> None:
    file = tmp_path / "keys"
    file.write_text(content)
    with pytest.raises(TinyvllmError, match="has no key"):
        gather_api_keys([], str(file), None)
    with pytest.raises(TinyvllmError, match="cannot be read"):
        gather_api_keys([], str(tmp_path / "none"), None)


# ---- Pages of other origins ----

PREFLIGHT = {"origin": "https://a.example", "access-control-request-method": "POST"}


async def test_other_origins_are_refused_unless_listed() -> None:
    async with client_of(FakeEngine()) as client:
        assert "access-control-allow-origin" not in (await client.get("/v1/models", headers=PREFLIGHT)).headers
        assert (await client.options("/v1/completions", headers=PREFLIGHT)).status_code == 405
    async with client_of(FakeEngine(), api_keys=KEYS, cors=Cors(origins=("https://a.example",))) as client:
        allowed = await client.options("/v1/completions", headers=PREFLIGHT)
        assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == "https://a.example"
        other = await client.options("/v1/completions", headers={**PREFLIGHT, "origin": "https://b.example"})
        assert other.status_code == 400 and "access-control-allow-origin" not in other.headers
        refused = await client.get("/v1/models", headers=PREFLIGHT)  # a page must be able to read the error
        assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == "https://a.example"
        assert "x-request-id" in refused.headers["access-control-expose-headers"]


async def test_a_page_cannot_send_what_a_form_can() -> None:
    """A form on another page needs no permission, but cannot send JSON as application/json."""
    engine = FakeEngine()
    async with client_of(engine) as client:
        for kind in ("text/plain", "application/x-www-form-urlencoded", None):
            headers = {} if kind is None else {"content-type": kind}
            response = await client.post("/v1/completions", content=b'{"prompt": "x"}', headers=headers)
            assert response.status_code == 400
    assert not engine.calls


async def test_a_server_of_this_machine_answers_to_its_own_names() -> None:
    """DNS rebinding: a page's host name that resolves to this machine is not one of ours."""
    engine = FakeEngine()
    async with client_of(engine, allowed_hosts=("localhost", "127.0.0.1", "[::1]")) as client:
        for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:8000", "[::1]:8000"):
            assert (await client.get("/health", headers={"host": host})).status_code == 200
        for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost:8000:8000", ""):
            response = await client.post("/v1/completions", json={"prompt": "x"}, headers={"host": host})
            assert response.status_code == 403 and error_of(response)["code"] == "host_not_allowed"
    assert not engine.calls


@pytest.mark.parametrize(
    ("flags", "hosts"),
    [
        ({}, {"localhost", "127.0.0.1", "[::1]"}),
        ({"host": "127.0.0.5"}, {"localhost", "127.0.0.1", "[::1]", "127.0.0.5"}),
        ({"host": "0.0.0.0"}, None),
        ({"uds": "/tmp/s"}, None),
        ({"api_key": ["a-long-key"]}, None),
        ({"allowed_hosts": ["chat.example"]}, {"localhost", "127.0.0.1", "[::1]", "chat.example"}),
        ({"allowed_hosts": ["*"]}, None),
    ],
)
def test_host_names_are_checked_if_there_is_no_key(flags: dict[str, Any], hosts: set[str] | None) -> None:
    listen = ListenFlags(**{name: value for name, value in flags.items() if name in ("host", "uds")})
    http = ServerFlags(**{name: value for name, value in flags.items() if name not in ("host", "uds")})
    allowed = http.settings(local_host=listen.local_host).allowed_hosts
    assert (None if allowed is None else set(allowed)) == hosts


# ---- Sockets ----


def test_https_with_a_certificate(tmp_path: Path) -> None:
    authority = trustme.CA()
    pair = authority.issue_cert("localhost", "127.0.0.1")
    certfile, keyfile, both = tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "both.pem"
    pair.cert_chain_pems[0].write_to_path(certfile)
    pair.private_key_pem.write_to_path(keyfile)
    pair.private_key_and_cert_chain_pem.write_to_path(both)
    TlsFiles(str(both)).check()
    files = TlsFiles(str(certfile), str(keyfile))
    files.check()
    with pytest.raises(TinyvllmError, match="cannot be used together"):
        TlsFiles(str(keyfile), str(certfile)).check()
    with pytest.raises(TinyvllmError, match="is not a file"):
        TlsFiles(str(tmp_path / "none.pem")).check()
    sock = bind("127.0.0.1", 0)
    address = address_of(sock, has_tls=True)
    app = make_app(FakeEngine())  # type: ignore[arg-type]
    config = uvicorn.Config(app, log_config=None, ssl_certfile=files.certfile, ssl_keyfile=files.keyfile)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        context = ssl.create_default_context()
        authority.configure_trust(context)
        assert address.startswith("https://127.0.0.1:")
        assert httpx.get(address + "/health", verify=context).status_code == 200
        with pytest.raises(httpx.TransportError):
            httpx.get(address.replace("https", "http") + "/health")
    finally:
        server.should_exit = True
        thread.join()


def test_a_unix_socket_is_for_owner_and_group_and_replaces_a_stale_one(tmp_path: Path) -> None:
    path = tmp_path / "s"
    first = bind_unix(str(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    assert address_of(first) == f"unix:{path}" and not is_public(first)
    with pytest.raises(TinyvllmError, match="in use"):
        bind_unix(str(path))
    first.close()  # the file remains, as after a crash
    second = bind_unix(str(path))
    with closing(second):
        assert path.exists()
    assert not path.exists()


def test_a_unix_socket_overwrites_no_file(tmp_path: Path) -> None:
    file = tmp_path / "precious"
    file.write_text("data")
    with pytest.raises(TinyvllmError, match="is not a socket"):
        bind_unix(str(file))
    assert file.read_text(encoding="utf-8") == "data"
    with pytest.raises(TinyvllmError, match="--uds"):
        bind_unix(str(tmp_path / "no" / "folder" / "s"))


def test_only_the_loopback_address_is_private() -> None:
    for host, public in (("127.0.0.1", False), ("0.0.0.0", True)):
        sock = bind(host, 0)
        with closing(sock):
            assert is_public(sock) is public
