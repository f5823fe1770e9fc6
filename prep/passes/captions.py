"""What generated captions are made from, and the caption servers of the config before and after their work.

The work itself is in ``prep/passes/caption_worker.py``, and who does it in ``prep/passes/caption_stage.py``.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Collection, Sequence
from typing import Any

from PIL import Image

from nanodit.console import say
from nanodit.errors import ResourceError
from nanodit.files import sha256_bytes
from prep.captions import quality
from prep.captions.base import UNKNOWN
from prep.captions.config import CaptionConfig
from prep.captions.hosts import agreed_digest, list_faults, unload_models
from prep.captions.prompts import PEOPLE, SHIPPED, Prompts, prompt_text, short_prompt_text
from prep.captions.servers import SERVERS
from prep.config import PrepConfig
from prep.dataset.codecs import decode_pixels
from prep.passes.caption_placement import caption_hosts
from prep.passes.nodes import Node
from prep.passes.plan import UNTIL_THE_RUN

PROMPT = SHIPPED[PEOPLE]
JPEG_QUALITY = 90


def caption_recipe(config: PrepConfig) -> dict[str, Any]:
    """Everything that generated captions are made from, besides the images.

    ``backend``, ``model``, ``digest`` (asked from the hosts unless the config pins it), ``prompt`` (SHA-256 of its
    text), ``options`` (of the questions) and ``checks``; with short captions also ``short_prompt``. Raises ConfigError
    when a host lacks the model or two differ, ResourceError when no host answers, or none is there before the run.
    """
    captions = config.captions
    if captions.own_servers and not captions.digest:
        raise ResourceError(f"which weights {captions.model} has is {UNTIL_THE_RUN}")
    digest = captions.digest or asyncio.run(agreed_digest(captions))
    if digest == UNKNOWN:
        say(f"warning: the caption hosts do not say which weights {captions.model} has; recorded as unknown")
    recipe = {
        "backend": captions.backend,
        "model": captions.model,
        "digest": digest,
        "prompt": sha256_bytes(read_prompt(captions).encode()),
        "options": question(captions),
        "checks": {
            "code": quality.CODE_VERSION,
            "min_words": captions.min_words,
            "max_words": captions.max_words,
            "reask_temperature": captions.reask_temperature,
        },
    }
    if captions.short:
        recipe["short_prompt"] = sha256_bytes(short_prompt_text(captions.short_prompt).encode())
        recipe["checks"] |= {
            "short_min_words": captions.short_min_words,
            "short_max_words": captions.short_max_words,
        }
    return recipe


def question(captions: CaptionConfig) -> dict[str, Any]:
    """Return the options of a first question, with the size of the picture that goes with it."""
    options = captions.options.asked() | {"image_side": captions.image_side}
    ignored = SERVERS[captions.backend].ignored_options
    return {name: value for name, value in options.items() if name not in ignored}


def read_prompts(captions: CaptionConfig) -> Prompts:
    """Return the texts of all questions; errors as :func:`read_prompt`."""
    return Prompts(read_prompt(captions), short_prompt_text(captions.short_prompt) if captions.short else "")


def read_prompt(captions: CaptionConfig) -> str:
    """Return the text of the prompt; errors as those of :func:`prep.captions.prompts.prompt_text`."""
    return prompt_text(captions.prompt)


def free_cards(config: PrepConfig, nodes: Sequence[Node]) -> bool:
    """Let caption servers unload their model from cards that passes are going to use; whether all of them have.

    Servers that cannot, and those elsewhere, are left alone.
    """
    machines = {node.address for node in nodes if node.gpus}  # where the driver may be a node of its own
    return not _unload(config, caption_hosts(config, [node for node in nodes if node.address in machines]))


def free_all_cards(config: PrepConfig, nodes: Sequence[Node]) -> bool:
    """Let all caption servers unload their model when the captions are through; whether those on the nodes have."""
    faults = _unload(config, [host.url for host in config.captions.servers])
    return faults.keys().isdisjoint(caption_hosts(config, nodes))


def _unload(config: PrepConfig, urls: Collection[str]) -> dict[str, str]:
    """Return what is wrong with servers that did not unload their model, and say it."""
    if not urls or not SERVERS[config.captions.backend].unloads:
        return {}
    faults = asyncio.run(unload_models(config.captions, urls))
    if faults:
        say(f"warning: {config.captions.model} may still be on a GPU that is needed now: {list_faults(faults.items())}")
    return faults


def picture_bytes(crop: bytes, side: int) -> bytes:
    """Write a crop as the JPEG that a model is shown, its longer side reduced to at most ``side`` pixels."""
    image = Image.fromarray(decode_pixels(crop))
    scale = side / max(image.size)
    if scale < 1:
        size = [max(1, round(length * scale)) for length in image.size]
        image = image.resize((size[0], size[1]), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()
