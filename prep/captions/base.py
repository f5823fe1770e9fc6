"""The common side of all caption servers: requests over HTTP, facts about a kind of server, and kinds of failure.

Every failure becomes one of three: a ConfigError that ends the run (the model is missing, the request is refused), a
:class:`HostFault` (ask elsewhere, leave this host alone for a while), or a :class:`SampleFault` (the server failed on
this image). Whether an image is to blame, also for a refusal, is found out in ``prep/captions/hosts.py``. Redirects are
never followed and no key is sent that the config does not name.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from nanodit.errors import ConfigError, first_line
from prep.captions.quality import Answer, Turn

UNKNOWN = "unknown"
LISTING_TIMEOUT = 30.0  # seconds to say which models there are
CONNECT_TIMEOUT = 10.0  # seconds
LONGEST_WAIT = 3600.0  # seconds that a host may ask to be left alone
REFUSED = (400, 413, 422)  # a request that it cannot read, that is too large, or that it cannot work on
# what HTTP clients read, as do the client of Ollama and that of the hub
ENVIRONMENT = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR")


class HostFault(Exception):
    """A host that cannot answer now; ``wait`` is how many seconds it asked to be left alone, if it did."""

    def __init__(self, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.wait = wait


class HostTimeout(HostFault):
    """A host that accepted a question and did not answer in time."""


class HostUnreachable(HostFault):
    """A host where nobody listens."""


class SampleFault(Exception):
    """A server that failed on this image (HTTP 500), in the server's words."""


class RequestRefused(ConfigError):
    """A server that refuses a request (HTTP 400, 413, 422), ``said`` in its words: its image may be to blame."""

    def __init__(self, message: str, said: str) -> None:
        super().__init__(message)
        self.said = said


@dataclass(frozen=True)
class ServerFacts:
    """A server's own account: the model's digest, the program's version, and bytes of GPU memory that models hold now.

    ``version`` is "" and ``memory`` 0 where the server does not say.
    """

    digest: str
    version: str = ""
    memory: float = 0.0


class CaptionServer(ABC):
    """One caption server, with what a run, ``prep doctor`` and the placement must know about servers of its kind.

    A new kind writes :meth:`digest` and :meth:`caption`, sets what differs of the rest, and gets a line in
    ``prep/captions/servers.py``. It is used in one event loop and closed there.
    """

    program: ClassVar[str] = "version"  # what a version is one of, in "the hosts run Ollama 0.9 and 0.12"
    example_url: ClassVar[str]  # for a config that lacks hosts
    default_port: ClassVar[int | None] = None  # of a URL that is only a host's name
    default_path: ClassVar[str] = ""  # of a URL without a path
    ignored_options: ClassVar[frozenset[str]] = frozenset()  # keys of captions.options that it has no counterpart of
    start: ClassVar[str] = "start it"  # what the doctor advises where it does not answer; {model} may stand in it
    unloads: ClassVar[bool] = False  # whether it can take its model off the GPU, and loads it again when it is asked
    reload: ClassVar[str] = "load the same files on each"  # and where hosts have different builds of a model

    def __init__(self, url: str, model: str, timeout: float, key: str | None) -> None:
        self.url, self.model, self.timeout = url, model, timeout
        self.headers = {"authorization": f"Bearer {key}"} if key else {}
        import httpx  # which takes .3 seconds, and no config needs

        self.limits = httpx.Timeout(timeout, connect=min(CONNECT_TIMEOUT, timeout))
        with usable_environment():
            self._client = httpx.AsyncClient(
                base_url=self._base_url(), timeout=self.limits, follow_redirects=False, headers=self.headers,
                trust_env=not self.is_loopback, verify=httpx.create_ssl_context(),  # of SSL_CERT_FILE in any case
            )  # fmt: skip

    @property
    def is_loopback(self) -> bool:
        """Whether it runs on this machine, where no proxy leads."""
        try:
            return is_loopback(urlsplit(self._base_url()).hostname or "")
        except ValueError:  # no URL, which the first request says
            return False

    @staticmethod
    def default_hosts() -> list[str]:
        """Return the hosts of a config that names none; an empty list where it must name them."""
        return []

    @staticmethod
    def vram_gb(model: str) -> float:
        """Return the GB of GPU memory to keep free for a model on each host; 0 where nobody needs to."""
        return 0.0

    @abstractmethod
    async def digest(self) -> str:
        """Return the digest of the model's weights, or "unknown".

        Raises ConfigError when the host does not have the model, HostFault or SampleFault when it does not answer.
        """

    @abstractmethod
    async def caption(self, jpeg: bytes, prompt: str, options: Mapping[str, Any], before: Turn | None = None) -> Answer:
        """Ask about one picture, in the conversation that began with ``before``, if with anything.

        Raises ConfigError, HostFault or SampleFault.
        """

    async def unload(self) -> None:
        """Take the model off the GPU, and return when it has gone; errors as those of :meth:`digest`."""
        raise NotImplementedError(f"{type(self).__name__} does not unload models")

    async def examine(self) -> ServerFacts:
        """Ask what ``prep doctor`` shows of a server; errors as those of :meth:`digest`."""
        return ServerFacts(await self.digest())

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def request(self, method: str, path: str, body: dict[str, Any] | None, seconds: float) -> dict[str, Any]:
        """Send a request and return the JSON object that answers it. Raises ConfigError, HostFault or SampleFault."""
        async with translate_failures(self.url, seconds):
            response = await self._client.request(method, path, json=body)
            reply = response.raise_for_status().json()
        if not isinstance(reply, dict):
            raise HostFault("answers with something that is not a JSON object")
        return reply

    def lacks_model(self, models: Iterable[str], advice: str) -> ConfigError:
        """Return the error for a host that has only ``models``."""
        there = ", ".join(sorted(models)) or "none"
        return ConfigError(f"caption host {self.url} has no model {self.model} (it has {there}). {advice}")

    def _base_url(self) -> str:
        parts = urlsplit(self.url if "://" in self.url else f"http://{self.url}")
        port = f":{self.default_port}" if "://" not in self.url and not parts.port and self.default_port else ""
        here = "" if parts.hostname else "127.0.0.1"  # OLLAMA_HOST=:11434 is this machine
        return f"{parts.scheme}://{here}{parts.netloc}{port}{parts.path.rstrip('/') or self.default_path}"


