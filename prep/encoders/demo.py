"""The demo encoders: small local models in the real classes and file formats, for runs without any download.

T5 and DINOv3 are built here from a fixed seed in seconds; the two pose networks are trained by
``tools/demo_pose/train.py`` and kept in ``prep/encoders/assets``. All four are loaded by exactly the code that
loads the real ones. torch and transformers are imported by what builds: a plan finds them built, as a rule.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import string
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nanodit.errors import ConfigError, DataError
from nanodit.files import canonical_json, sha256_bytes, sha256_file
from prep.encoders.weights import quiet_transformers
from prep.figures.figures import VOCABULARY

if TYPE_CHECKING:  # which takes seconds to import
    import torch

CODE_VERSION = 2
SEED = 20250101
ASSETS = Path(__file__).parent / "assets"
DETECTOR = "demo_yolox.onnx"
POSE = "demo_dw_ll.onnx"
MARKER = "demo.json"  # names the recipe that a folder was built by

T5_WIDTH = 128
T5_VALUE_WIDTH = 32
# Head h of the demo T5 looks at the token this far away; None is everything four or more tokens before or behind.
T5_OFFSETS = (-3, -2, -1, 1, 2, 3, None, None)
T5_GAINS = (0.4, 0.5, 0.6, 0.6, 0.5, 0.4, 0.5, 0.5)  # size of each head's message beside the token's own identity, 1

DINO_WIDTH = 96
DINO_FREQUENCIES = 4  # cosine frequencies per axis that the demo DINOv3 sees of a patch


@dataclass(frozen=True)
class DemoEncoders:
    """Where the four demo encoders are: folders for ``t5`` and ``dino``, ONNX files for ``detector`` and ``pose``."""

    t5: Path
    dino: Path
    detector: Path
    pose: Path


def known_words(words: str | Sequence[str]) -> list[str]:
    """Return the words that ``t5.words`` names or lists, sorted, each once; a file has whitespace between them.

    Raises :class:`ConfigError` for a file that cannot be read or has no words.
    """
    if isinstance(words, str):
        try:
            listed = Path(words).read_text(encoding="utf-8").split()
        except (OSError, ValueError) as error:
            raise ConfigError(f"t5.words: cannot read {words} ({error}). Give a UTF-8 text file of words") from error
        if not listed:
            raise ConfigError(f"t5.words: {words} has no words. Give a text file of those in the captions")
        words = listed
    return sorted(set(words))


def demo_folder(words: Sequence[str] | None = None) -> Path:
    """Return where demo encoders are by default, ``$NANODIT_CACHE`` or ``~/.cache/nanodit``, one folder per content."""
    cache = os.environ.get("NANODIT_CACHE")
    root = Path(cache) if cache else Path.home() / ".cache" / "nanodit"
    return root / f"demo-{recipe_digest(words)[:16]}"


def recipe_digest(words: Sequence[str] | None = None) -> str:
    """SHA-256 of what the demo encoders are made from: this recipe's version, the vocabulary, the pose networks.

    ``words`` None are the figures' words, here and below.
    """
    return sha256_bytes(
        canonical_json(
            {
                "code": CODE_VERSION,
                "vocabulary": list(words or VOCABULARY),
                "detector": sha256_file(_asset(DETECTOR)),
                "pose": sha256_file(_asset(POSE)),
            }
        ).encode()
    )


def build_demo_encoders(folder: Path, words: Sequence[str] | None = None) -> DemoEncoders:
    """Build the demo encoders in ``folder`` unless they are there already; equal bytes every time.

    The folder appears complete or not at all, so several processes may build it at once.

    Raises :class:`DataError` when the pose networks are missing from the installation, or ``folder``
    holds anything else.
    """
    folder = Path(folder)
    encoders = DemoEncoders(folder / "t5", folder / "dino", folder / DETECTOR, folder / POSE)
    digest = recipe_digest(words)
    if _is_built(folder, digest):
        return encoders
    if folder.exists() and not (folder / MARKER).is_file() and any(folder.iterdir()):
        raise DataError(f"{folder} holds other files; give the demo encoders a folder of their own")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.tmp-", dir=folder.parent))
    try:
        build_t5(temporary / "t5", words or VOCABULARY)
        build_dino(temporary / "dino")
        for name in (DETECTOR, POSE):
            shutil.copyfile(_asset(name), temporary / name)
        (temporary / MARKER).write_text(canonical_json({"recipe": digest}))
        _publish(temporary, folder, digest)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return encoders


def _asset(name: str) -> Path:
    path = ASSETS / name
    if not path.is_file():
        raise DataError(
            f"{path} is missing; reinstall nanodit, or make it again in a clone with: "
            "python -m tools.demo_pose.train prep/encoders/assets"
        )
    return path


def _is_built(folder: Path, digest: str) -> bool:
    try:
        return json.loads((folder / MARKER).read_text())["recipe"] == digest
    except FileNotFoundError:
        return False


def _publish(temporary: Path, folder: Path, digest: str) -> None:
    """Move the finished ``temporary`` to ``folder``, replacing what an older recipe left there."""
    temporary.chmod(0o755)  # mkdtemp makes private folders; a cache may be shared
    if folder.exists() and not _is_built(folder, digest):
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old-", dir=folder.parent))
        os.replace(folder, old / "demo")
        shutil.rmtree(old)
    try:
        os.replace(temporary, folder)
    except OSError:
        if not _is_built(folder, digest):  # otherwise another process was faster, with the same bytes
            raise


# --- T5 ---------------------------------------------------------------------------------------------------------------


def pieces(words: Sequence[str]) -> list[tuple[str, float]]:
    """Make a unigram vocabulary (piece, log probability) in which each of ``words`` is one token.

    Words come as they are and capitalised, since captions start with a capital. Punctuation and single characters
    follow, much less likely, so that any text can be written and no known word is ever spelt out.
    """
    known: set[str] = set()
    for word in words:
        known.update({f"▁{word}", f"▁{word[:1].upper()}{word[1:]}"})
        # inner parts of "dark-blue" stand without the space mark
        known.update(part for part in re.split(r"[-'’]", word)[1:] if len(part) > 1)
    latin = [chr(code) for code in range(0xC0, 0x180)]
    characters = [*string.ascii_letters, *string.digits, *string.punctuation, *"–—‘’“”…", *latin]
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -12.0)]
    single = [(character, -6.0 if character in string.punctuation else -12.0) for character in characters]
    return specials + single + [(piece, -6.0) for piece in sorted(known - set(characters))]


def build_t5(folder: Path, words: Sequence[str] = VOCABULARY) -> None:
    """Save a two-layer T5 encoder whose features are *token identity plus context*.

    A network with random attention mixes all tokens and loses which word stood where; then no image model learns
    colours from captions in minutes. Here attention is purely positional: queries and keys are zero and the
    relative bias makes each head copy the token at one fixed offset (T5's buckets are exact below eight), through a
    random projection of its own, next to the residual stream that keeps the token's own embedding. So "red" is
    linearly readable at "jumper".
    """
    import torch
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    vocabulary = pieces(words)
    config = T5Config(
        vocab_size=len(vocabulary),
        d_model=T5_WIDTH,
        d_kv=T5_VALUE_WIDTH,
        d_ff=T5_WIDTH,
        num_layers=2,
        num_heads=len(T5_OFFSETS),
        dropout_rate=0.0,
        feed_forward_proj="relu",
        pad_token_id=0,
        eos_token_id=1,
    )
    model = T5EncoderModel(config)
    draw = _Normal("t5")
    with torch.no_grad():
        # Unit variance: by far the loudest part of the stream, and well apart from each other in 128 dimensions.
        model.shared.weight.copy_(draw(len(vocabulary), T5_WIDTH))
        for layer, block in enumerate(model.encoder.block):
            attention, dense = block.layer[0].SelfAttention, block.layer[1].DenseReluDense
            attention.q.weight.zero_()
            attention.k.weight.zero_()
            values = draw(len(T5_OFFSETS), T5_VALUE_WIDTH, T5_WIDTH) / T5_WIDTH**0.5
            outputs = draw(T5_WIDTH, len(T5_OFFSETS), T5_VALUE_WIDTH) / T5_VALUE_WIDTH**0.5
            # the second layer only widens the view, quietly
            gains = torch.tensor(T5_GAINS) * (1.0 if layer == 0 else 0.4)
            attention.v.weight.copy_(values.flatten(0, 1))
            attention.o.weight.copy_((outputs * gains[:, None]).flatten(1))
            for linear, gain in ((dense.wi, 1.0), (dense.wo, 0.2)):
                linear.weight.copy_(draw(*linear.weight.shape) * gain / linear.in_features**0.5)
        bias = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias  # shared by all layers
        bias.weight.copy_(torch.from_numpy(positional_bias(config.relative_attention_num_buckets)))
    folder.mkdir(parents=True)
    with quiet_transformers():
        model.save_pretrained(folder)
    T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=512).save_pretrained(folder)


def positional_bias(buckets: int) -> np.ndarray:
    """Relative attention bias (buckets, heads) that makes head h look at ``T5_OFFSETS[h]``.

    T5 puts an offset d <= 0 into bucket -d and d > 0 into bucket ``buckets / 2 + d``, exactly for \\|d\\| < 8
    (Raffel et al. 2020, section 2.1). Where the text ends before the offset, the head falls back on the token
    itself.
    """
    half = buckets // 2
    bias = np.zeros((buckets, len(T5_OFFSETS)), np.float32)
    before = np.arange(buckets) < half
    for head, offset in enumerate(T5_OFFSETS):
        if offset is None:
            far = np.arange(buckets) % half >= 4
            bias[far & (before == (head % 2 == 0)), head] = 24.0
        else:
            bias[-offset if offset < 0 else half + offset, head] = 24.0
        bias[0, head] = 12.0
    return bias


# --- DINOv3 -----------------------------------------------------------------------------------------------------------


def build_dino(folder: Path, name: str = "dino") -> None:
    """Save a two-layer DINOv3 ViT with four registers whose features hold what a patch looks like.

    The patch embedding is a random mixture of the lowest cosines of each colour channel, so colour, gradients and
    coarse edges of a patch survive; a constant bias keeps brightness readable behind the final normalisation.
    Queries and keys are small, so CLS gathers the mean of the patches.
    """
    import torch
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    config = DINOv3ViTConfig(
        patch_size=16,
        hidden_size=DINO_WIDTH,
        intermediate_size=2 * DINO_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_register_tokens=4,
        layerscale_value=0.5,
        pos_embed_rescale=None,
    )
    model = DINOv3ViTModel(config)
    draw = _Normal(name)
    with torch.no_grad():
        embeddings = model.embeddings
        basis = torch.from_numpy(cosine_basis(config.patch_size))  # (frequency pairs, 16, 16)
        mixture = draw(DINO_WIDTH, 3, len(basis)) * (0.5 / 3**0.5)
        embeddings.patch_embeddings.weight.copy_(torch.einsum("dcf,fyx->dcyx", mixture, basis))
        embeddings.patch_embeddings.bias.copy_(draw(DINO_WIDTH))
        embeddings.cls_token.copy_(draw(1, 1, DINO_WIDTH) * 0.5)
        embeddings.register_tokens.copy_(draw(*embeddings.register_tokens.shape))
        embeddings.mask_token.zero_()
        for block in model.model.layer:
            attention, mlp = block.attention, block.mlp
            gains = {attention.q_proj: 0.3, attention.k_proj: 0.3, attention.v_proj: 1.0, attention.o_proj: 1.0}
            for linear, gain in {**gains, mlp.up_proj: 1.0, mlp.down_proj: 1.0}.items():
                linear.weight.copy_(draw(*linear.weight.shape) * gain / linear.in_features**0.5)
                if linear.bias is not None:
                    linear.bias.zero_()
    folder.mkdir(parents=True)
    with quiet_transformers():
        model.save_pretrained(folder)


def cosine_basis(side: int) -> np.ndarray:
    """Return the lowest two-dimensional cosines on a ``side`` x ``side`` patch, (n, side, side) float32.

    Scaled so that the first, the constant, gives the mean of a patch.
    """
    places = (np.arange(side) + 0.5) / side
    waves = [np.cos(np.pi * k * places) for k in range(DINO_FREQUENCIES)]
    return np.stack([np.outer(a, b) / side**2 for a in waves for b in waves]).astype(np.float32)


class _Normal:
    """Standard normal float32 tensors from a counter-based generator: equal for every version of torch."""

    def __init__(self, name: str) -> None:
        key = int(sha256_bytes(f"nanodit demo {name} {SEED}".encode())[:32], 16)
        self._generator = np.random.Generator(np.random.Philox(key=key))

    def __call__(self, *shape: int) -> torch.Tensor:
        import torch

        return torch.from_numpy(self._generator.standard_normal(shape, dtype=np.float32))
