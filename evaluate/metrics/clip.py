"""CLIP, asked which of two phrases a picture shows, and how well a caption fits it, sentence by sentence.

Optional, and never downloaded: ``probe`` of the configuration names a folder or a model in the hub's cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from evaluate.metrics.likeness import local_folder
from nanodit.errors import ConfigError
from prep.captions.sentences import sentences
from prep.encoders.weights import cannot_load, folder_hash, quiet_transformers

NO_PROBE = "no probe: name a CLIP model in probe"


class ClipProbe:
    """A CLIP model with its preprocessing (Radford et al. 2021): pictures to features, and phrases against them."""

    def __init__(self, folder: Path, label: str, device: str = "cpu"):
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizerFast

        self.label, self.content = label, folder_hash(folder)
        self._device = torch.device(device)
        try:
            with quiet_transformers():
                model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
            self._processor = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
            self._tokenizer = CLIPTokenizerFast.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise cannot_load("CLIP model", label, error) from error
        self._model = model.to(self._device).eval()

    @torch.inference_mode()
    def features(self, pictures: np.ndarray) -> np.ndarray:
        """Embed each picture, uint8 (B, H, W, 3) to unit float32 (B, width)."""
        inputs = self._processor(images=list(pictures), return_tensors="pt", input_data_format="channels_last")
        pooled = self._model.vision_model(pixel_values=inputs["pixel_values"].to(self._device)).pooler_output
        return torch.nn.functional.normalize(self._model.visual_projection(pooled), dim=-1).cpu().numpy()

    @torch.inference_mode()
    def texts(self, phrases: Sequence[str]) -> np.ndarray:
        """Embed each phrase, cut at CLIP's 77 tokens (:meth:`cut` counts those): unit float32 (B, width)."""
        found = []
        for phrase in phrases:  # one at a time, so that none depends on the others
            tokens = self._tokenizer([phrase], truncation=True, max_length=self._length, return_tensors="pt")
            pooled = self._model.text_model(**tokens.to(self._device)).pooler_output
            found.append(torch.nn.functional.normalize(self._model.text_projection(pooled), dim=-1)[0].cpu().numpy())
        return np.stack(found)

    def captions(self, captions: Sequence[str]) -> np.ndarray:
        """Embed each caption as the mean of its sentences' embeddings, float32 (B, width), shorter than 1.

        CLIP reads 77 tokens, and captions are longer. The product with a picture's unit feature is the mean of its
        cosines with the sentences, in [-1, 1]: CLIPScore (Hessel et al. 2021, eq. 1) per sentence, without its factor
        of 2.5, its prompt and its clipping at 0.
        """
        parts = [sentences(caption) or [caption] for caption in captions]
        index = {one: place for place, one in enumerate(dict.fromkeys(one for own in parts for one in own))}
        texts = self.texts(list(index))
        return np.stack([texts[[index[one] for one in own]].mean(0) for own in parts])

    def cut(self, phrases: Sequence[str]) -> int:
        """Return how many phrases are longer than CLIP reads, so that their ends count for nothing."""
        with quiet_transformers():  # which warns of each
            return sum(len(self._tokenizer(phrase)["input_ids"]) > self._length for phrase in phrases)

    @property
    def _length(self) -> int:
        return self._model.config.text_config.max_position_embeddings

    def preference(self, features: np.ndarray, phrases: Sequence[tuple[str, str]]) -> np.ndarray:
        """Return the probability of the second phrase of each pair rather than the first, for each picture (B,).

        A softmax over the two at CLIP's own temperature, as in its zero-shot classification.
        """
        index = {phrase: place for place, phrase in enumerate(dict.fromkeys(one for pair in phrases for one in pair))}
        texts = self.texts(list(index)).astype(np.float64)
        old, new = (texts[[index[pair[side]] for pair in phrases]] for side in (0, 1))
        scale = float(self._model.logit_scale.detach().exp())
        return 1 / (1 + np.exp(-scale * np.einsum("bd,bd->b", features.astype(np.float64), new - old)))


def open_probe(model: str | None, device: str) -> tuple[ClipProbe | None, str | None]:
    """Open the probe of the configuration; returns None and the reason where there is none.

    Raises :class:`ConfigError` for files that are there and are no CLIP model.
    """
    if model is None:
        return None, NO_PROBE
    try:
        folder = local_folder(model)
    except ConfigError as error:
        return None, f"no probe: {error}"
    return ClipProbe(folder, model if not Path(model).is_dir() else Path(model).name, device), None
