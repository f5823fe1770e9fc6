"""What the project's HTML pages share: the frame ``page.html`` with its style, and how templates are filled in.

A page is one file that loads nothing: its Content-Security-Policy forbids it, and jinja2 escapes every string. It runs
nothing either, but for a script of ours that a page names by its hash in the block ``policy``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2


def open_template(path: Path, filters: Mapping[str, Callable[..., Any]], *folders: Path) -> jinja2.Template:
    """Load a template; an unknown name in it is an error.

    It may extend ``page.html`` and include its neighbours and templates of ``folders``.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([path.parent, *folders, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    return environment.get_template(path.name)
