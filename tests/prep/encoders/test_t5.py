"""The T5 encoder: real classes on a tiny local model, and the full-size architecture at random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from nanodit.errors import ConfigError, DataError
from prep.encoders.demo import build_t5
from prep.encoders.t5 import T5Encoder, fingerprint

SHORT = "A red ball."
LONG = "A woman in a blue jumper holds a red ball in her left hand, and " + "the wall behind her is green. " * 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("t5") / "t5"
    build_t5(
        path, ("a", "red", "blue", "green", "ball", "jumper", "woman", "holds", "in", "her", "left", "hand", "the")
    )
    return path


@pytest.fixture(scope="module")
def encoder(folder: Path) -> T5Encoder:
    return T5Encoder(folder)


def test_stores_valid_tokens_only_as_float16(encoder: T5Encoder) -> None:
    short, long = encoder.encode([SHORT, LONG])
    assert short.embedding.dtype == np.float16
    # "A", "red", "ball", "." and the end token
    assert short.embedding.shape == (5, encoder.width)
    assert long.embedding.shape == (len(encoder.tokenize(LONG)[0]), encoder.width)
    assert not short.truncated
    assert not long.truncated


def test_features_are_those_of_transformers(encoder: T5Encoder) -> None:
    ids = encoder.tokenizer(SHORT, return_tensors="pt")
    with torch.inference_mode():
        expected = encoder.model(**ids).last_hidden_state[0].numpy()
    np.testing.assert_allclose(encoder.encode([SHORT])[0].embedding, expected, atol=2e-3)


def test_padding_does_not_change_the_features(encoder: T5Encoder) -> None:
    alone = encoder.encode([SHORT])[0].embedding.astype(np.float32)
    beside_a_long_one = encoder.encode([LONG, SHORT])[1].embedding.astype(np.float32)
    np.testing.assert_allclose(beside_a_long_one, alone, atol=1e-3)


def test_equal_batches_give_equal_bytes(encoder: T5Encoder) -> None:
    first, second = (encoder.encode([SHORT, LONG]) for _ in range(2))
    assert all(a.embedding.tobytes() == b.embedding.tobytes() for a, b in zip(first, second))


def test_long_captions_are_cut_with_an_end_token_and_counted(folder: Path) -> None:
    encoder = T5Encoder(folder, max_tokens=40)
    ids, truncated = encoder.tokenize(LONG)
    assert truncated
    assert len(ids) == 40
    assert ids[-1] == encoder.tokenizer.eos_token_id
    assert ids == encoder.tokenizer(LONG, truncation=True, max_length=40)["input_ids"]
    result = encoder.encode([LONG])[0]
    assert result.truncated
    assert result.embedding.shape == (40, encoder.width)


@pytest.mark.parametrize("caption", ["", "  \n"])
def test_trap_03_an_empty_caption_is_an_error(encoder: T5Encoder, caption: str) -> None:
    with pytest.raises(DataError, match="empty caption"):
        encoder.encode([SHORT, caption])


def test_trap_03_the_mask_belongs_to_the_tokens_embedded(encoder: T5Encoder) -> None:
    # after a failure and after a longer caption, a caption has its own length and its own features
    expected = encoder.encode([SHORT])[0].embedding
    with pytest.raises(DataError):
        encoder.encode([""])
    encoder.encode([LONG])
    again = encoder.encode([SHORT])[0].embedding
    assert again.shape == (len(encoder.tokenize(SHORT)[0]), encoder.width)
    np.testing.assert_array_equal(again, expected)
    # and every row of a mixed batch too, in any order
    for captions in ([SHORT, LONG], [LONG, SHORT]):
        lengths = [len(tokens.embedding) for tokens in encoder.encode(captions)]
        assert lengths == [len(encoder.tokenize(caption)[0]) for caption in captions]


def test_fingerprint_follows_content_not_place(folder: Path, tmp_path: Path) -> None:
    words = ("a", "red")
    for name in ("one", "two"):
        build_t5(tmp_path / name, words)
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "two")
    assert fingerprint(tmp_path / "one") != fingerprint(folder)
    assert fingerprint(folder) != fingerprint(folder, max_tokens=77)
    assert str(tmp_path) not in str(fingerprint(tmp_path / "one"))
    assert fingerprint("google-t5/t5-large", "abc") != fingerprint("google-t5/t5-large", "def")


def test_a_model_that_does_not_load_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="save_pretrained"):
        T5Encoder(tmp_path)
