"""A dataset whose demo T5 has words of its own: prepared, described, and drawn from by texts anywhere."""

from __future__ import annotations

import pytest

from nanodit.errors import DataError
from prep.config import PrepConfig
from prep.dataset.reader import Dataset
from prep.encoders.demo import build_demo_encoders, demo_folder
from prep.encoders.registry import build_encoder, encoder_fingerprint
from prep.passes.plan import make_plan
from tests.prep.passes.test_plan import config, write_images
from tests.prep.prepared import prepare
from train.draw.request import check_encoder, encoder_config

WORDS = ["number", "picture", "zeppelin"]


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> PrepConfig:
    """What prepared a dataset of four images whose captions say "Picture number 0." and so on; the list is gone."""
    folder = tmp_path_factory.mktemp("words")
    write_images(folder / "source", 4)
    (folder / "words.txt").write_text("zeppelin picture\nnumber\n")
    settings = config(folder, layers=["text"], t5={"words": str(folder / "words.txt")})
    prepare(settings)
    return settings


def test_a_text_is_encoded_by_what_encoded_the_captions(settings, tmp_path, monkeypatch):
    dataset = Dataset(settings.output)
    layer = dataset.info["layers"]["t5"]
    assert layer["words"] == WORDS
    assert {row["t5_tokens"] for row in dataset.rows()} == {len(["Picture", "number", "▁", "0", ".", "</s>"])}
    monkeypatch.setenv("NANODIT_CACHE", str(tmp_path))  # another machine, where nothing was built
    encoder = build_encoder(encoder_config(dataset.info, {}), "t5", "cpu")
    check_encoder("t5", encoder.fingerprint(), layer["encoder"])
    folder = str(demo_folder(WORDS) / "t5")
    check_encoder("t5", encoder_fingerprint(encoder_config(dataset.info, {"t5": folder}), "t5"), layer["encoder"])
    figures = {"t5": str(build_demo_encoders(demo_folder()).t5)}
    with pytest.raises(DataError, match="did not make the training data: content"):
        check_encoder("t5", encoder_fingerprint(encoder_config(dataset.info, figures), "t5"), layer["encoder"])


def test_other_words_are_other_features(settings):
    def missing(words: list[str] | None) -> set[str]:
        plan = make_plan(settings.model_copy(update={"t5": settings.t5.model_copy(update={"words": words})}))
        return {f"{unit.layer} {why}" for unit, why in plan.missing.items()}

    assert missing([*reversed(WORDS)]) == set()
    assert missing([*WORDS, "balloon"]) == missing(None) == {"t5 changed: encoder.content"}
