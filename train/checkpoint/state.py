"""What readers of a checkpoint rely on in its state.json, which anybody may have written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nanodit.errors import DataError

Count = Annotated[int, Field(ge=0, le=1 << 40)]


class _Part(BaseModel):
    """Values of the types that are named here, and any others."""

    model_config = ConfigDict(strict=True, extra="allow")


class _Train(_Part):
    steps: Count


class _Config(_Part):
    train: _Train


class _Dataset(_Part):
    fingerprint: str
    base: Annotated[int, Field(gt=0, le=1 << 16)]
    layers: dict[str, dict[str, Any]]


class _Earlier(_Part):
    fingerprint: str


class _Noise(_Part):
    kind: str
    version: int


class _Parent(_Part):
    sha256: str
    step: Count


class _State(_Part):
    step: Count
    config: _Config
    dataset: _Dataset
    environment: dict[str, Any] = {}
    totals: Annotated[list[Count], Field(min_length=1)] = [0]
    earlier_datasets: list[_Earlier] = []
    noise: _Noise = _Noise(kind="host", version=1)
    parent: _Parent | None = None


def checked_state(state: Any, step_folder: Path) -> dict[str, Any]:
    """Return a checkpoint's state as it is; raises :class:`DataError` naming what is missing or of another type."""
    try:
        _State.model_validate(state)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "all of it"
        raise DataError(
            f"{step_folder / 'state.json'}: not the state of a checkpoint of this version: {where}: {first['msg']}"
        ) from None
    return state
