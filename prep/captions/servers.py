"""The kinds of caption servers: Ollama through its client, others through OpenAI's chat completions.

Wire formats: https://github.com/ollama/ollama/blob/main/docs/api.md, https://platform.openai.com/docs/api-reference/chat
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import re
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

from nanodit.errors import ConfigError
from prep.captions.base import (
    LISTING_TIMEOUT,
    UNKNOWN,
    CaptionServer,
    HostFault,
    ServerFacts,
    fault_of_status,
    translate_failures,
    usable_environment,
)
from prep.captions.quality import THINKING, Answer, Turn, readable

if TYPE_CHECKING:
    import httpx

# where servers put reasoning: vLLM and llama.cpp, OpenRouter; and parts of a content, as Mistral's
THINKING_FIELDS = ("reasoning_content", "reasoning")
TEXT_PARTS, OTHER_PARTS = ("text", "output_text"), ("thinking", "reasoning", "refusal")
UNLOAD_TIMEOUT, UNLOAD_TICK = 30.0, 0.25  # seconds
# gemma3:27b at 4 bits is a file of 17 GB; with images and 8k tokens of context it takes about 20
OLLAMA_GB_PER_BILLION, OLLAMA_CONTEXT_GB, OLLAMA_UNKNOWN_GB = 17 / 27, 3.0, 20.0


class OllamaServer(CaptionServer):
    """One Ollama host, through ``ollama.AsyncClient``."""

    program = "Ollama"
    example_url = "http://127.0.0.1:11434"
    default_port = 11434
    unloads = True
    start = "start it there (`ollama serve`, then `ollama pull {model}`)"
    reload = "ollama pull {model} on each of them"

    def __init__(self, url: str, model: str, timeout: float, key: str | None) -> None:
        super().__init__(url, model, timeout, key)
        import httpx

        with usable_environment("OLLAMA_HOST"):
            import ollama  # which makes a client at once, of OLLAMA_HOST and of proxies: that concerns nobody else
        with usable_environment():
            self._ollama = ollama.AsyncClient(
                url, timeout=self.limits, follow_redirects=False, headers=self.headers,
                auth=None if key else _without_key, trust_env=not self.is_loopback,
                verify=httpx.create_ssl_context(),
            )  # fmt: skip
        self._refusal = ollama.ResponseError

    @staticmethod
    def default_hosts() -> list[str]:
        """Return the host of ``OLLAMA_HOST``, else the local one."""
        return [os.environ.get("OLLAMA_HOST") or OllamaServer.example_url]

    @staticmethod
    def vram_gb(model: str) -> float:
        """Return the GB that Ollama takes for a model, by the size in its name ("gemma3:27b")."""
        size = re.search(r"(\d+(?:\.\d+)?)b\b", model.lower())
        if not size:
            return OLLAMA_UNKNOWN_GB
        return round(float(size[1]) * OLLAMA_GB_PER_BILLION + OLLAMA_CONTEXT_GB, 1)

    async def digest(self) -> str:
        """Return the digest that Ollama lists for the model."""
        async with self._asking(min(LISTING_TIMEOUT, self.timeout)):
            listing = await self._ollama.list()
        digests = {model.model: model.digest for model in listing.models if model.model}
        if self._tagged not in digests:
            raise self.lacks_model(digests, f"Run on it: ollama pull {self.model}")
        return digests[self._tagged] or UNKNOWN

    @property
    def _tagged(self) -> str:
        return self.model if ":" in self.model else f"{self.model}:latest"

    async def caption(self, jpeg: bytes, prompt: str, options: Mapping[str, Any], before: Turn | None = None) -> Answer:
        """See :meth:`CaptionServer.caption`."""
        messages = conversation(prompt, before)
        messages[0]["images"] = [jpeg]
        async with self._asking(self.timeout):
            # a model that thinks would spend its tokens before it writes
            others = {name: value for name, value in options.items() if name != "think"}
            reply = await self._ollama.chat(self.model, messages, think=options.get("think", False), options=others)
        text = readable(reply.message.content or "")
        return Answer(text, THINKING if reply.message.thinking and not text else reply.done_reason, options)

    async def unload(self) -> None:
        """Ask for no prompt with ``keep_alive`` 0, which unloads; the memory is free when /api/ps lists it no more."""
        async with self._asking(min(UNLOAD_TIMEOUT, self.timeout)):
            await self._ollama.generate(self.model, keep_alive=0)
            while any(model.model == self._tagged for model in (await self._ollama.ps()).models):
                await asyncio.sleep(UNLOAD_TICK)

    async def examine(self) -> ServerFacts:
        """Ask for the digest, and, as far as the host says, for its version and the memory that models hold."""
        import httpx

        digest, version, memory = await self.digest(), "", 0.0
        # nice to know, no more
        with contextlib.suppress(httpx.HTTPError, ValueError, KeyError, TypeError):
            version = str((await self._client.get("/api/version")).json()["version"])
            loaded = (await self._client.get("/api/ps")).json()["models"]
            memory = float(sum(model.get("size_vram") or 0 for model in loaded))
        return ServerFacts(digest, version, memory)

    async def close(self) -> None:
        """Close the connections of both clients."""
        await self._ollama.close()
        await super().close()

    @contextlib.asynccontextmanager
    async def _asking(self, seconds: float) -> AsyncIterator[None]:
        async with translate_failures(self.url, seconds):
            try:
                yield
            except self._refusal as error:
                response = getattr(error.__context__, "response", None)  # of the client below it
                target = response.headers.get("location", "") if response is not None and response.is_redirect else ""
                raise fault_of_status(self.url, error.status_code, target or error.error) from error


class OpenAIServer(CaptionServer):
    """One OpenAI-compatible server: vLLM, llama.cpp, LM Studio, a gateway, or Ollama's own ``/v1``."""

    example_url = "http://127.0.0.1:8000/v1"
    default_path = "/v1"
    ignored_options = frozenset({"num_ctx", "think"})

    async def digest(self) -> str:
        """Return the server's ``digest`` or ``root`` of the model, else "unknown"."""
        import httpx

        try:
            reply = await self.request("GET", "/models", None, min(LISTING_TIMEOUT, self.timeout))
        except ConfigError as error:
            if isinstance(error.__cause__, httpx.HTTPStatusError) and error.__cause__.response.status_code == 404:
                return UNKNOWN  # listing models is optional
            raise
        models = {str(model.get("id")): model for model in reply.get("data") or [] if isinstance(model, dict)}
        if self.model not in models:
            raise self.lacks_model(models, "Load it there, or set captions.model")
        model = models[self.model]
        root = str(model.get("root") or "")
        if root.startswith("/") or root == self.model:  # a path on that machine says nothing here
            root = ""
        return str(model.get("digest") or root or UNKNOWN)

    async def caption(self, jpeg: bytes, prompt: str, options: Mapping[str, Any], before: Turn | None = None) -> Answer:
        """See :meth:`CaptionServer.caption`."""
        url = f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
        messages = conversation(prompt, before)
        first = messages[0]["content"]
        messages[0]["content"] = [{"type": "text", "text": first}, {"type": "image_url", "image_url": {"url": url}}]
        body = {
            "model": self.model,
            "messages": messages,
            "max_tokens": options["num_predict"],
            "temperature": options["temperature"],
            "seed": options["seed"],
            "stream": False,
        }
        reply = await self.request("POST", "/chat/completions", body, self.timeout)
        try:
            choice = reply["choices"][0]
            message, end = choice["message"], choice.get("finish_reason")
            content, others = text_of(message.get("content"))
            text, refusal = readable(content), message.get("refusal") or "refusal" in others
            thinking = any(message.get(name) for name in THINKING_FIELDS) or others - {"refusal"}
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise HostFault("answers with something that is not a chat completion") from error
        if refusal or end == "content_filter":
            end = "refused"
        return Answer(text, THINKING if thinking and not text and end != "refused" else end, options)