@contextmanager
def usable_environment(*more: str) -> Iterator[None]:
    """Raise :class:`ConfigError` where no HTTP client can be made of the environment: ``ENVIRONMENT`` and ``more``."""
    try:
        yield
    except (ImportError, ValueError, OSError) as error:
        named = [name for name in (*more, *ENVIRONMENT) if os.environ.get(name) or os.environ.get(name.lower())]
        raise ConfigError(
            f"no connection can be made with {', '.join(named) or 'the proxies of this system'}: "
            f"{first_line(error) or type(error).__name__}. Correct or unset them (for socks proxies: pip install "
            "'httpx[socks]'); captions beside the images (captions.backend=sidecar) need none"
        ) from error


def is_loopback(host: str) -> bool:
    """Tell whether a name or an address is this machine's own."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def proxy_of(url: str) -> str:
    """Return the proxy of the environment through which ``url`` is asked; "" where there is none."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    proxies = getproxies()
    if not parts.hostname or is_loopback(parts.hostname) or proxy_bypass(parts.hostname):
        return ""
    proxy = proxies.get(parts.scheme) or proxies.get("all") or ""
    return proxy.rpartition("://")[2].rpartition("@")[2]  # without its user and password


@asynccontextmanager
async def translate_failures(url: str, seconds: float) -> AsyncIterator[None]:
    """Give what happens inside ``seconds``, and turn what HTTP clients raise into the three kinds of failure."""
    import httpx

    late = f"no answer within {seconds:g} s"
    try:
        async with asyncio.timeout(seconds):  # the clients' own timeouts start again with every byte that arrives
            yield
    except httpx.HTTPStatusError as error:
        response = error.response
        said = response.headers.get("location", "") if response.is_redirect else response.text
        wait = response.headers.get("retry-after", "")
        seconds = float(wait) if wait.isascii() and wait.isdigit() else 0.0
        raise fault_of_status(url, response.status_code, said, min(seconds, LONGEST_WAIT)) from error
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise ConfigError(f"caption host {url} is not a URL: {error}. Correct captions.hosts") from error
    except (httpx.ConnectTimeout, httpx.PoolTimeout) as error:
        raise HostFault("cannot be reached: the connection timed out") from error
    except (TimeoutError, httpx.TimeoutException) as error:
        raise HostTimeout(late) from error
    except (ConnectionError, httpx.HTTPError) as error:
        # the Ollama client's own words for a refused connection say nothing about the cause
        cause = error.__context__ if isinstance(error, ConnectionError) else error
        kind = HostUnreachable if isinstance(error, ConnectionError | httpx.ConnectError) else HostFault
        through = f" (through the proxy {proxy})" if (proxy := proxy_of(url)) else ""
        reason = str(cause or "") or type(cause or error).__name__
        raise kind(f"cannot be reached{through}: {reason}") from error
    except ValueError as error:  # of JSON, or of the client's models
        raise HostFault("answers with something that is not a reply of such a server") from error


def fault_of_status(url: str, status: int, said: str, wait: float = 0.0) -> Exception:
    """Return the failure that an HTTP status means.

    A refusal of the request and 404 end the run, 500 is about the sample, the rest is about the host.
    """
    said = " ".join(str(said).split())[:200]
    proxy = proxy_of(url)
    if status == 407 or (proxy and status == 403 and not url.startswith("https:")):  # https: the server's own answer
        return ConfigError(
            f"the proxy {proxy or 'on the way'} does not let requests to {url} through (HTTP {status}). Name the host "
            "in NO_PROXY, or correct the proxy's address and password"
        )
    if status in (401, 403):
        return ConfigError(
            f"caption host {url} refuses access (HTTP {status}). Name the variable that holds its key in "
            "captions.api_key_variable"
        )
    if 300 <= status < 400:
        return HostFault(f"redirects elsewhere (HTTP {status}), which is refused: {said}".rstrip(": "))
    words = f"HTTP {status}: {said}".rstrip(": ")
    if status == 500:
        return SampleFault(words)
    if status in (408, 409, 425, 429) or status > 500:
        return HostFault(f"is busy or failing (HTTP {status}): {said}".rstrip(": "), wait)
    refusal = (
        f"caption host {url} refuses the request ({words}). Check captions.model and captions.options; the model must "
        "accept images"
    )
    return RequestRefused(refusal, words) if status in REFUSED else ConfigError(refusal)
