"""What the URLs of caption servers may leave out."""

from __future__ import annotations

import pytest

from prep.captions.servers import OllamaServer, OpenAIServer


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
