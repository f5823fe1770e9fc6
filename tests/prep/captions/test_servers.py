"""What the URLs of caption servers may leave out, and what stands between them and us: proxies, odd answers."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from nanodit.errors import ConfigError
from prep.captions.base import ENVIRONMENT, LONGEST_WAIT, HostFault, fault_of_status
from prep.captions.config import CaptionOptions
from prep.captions.quality import Answer
from prep.captions.servers import SERVERS, OllamaServer, OpenAIServer
from tests.prep.caption_server import MODEL, CaptionServer


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("box", "http://box:11434"),
        ("box:8080", "http://box:8080"),
        (":11434", "http://127.0.0.1:11434"),
        ("http://box", "http://box"),
        ("https://box/api/", "https://box/api/"),
    ],
)
def test_a_url_may_leave_out_what_ollama_itself_does(url, base):
    assert str(OllamaServer(url, "gemma3", 1.0, None)._client.base_url).rstrip("/") == base.rstrip("/")


def test_an_openai_url_without_a_path_means_v1():
    assert str(OpenAIServer("http://box:8000", "gemma3", 1.0, None)._client.base_url) == "http://box:8000/v1/"


OPTIONS = {"num_predict": 10, "temperature": 0.0, "seed": 0}


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@contextmanager
def answering(reply: bytes) -> Iterator[str]:
    """A server, or a proxy, that answers anything with these bytes and closes the connection."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            with connection:
                connection.recv(1 << 16)
                connection.sendall(reply)

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        listening.close()


def asked(backend: str, url: str) -> Exception:
    """What comes of a question to a server."""

    async def ask() -> Exception:
        server = SERVERS[backend](url, MODEL, 5.0, None)
        try:
            await server.caption(b"jpeg", "What is there?", OPTIONS)
        except Exception as error:
            return error
        finally:
            await server.close()
        raise AssertionError("was answered")

    return asyncio.run(ask())


def reply(status: str, *headers: str, body: bytes = b"") -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def answered(backend: str, body: dict, **options: Any) -> Answer | Exception:
    """What comes of a question that is answered with a JSON object."""

    async def ask(url: str) -> Answer | Exception:
        server = SERVERS[backend](url, MODEL, 5.0, None)
        try:
            return await server.caption(b"jpeg", "What is there?", OPTIONS | options)
        except Exception as error:
            return error
        finally:
            await server.close()

    with answering(reply("200 OK", "Content-Type: application/json", body=json.dumps(body).encode())) as url:
        return asyncio.run(ask(url))


def chat(backend: str, content: Any, end: str = "stop", **message: Any) -> dict:
    """A reply with this content."""
    message = {"role": "assistant", "content": content, **message}
    if backend == "ollama":
        return {"model": MODEL, "message": message, "done": True, "done_reason": end}
    return {"choices": [{"message": message, "finish_reason": end}]}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "A red "}, {"type": "text", "text": "hat."}], "A red hat."),
        ([{"type": "output_text", "text": "A red hat."}], "A red hat."),
        ([{"text": "A red"}, " hat."], "A red hat."),
        ([{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}, {"type": "text", "text": "A."}], "A."),
        ([], ""),
        (None, ""),
        ("A red\n hat.", "A red\nhat."),  # lines are what a list is known by
    ],
)
def test_a_list_of_parts_is_their_text(content, text):
    assert answered("openai", chat("openai", content)).text == text


@pytest.mark.parametrize(
    "content",
    [7, 0, False, {}, {"text": "A red hat."}, [7], [None], [["A red hat."]], [{"type": "text", "text": None}],
     [{"type": "text", "text": "A red hat."}, {"type": "image_url", "image_url": {"url": "data:"}}]],
)  # fmt: skip
@pytest.mark.parametrize("backend", SERVERS)
def test_content_that_is_no_text_is_a_fault(backend, content):
    error = answered(backend, chat(backend, content))
    assert isinstance(error, HostFault)
    assert "something that is not a" in str(error)


@pytest.mark.parametrize(
    ("backend", "content", "message"),
    [
        ("ollama", "", {"thinking": "One person, a wall."}),
        ("openai", None, {"reasoning_content": "One person, a wall."}),
        ("openai", "", {"reasoning": "One person, a wall."}),
        ("openai", [{"type": "thinking", "thinking": []}], {}),
    ],
)
def test_an_answer_that_is_only_thinking_ends_so(backend, content, message):
    assert answered(backend, chat(backend, content, "length", **message)).end == "thinking"
    assert answered(backend, chat(backend, "A red hat.", **message)).end == "stop"