def conversation(prompt: str, before: Turn | None) -> list[dict[str, Any]]:
    """Return the messages of both wire formats, still without the picture, which goes with the first one."""
    earlier = [("user", before.question), ("assistant", before.answer)] if before else []
    return [{"role": role, "content": content} for role, content in [*earlier, ("user", prompt)]]


def text_of(content: Any) -> tuple[str, set[str]]:
    """Return the text of a message's content, and which of ``OTHER_PARTS`` it has.

    The content is a string, nothing, or a list of parts, of which those of text are joined. Raises TypeError for
    anything else: its form in Python would be published.
    """
    if content is None or isinstance(content, str):
        return content or "", set()
    if not isinstance(content, list):
        raise TypeError(f"the content is a {type(content).__name__}")
    texts, others = [], set()
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        text = part.get("text") if isinstance(part, dict) else part
        if kind in OTHER_PARTS:
            others.add(kind)
        elif kind in TEXT_PARTS and isinstance(text, str):
            texts.append(text)
        else:
            raise TypeError("a part of the content is no text")
    return "".join(texts), others


def _without_key(request: httpx.Request) -> httpx.Request:
    """Take out the key that the Ollama client finds in OLLAMA_API_KEY and would send to any host."""
    request.headers.pop("Authorization", None)
    return request


# every kind of server by the name that captions.backend gives it
SERVERS: dict[str, type[CaptionServer]] = {
    "ollama": OllamaServer,
    "openai": OpenAIServer,
}
