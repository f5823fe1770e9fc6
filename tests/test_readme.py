"""What the README and the comments promise is there: links, pictures, and the quickstart's exact commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_lead_somewhere(document):
    targets = re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8"))
    missing = [target for target in targets if not (document.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_no_placeholder_was_left(document):
    prose = re.sub(r"```.*?```|`[^`]*`", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert not re.findall(r"^[A-Z]{6,}$|\b(?:TODO|FIXME|RUNTIME|RESULTS)\b", prose, flags=re.MULTILINE)


def test_the_readme_lists_the_makefiles_quickstart():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = makefile.split("\nquickstart:")[1].split("\n\n")[0]
    commands = re.findall(r"^\t\$\(BIN\)/(nanodit .*)$", recipe, flags=re.MULTILINE)
    assert len(commands) == 5
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for command in commands:
        assert command.replace("$(Q)", "quickstart") in readme


def test_shipped_configs_exist_for_every_command_named():
    for document in DOCUMENTS:
        for config in re.findall(r"configs/[\w/-]+\.yaml", document.read_text(encoding="utf-8")):
            assert (ROOT / config).exists(), config
