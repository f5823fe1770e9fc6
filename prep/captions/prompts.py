"""What caption models are asked: prompts that ship with the package, by name, or a user's own file."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from nanodit.errors import ConfigError

FOLDER = Path(__file__).parent
PEOPLE = "people"
SHIPPED = {PEOPLE: FOLDER / "caption_prompt.txt"}
SHORT = FOLDER / "caption_prompt_short.txt"  # what follows in the same conversation, whatever was asked before
SHIPPED |= {name: FOLDER / f"caption_prompt_{name}.txt" for name in ("art", "product", "landscape")}


class Prompts(NamedTuple):
    """The texts of the questions about an image; ``short`` is "" where no short caption is asked for."""

    long: str
    short: str = ""


def prompt_text(prompt: str | None) -> str:
    """Return the text of a prompt: None is that for people, a name one of ``SHIPPED``, anything else a file.

    Raises ConfigError when the file cannot be read or is empty.
    """
    names = ", ".join(SHIPPED)
    path = SHIPPED.get(prompt or PEOPLE) or Path(prompt or "")
    return _read(path, "prompt", f", and no prompt that ships with it ({names})", f"name one: {names}")


def short_prompt_text(prompt: str | None) -> str:
    """Return the text that asks for a short caption after a long one: None is ``SHORT``, anything else a file.

    Raises ConfigError as :func:`prompt_text`.
    """
    return _read(Path(prompt) if prompt else SHORT, "short_prompt", "", "set it to null")


def _read(path: Path, key: str, others: str, otherwise: str) -> str:
    try:
        text = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        raise ConfigError(f"captions.{key} {path} is no file{others}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"captions.{key} {path} cannot be read as UTF-8 text: {error}") from None
    if not text:
        raise ConfigError(f"captions.{key} {path} is empty. Write into it what the model should do, or {otherwise}")
    return text
