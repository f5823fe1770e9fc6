import nanodit  # noqa: F401 - before torch: see there
