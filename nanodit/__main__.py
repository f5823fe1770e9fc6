"""``python -m nanodit``: the command ``nanodit`` where its script is not on the path."""

from __future__ import annotations

import sys

from nanodit.cli import main

if __name__ == "__main__":
    sys.exit(main())
