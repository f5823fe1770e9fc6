"""Talking to one caption server: Ollama through its client, others through OpenAI's chat completions.

Every failure becomes one of three: a ConfigError that ends the run (the model is missing, the request is refused), a
:class:`HostFault` (ask elsewhere, leave this host alone for a while), or a :class:`SampleFault` (the server failed on
this image). Redirects are never followed and no key is sent that the config does not name.

Wire formats: https://github.com/ollama/ollama/blob/main/docs/api.md, https://platform.openai.com/docs/api-reference/chat
"""

from __future__ import annotations

import asyncio
import base64
import os
from collections.abc import AsyncIterator, Generator, Mapping
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
import ollama

from nanodit.errors import ConfigError
from prep.captions.config import CaptionConfig, CaptionHost
from prep.captions.quality import Answer, tidy

UNKNOWN = "unknown"
LISTING_TIMEOUT = 30.0  # seconds to say which models there are
CONNECT_TIMEOUT = 10.0  # seconds


class HostFault(Exception):
    """A host that cannot answer now; ``wait`` is how many seconds it asked to be left alone, if it did."""

    def __init__(self, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.wait = wait


class HostTimeout(HostFault):
    """A host that accepted a question and did not answer in time."""


class SampleFault(Exception):
    """A server that failed on this image (HTTP 500)."""


class _NoKey(httpx.Auth):
    """Takes out the key that the Ollama client finds in OLLAMA_API_KEY and would send to any host."""

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        request.headers.pop("Authorization", None)
        yield request


class OllamaServer:
    """One Ollama host, through ``ollama.AsyncClient``."""

    def __init__(self, host: CaptionHost, config: CaptionConfig) -> None:
        self.url, self.config = host.url, config
        key = api_key(config)
        self._client = ollama.AsyncClient(
            host.url,
            timeout=httpx.Timeout(config.timeout, connect=min(CONNECT_TIMEOUT, config.timeout)),
            follow_redirects=False,
            headers={"authorization": f"Bearer {key}"} if key else {},
            auth=None if key else _NoKey(),
        )

    async def digest(self) -> str:
        """The digest of the model's weights. Raises ConfigError when the host does not have it, else HostFault."""
        async with _translated(self.url, min(LISTING_TIMEOUT, self.config.timeout)):
            listing = await self._client.list()
        digests = {model.model: model.digest for model in listing.models if model.model}
        wanted = self.config.model if ":" in self.config.model else f"{self.config.model}:latest"
        if wanted not in digests:
            raise ConfigError(
                f"caption host {self.url} has no model {self.config.model} (it has "
                f"{', '.join(sorted(digests)) or 'none'}). Run on it: ollama pull {self.config.model}"
            )
        return digests[wanted] or UNKNOWN

    async def caption(self, jpeg: bytes, prompt: str, options: Mapping[str, Any]) -> Answer:
        """Ask about one picture. Raises ConfigError, HostFault or SampleFault."""
        message = {"role": "user", "content": prompt, "images": [jpeg]}
        async with _translated(self.url, self.config.timeout):
            # a model that thinks would spend its tokens before it writes
            reply = await self._client.chat(self.config.model, [message], think=False, options=dict(options))
        return Answer(tidy(reply.message.content or ""), reply.done_reason, options)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()


class OpenAIServer:
    """One OpenAI-compatible server: vLLM, llama.cpp, LM Studio, a gateway, or Ollama's own ``/v1``."""

    def __init__(self, host: CaptionHost, config: CaptionConfig) -> None:
        self.url, self.config = host.url, config
        url = host.url.rstrip("/") if "://" in host.url else f"http://{host.url}".rstrip("/")
        key = api_key(config)
        self._client = httpx.AsyncClient(
            base_url=url if urlsplit(url).path else f"{url}/v1",
            timeout=httpx.Timeout(config.timeout, connect=min(CONNECT_TIMEOUT, config.timeout)),
            follow_redirects=False,
            headers={"authorization": f"Bearer {key}"} if key else {},
        )

    async def digest(self) -> str:
        """What the server says of the weights: its ``digest`` or ``root``, else "unknown"; errors as Ollama's."""
        try:
            reply = await self._call("GET", "/models", None, min(LISTING_TIMEOUT, self.config.timeout))
        except ConfigError as error:
            if isinstance(error.__cause__, httpx.HTTPStatusError) and error.__cause__.response.status_code == 404:
                return UNKNOWN  # listing models is optional
            raise
        models = {str(model.get("id")): model for model in reply.get("data") or [] if isinstance(model, dict)}
        if self.config.model not in models:
            raise ConfigError(
                f"caption host {self.url} has no model {self.config.model} (it has "
                f"{', '.join(sorted(models)) or 'none'}). Load it there, or set captions.model"
            )
        model = models[self.config.model]
        root = str(model.get("root") or "")
        if root.startswith("/") or root == self.config.model:  # a path on that machine says nothing here
            root = ""
        return str(model.get("digest") or root or UNKNOWN)

    async def caption(self, jpeg: bytes, prompt: str, options: Mapping[str, Any]) -> Answer:
        """Ask about one picture. Raises ConfigError, HostFault or SampleFault."""
        url = f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
        content = [{"type": "text", "text": prompt}, {"type": "image_url", "image_url": {"url": url}}]
        body = {
            "model": self.config.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": options["num_predict"],
            "temperature": options["temperature"],
            "seed": options["seed"],
            "stream": False,
        }
        reply = await self._call("POST", "/chat/completions", body, self.config.timeout)
        try:
            choice = reply["choices"][0]
            text, refusal = choice["message"].get("content") or "", choice["message"].get("refusal")
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise HostFault("answers what is no chat completion") from error
        end = choice.get("finish_reason")
        return Answer(tidy(str(text)), "refused" if refusal or end == "content_filter" else end, options)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def _call(self, method: str, path: str, body: dict[str, Any] | None, seconds: float) -> dict[str, Any]:
        async with _translated(self.url, seconds):
            response = await self._client.request(method, path, json=body)
            reply = response.raise_for_status().json()
        if not isinstance(reply, dict):
            raise HostFault("answers what is no JSON object")
        return reply


@asynccontextmanager
async def _translated(url: str, seconds: float) -> AsyncIterator[None]:
    """Give what happens inside ``seconds``, and turn what the clients raise into our three kinds of failure."""
    late = f"no answer within {seconds:g} s"
    try:
        async with asyncio.timeout(seconds):  # the clients' own timeouts start again with every byte that arrives
            yield
    except ollama.ResponseError as error:
        raise fault_of_status(url, error.status_code, error.error) from error
    except httpx.HTTPStatusError as error:
        response = error.response
        said = response.headers.get("location", "") if response.is_redirect else response.text
        wait = response.headers.get("retry-after", "")
        raise fault_of_status(url, response.status_code, said, float(wait) if wait.isdigit() else 0.0) from error
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise ConfigError(f"caption host {url} is not a URL: {error}. Correct captions.hosts") from error
    except (httpx.ConnectTimeout, httpx.PoolTimeout) as error:
        raise HostFault("cannot be reached: the connection timed out") from error
    except (TimeoutError, httpx.TimeoutException) as error:
        raise HostTimeout(late) from error
    except (ConnectionError, httpx.HTTPError) as error:
        # the Ollama client's own words for a refused connection say nothing about the cause
        cause = error.__context__ if isinstance(error, ConnectionError) else error
        raise HostFault(f"cannot be reached: {cause or type(error).__name__}") from error
    except ValueError as error:  # of JSON, or of the client's models
        raise HostFault("answers what is no reply of such a server") from error


def fault_of_status(url: str, status: int, said: str, wait: float = 0.0) -> Exception:
    """What an HTTP status means: 404 and 400 end the run, 500 is about the sample, the rest is about the host."""
    said = " ".join(str(said).split())[:200]
    if status in (401, 403):
        return ConfigError(
            f"caption host {url} refuses access (HTTP {status}). Name the variable that holds its key in "
            "captions.api_key_variable"
        )
    if 300 <= status < 400:
        return HostFault(f"redirects elsewhere (HTTP {status}), which is refused: {said}".rstrip(": "))
    if status == 500:
        return SampleFault(said)
    if status in (408, 409, 425, 429) or status > 500:
        return HostFault(f"is busy or failing (HTTP {status}): {said}".rstrip(": "), wait)
    return ConfigError(
        f"caption host {url} refuses the request (HTTP {status}): {said}. Check captions.model and captions.options; "
        "the model must accept images"
    )


def open_server(host: CaptionHost, config: CaptionConfig) -> OllamaServer | OpenAIServer:
    """The server of a host, for the backend of the config; to be used in one event loop and closed there."""
    return OllamaServer(host, config) if config.backend == "ollama" else OpenAIServer(host, config)


def api_key(config: CaptionConfig) -> str | None:
    """The key that the config names, read from the environment; None when it names none."""
    if config.api_key_variable is None:
        return None
    key = os.environ.get(config.api_key_variable)
    if not key:
        raise ConfigError(
            f"captions.api_key_variable names {config.api_key_variable}, which is not set in the environment. Set it, "
            "or write null if the hosts need no key"
        )
    return key
