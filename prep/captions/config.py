"""The section ``captions`` of a config of ``prep``: which captions images get."""

from __future__ import annotations

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, create_model, field_validator, model_validator

from nanodit.config import Config
from prep.captions.servers import SERVERS
from prep.captions.sidecar import ORIGINS

# keys that were added later, and what they mean where nobody sets them
LATER = {"from": None, "overwrite": False, "keep_edited": True}
LATER |= {"short": False, "short_prompt": None, "short_min_words": 5, "short_max_words": 30}


class CaptionHost(Config):
    """A caption server and how many captions it makes at a time."""

    url: str
    slots: int = Field(ge=1)


class CaptionOptions(Config):
    """Options of the model, under Ollama's names; a part of what a caption is made from."""

    num_ctx: int = Field(4096, ge=512)
    num_predict: int = Field(400, ge=1)
    temperature: float = Field(0.0, ge=0)
    seed: int = Field(0, ge=0)
    think: bool | Literal["low", "medium", "high"] | None = False

    def asked(self) -> dict[str, Any]:
        """Return the options as recipes name them: ``think`` only where it is not false, as it always was."""
        return self.model_dump(exclude={"think"} if self.think is False else None)


# a key that Python cannot write as an attribute
_From = create_model("_From", __base__=Config, **{"from": (list[Literal[ORIGINS]] | None, Field(None, min_length=1))})


class CaptionConfig(_From):
    """The origin of captions, and what happens to an image without a usable one."""

    backend: Literal["sidecar", *SERVERS] = "sidecar"
    overwrite: bool = False
    keep_edited: bool = True
    on_missing: Literal["error", "reject"] = "error"
    model: str = Field("gemma3:27b", min_length=1)
    digest: str | None = None
    hosts: Literal["auto"] | Annotated[list[str | CaptionHost], Field(min_length=1)] | None = None
    slots: int = Field(1, ge=1)
    api_key_variable: str | None = None
    prompt: str | None = None
    image_side: int = Field(896, ge=64)
    options: CaptionOptions = CaptionOptions()
    reask_temperature: float = Field(0.5, gt=0)
    min_words: int = Field(60, ge=1)
    max_words: int = Field(300, ge=1)
    short: bool = False
    short_prompt: str | None = None
    short_min_words: int = Field(5, ge=1)
    short_max_words: int = Field(30, ge=1)
    timeout: float = Field(300.0, gt=0)
    cool_down: float = Field(5.0, gt=0)
    patience: float = Field(600.0, ge=0)

    @property
    def generated(self) -> bool:
        """Tell whether a model writes the captions."""
        return self.backend != "sidecar"

    @property
    def own_servers(self) -> bool:
        """Tell whether a run starts the caption servers itself, on the machines that it has."""
        return self.generated and self.hosts == "auto"

    @property
    def fills(self) -> bool:
        """Tell whether a model writes the captions that are missing, and only those."""
        return self.generated and not self.overwrite

    @property
    def origins(self) -> tuple[str, ...]:
        """Return where captions that came with the images are looked for, in order."""
        chosen = getattr(self, "from")
        return tuple(origin for origin in ORIGINS if chosen is None or origin in chosen)

    def recorded(self) -> dict[str, Any]:
        """Return the section as dataset.json has it: keys that it did not always have only where they are set."""
        section = self.model_dump(exclude={name for name in LATER if getattr(self, name) == LATER[name]})
        return section | {"options": self.options.asked()}

    @property
    def servers(self) -> tuple[CaptionHost, ...]:
        """Return the servers that others started, with their slots; without ``hosts`` the backend's default ones."""
        if not self.generated or self.own_servers:
            return ()
        hosts = self.hosts or SERVERS[self.backend].default_hosts()
        return tuple(CaptionHost(url=host, slots=self.slots) if isinstance(host, str) else host for host in hosts)

    @field_validator("hosts")
    @classmethod
    def _are_urls(cls, hosts: str | list[str | CaptionHost] | None) -> str | list[str | CaptionHost] | None:
        if hosts == "auto":
            return hosts
        urls = [host if isinstance(host, str) else host.url for host in hosts or []]
        for url in urls:
            _check_url(url)
        if len(set(urls)) < len(urls):
            raise ValueError("a host is listed twice; give it more slots instead")
        return hosts

    @model_validator(mode="after")
    def _fit_together(self) -> CaptionConfig:
        if self.min_words > self.max_words:
            raise ValueError(f"min_words {self.min_words} is above max_words {self.max_words}")
        if self.short_min_words > self.short_max_words:
            raise ValueError(f"short_min_words {self.short_min_words} is above short_max_words {self.short_max_words}")
        if self.overwrite and not self.generated:
            raise ValueError(f"overwrite needs a backend that writes captions: {' or '.join(SERVERS)}")
        if self.own_servers and self.backend != "ollama":
            raise ValueError(f"hosts auto starts Ollama; with backend {self.backend} name the hosts that run")
        if self.generated and not self.own_servers and not self.servers:
            example = SERVERS[self.backend].example_url
            raise ValueError(f"backend {self.backend} needs hosts, for example hosts: [{example}]")
        return self


def _check_url(url: str) -> None:
    parts = urlsplit(url if "://" in url else f"http://{url}")
    try:
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        usable = False
    if not usable or parts.query or parts.fragment:
        raise ValueError(f"{url!r} is not the URL of a server, such as http://192.168.1.20:11434")
    if parts.username or parts.password:  # configs are written into every run's folder
        raise ValueError("a host's URL must not hold credentials; name a variable in api_key_variable")
