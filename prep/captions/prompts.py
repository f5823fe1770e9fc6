"""What caption models are asked: prompts that ship with the package, by name, or a user's own file."""

from __future__ import annotations

from pathlib import Path

from nanodit.errors import ConfigError

FOLDER = Path(__file__).parent
PEOPLE = "people"
SHIPPED = {PEOPLE: FOLDER / "caption_prompt.txt"}
SHIPPED |= {name: FOLDER / f"caption_prompt_{name}.txt" for name in ("art", "product", "landscape")}


def prompt_text(prompt: str | None) -> str:
    """Return the text of a prompt: None is that for people, a name one of ``SHIPPED``, anything else a file.

    Raises ConfigError when the file cannot be read or is empty.
    """
    path = SHIPPED.get(prompt or PEOPLE) or Path(prompt or "")
    names = ", ".join(SHIPPED)
    try:
        text = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        raise ConfigError(f"captions.prompt {path} is no file, and no prompt that ships with it ({names})") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"captions.prompt {path} cannot be read as UTF-8 text: {error}") from None
    if not text:
        raise ConfigError(
            f"captions.prompt {path} is empty. Write into it what the model should do, or name one: {names}"
        )
    return text
