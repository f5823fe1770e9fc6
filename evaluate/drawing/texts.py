"""Texts in place of captions, encoded just as the dataset's captions were; the encoder is held while it is needed."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any

import numpy as np

from nanodit.console import waiting
from nanodit.errors import NanoditError
from prep.dataset.reader import Dataset
from prep.encoders.registry import build_encoder
from train.draw.request import check_encoder, encoder_config


class Texts:
    """The dataset's T5: ``unavailable`` says why it cannot be had here, ``embed`` gives a text's features."""

    def __init__(self, dataset: Dataset, device: str = "cpu"):
        self._dataset, self._device = dataset, device
        self._encoder: Any = None
        self._opened, self._reason = False, None
        self._features: dict[str, np.ndarray] = {}

    @property
    def unavailable(self) -> str | None:
        """Why texts cannot be encoded, or None when they can."""
        if "t5" not in self._dataset.info["layers"]:
            return "the dataset has no text"
        if not self._opened:
            self._open()
        return self._reason

    def encode(self, texts: Iterable[str]) -> None:
        """Encode texts, one at a time so that none depends on the others, and free the encoder."""
        for text in dict.fromkeys(texts):
            self.embed(text)
        self._encoder = None
        gc.collect()

    def embed(self, text: str) -> np.ndarray:
        """Encode a text by T5: float16 (L, width); raises :class:`NanoditError` where there is no encoder."""
        if text not in self._features:
            if self._encoder is None:
                self._open()
            if self._reason:
                raise NanoditError(f"a text of its own needs T5: {self._reason}")
            self._features[text] = self._encoder.encode([text])[0].embedding
        return self._features[text]

    def _open(self) -> None:
        info, self._opened = self._dataset.info, True
        try:
            with waiting("loading T5", at_once=False):
                encoder = build_encoder(encoder_config(info, {}), "t5", self._device)
            check_encoder("t5", encoder.fingerprint(), info["layers"]["t5"].get("encoder"))
            self._encoder = encoder
        except NanoditError as error:
            self._reason = f"no text encoder: {error}"
