"""T5 text features: the encoder's last hidden state for every token of a caption, end token included.

torch and transformers are imported by what computes: a plan asks for the fingerprint alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanodit.errors import DataError
from prep.encoders.halving import Halving
from prep.encoders.weights import cannot_load, compute_dtype, model_identity, open_model, quiet_transformers

CODE_VERSION = 1
PAD_MULTIPLE = 32  # batches are padded to few distinct lengths, so equal batches take equal kernels


@dataclass(frozen=True)
class T5Tokens:
    """Features of one caption: ``embedding`` (L, W) float16, valid tokens only; ``truncated`` if it was cut."""

    embedding: np.ndarray
    truncated: bool


def fingerprint(
    model: str | Path, revision: str | None = None, sha256: Mapping[str, str] | None = None, max_tokens: int = 512
) -> dict[str, str | int]:
    """Everything that determines the features, without loading the weights; the device is not part of it."""
    identity = model_identity(model, revision, sha256)
    return {"encoder": "t5", "code": CODE_VERSION, "max_tokens": max_tokens, **identity}


class T5Encoder:
    """A T5 encoder with its tokenizer: captions in, float16 features of their valid tokens out.

    Computed in float32 on the CPU and in bfloat16 on a GPU (T5 overflows in float16). The last bits of a result
    depend on the shape of the batch, so callers that promise equal bytes must form equal batches. A batch that does not
    fit into a GPU is halved, as ``memory`` remembers.

    ``sha256`` maps the files of a hub model to the hashes that they must have. Raises :class:`ConfigError` when the
    model cannot be had or loaded.
    """

    def __init__(
        self,
        model: str | Path,
        revision: str | None = None,
        sha256: Mapping[str, str] | None = None,
        device: str = "cpu",
        max_tokens: int = 512,
    ) -> None:
        import torch
        from transformers import AutoTokenizer, T5EncoderModel

        folder, self._source = open_model(model, revision, sha256)
        self.max_tokens = max_tokens
        self.device = torch.device(device)
        self.memory = Halving("T5", device)
        options = {"dtype": compute_dtype(self.device), "local_files_only": True, "use_safetensors": True}
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            with quiet_transformers():
                self.model = T5EncoderModel.from_pretrained(folder, **options).to(self.device).eval()
        except (OSError, ValueError) as error:
            raise cannot_load("T5 encoder", model, error) from error

    @property
    def width(self) -> int:
        """Channels per token."""
        return self.model.config.d_model

    def fingerprint(self) -> dict[str, str | int]:
        """See :func:`fingerprint`."""
        return fingerprint(*self._source, self.max_tokens)

    def tokenize(self, caption: str) -> tuple[list[int], bool]:
        """Token ids, end token last, at most ``max_tokens``; and whether the caption was cut.

        Raises :class:`DataError` for a caption without words.
        """
        if not caption.strip():
            raise DataError("empty caption: every image needs a caption, or must be rejected before it is encoded")
        ids = self.tokenizer(caption, verbose=False)["input_ids"]
        if len(ids) <= self.max_tokens:
            return ids, False
        return [*ids[: self.max_tokens - 1], self.tokenizer.eos_token_id], True

    def encode(self, captions: Sequence[str]) -> list[T5Tokens]:
        """Encode ``captions`` as one batch; the results are in their order.

        Raises :class:`DataError` for an empty caption or features that float16 cannot hold, :class:`ResourceError`
        when the GPU cannot hold one caption.
        """
        tokens = [self.tokenize(caption) for caption in captions]
        return [features for part in self.memory.run(self._encode, tokens) for features in part]

    def _encode(self, tokens: Sequence[tuple[list[int], bool]]) -> list[T5Tokens]:
        import torch

        longest = max(len(ids) for ids, _ in tokens)
        padded = min(-(-longest // PAD_MULTIPLE) * PAD_MULTIPLE, self.max_tokens)
        # The mask comes from the very tokens embedded here: no other row, no earlier caption can leave one behind.
        ids_bl = torch.full((len(tokens), padded), self.tokenizer.pad_token_id, dtype=torch.long)
        mask_bl = torch.zeros((len(tokens), padded), dtype=torch.long)
        for row, (ids, _) in enumerate(tokens):
            ids_bl[row, : len(ids)] = torch.tensor(ids)
            mask_bl[row, : len(ids)] = 1
        with torch.inference_mode():
            output = self.model(input_ids=ids_bl.to(self.device), attention_mask=mask_bl.to(self.device))
            features_bld = output.last_hidden_state.to(torch.float16).cpu()
        if not torch.isfinite(features_bld).all():
            raise DataError("T5 gave features beyond float16's range; check the model's weights and its data type")
        return [
            T5Tokens(features_bld[row, : len(ids)].numpy().copy(), truncated)
            for row, (ids, truncated) in enumerate(tokens)
        ]


build = T5Encoder