def test_a_refusal_among_the_parts_is_one():
    assert answered("openai", chat("openai", [{"type": "refusal", "refusal": "No."}])).end == "refused"


@pytest.mark.parametrize("think", [False, True, "low", None])
def test_ollama_is_told_whether_to_think(think):
    async def ask(url: str) -> None:
        server = OllamaServer(url, MODEL, 5.0, None)
        await server.caption(b"jpeg", "What is there?", OPTIONS | CaptionOptions(think=think).asked())
        await server.close()

    with CaptionServer() as server:
        asyncio.run(ask(server.url))
        (entry,) = server.captioned
    assert entry["think"] == think
    assert "think" not in entry["options"]


@pytest.mark.parametrize("backend", SERVERS)
def test_a_redirect_says_where_to(backend):
    with answering(reply("307 Temporary Redirect", "Location: http://elsewhere.example/login")) as url:
        error = asked(backend, url)
    assert isinstance(error, HostFault)
    assert "refused: http://elsewhere.example/login" in str(error)


@pytest.mark.parametrize(("given", "expected"), [("7", 7.0), ("9" * 400, LONGEST_WAIT), ("\u0667", 0.0), ("soon", 0.0)])
def test_no_host_is_left_alone_for_ever(given, expected):
    with answering(reply("503 Busy", f"Retry-After: {given}")) as url:
        error = asked("openai", url)
    assert isinstance(error, HostFault)
    assert error.wait == expected


@pytest.mark.parametrize("backend", SERVERS)
def test_a_connection_that_breaks_off_has_a_reason(backend):
    with answering(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{") as url:
        error = asked(backend, url)
    assert isinstance(error, HostFault)
    assert not str(error).endswith(": ")
    assert len(str(error)) > len("cannot be reached: ")


@pytest.mark.parametrize("backend", SERVERS)
@pytest.mark.parametrize("status", ["403 Forbidden", "407 Proxy Authentication Required"])
def test_a_proxy_that_refuses_is_named_without_its_password(backend, status, monkeypatch):
    with answering(reply(status)) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.replace("http://", "http://me:secret@"))
        error = asked(backend, "http://captions.example:8000")
    assert isinstance(error, ConfigError)
    assert f"the proxy {proxy.removeprefix('http://')} does not let requests" in str(error)
    assert "NO_PROXY" in str(error)
    assert "secret" not in str(error)


@pytest.mark.parametrize("backend", SERVERS)
def test_a_proxy_that_is_down_is_named(backend, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    error = asked(backend, "http://captions.example:8000")
    assert isinstance(error, HostFault)
    assert "127.0.0.1:9" in str(error)


@pytest.mark.parametrize("backend", SERVERS)
@pytest.mark.parametrize("bypassed", ["127.0.0.0/8", ""])
def test_no_proxy_stands_between_us_and_this_machine(backend, bypassed, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", bypassed)

    async def ask(url: str) -> str:
        server = SERVERS[backend](url, MODEL, 5.0, None)
        try:
            return (await server.caption(b"jpeg", "What is there?", OPTIONS)).text
        finally:
            await server.close()

    with CaptionServer() as server:
        assert len(asyncio.run(ask(server.url))) > 20


@pytest.mark.parametrize("backend", SERVERS)
@pytest.mark.parametrize(
    ("name", "value"),
    [("ALL_PROXY", "socks5://127.0.0.1:1080"), ("HTTP_PROXY", "ftp://127.0.0.1"), ("SSL_CERT_FILE", "/nowhere.pem")],
)
def test_an_environment_that_no_client_can_use_is_named(backend, name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"no connection can be made with {name}: .+"):
        SERVERS[backend]("http://captions.example", MODEL, 5.0, None)


@pytest.mark.parametrize("backend", SERVERS)
def test_a_server_here_is_not_blamed_on_a_proxy(backend, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with answering(reply("403 Forbidden")) as url:
        assert "captions.api_key_variable" in str(asked(backend, url))
    error = asked(backend, url)  # where nobody listens any more
    assert "proxy" not in str(error)


@pytest.mark.parametrize(("status", "words"), [(403, "captions.api_key_variable"), (407, "NO_PROXY")])
def test_what_a_server_says_through_a_tunnel_is_its_own(status, words, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    assert words in str(fault_of_status("https://captions.example", status, ""))
