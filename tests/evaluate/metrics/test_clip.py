"""The CLIP probe: the real model class with tiny random weights, and nothing without its files."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizerFast

from evaluate import run
from evaluate.metrics.clip import NO_PROBE, open_probe
from evaluate.metrics.examiner import Examiner
from evaluate.records import MODEL, REAL
from evaluate.subject import read_batch
from evaluate.suite import edit
from nanodit.errors import ConfigError
from tests.evaluate.suite.test_edit import LABELS, make_context

LETTERS = sorted("amninredblugshitow.,")
LAYERS = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIP of a few thousand weights, saved as the published ones are."""
    folder = tmp_path_factory.mktemp("tiny-clip")
    letters = list(dict.fromkeys(LETTERS))
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    ends = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1, "pad_token_id": len(tokens) - 1}
    text = {**LAYERS, **ends, "vocab_size": len(tokens), "max_position_embeddings": 77}
    vision = {**LAYERS, "image_size": 32, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(folder)
    CLIPTokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def probe(folder):
    probe, reason = open_probe(str(folder), "cpu")
    assert reason is None
    return probe


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(0).integers(0, 256, (3, 48, 40, 3), np.uint8)


def test_finished_batches_are_those_of_these_files(folder, figures, tmp_path, monkeypatch, make_subject, quick):
    """Another file under the same name is another judge, which does not go on with what was scored by the first."""
    copy = tmp_path / "clip"
    shutil.copytree(folder, copy)
    asked = []

    def stop(folder, identity):
        asked.append(identity)
        raise InterruptedError

    monkeypatch.setattr(run, "FinishedBatches", stop)
    config = quick.model_copy(update={"probe": str(copy)})
    for _ in range(2):
        with pytest.raises(InterruptedError):
            run.evaluate(make_subject("noise"), config, tmp_path / "out", identity={"weights": "same"})
        (copy / "merges.txt").write_text("#version: 0.3\n")
    first, second = (one["contents"] for one in asked)
    assert first.pop("probe") != second.pop("probe")
    assert first == second
    assert {"features", "joints"} <= first.keys()


def test_features_and_preference_are_clips_own(folder, probe, pictures):
    features = probe.features(pictures)
    assert np.linalg.norm(features, axis=1) == pytest.approx(1, abs=1e-5)
    pairs = [("a man in a red shirt", "a man in a blue shirt"), ("a red shirt", "a green shirt"), ("red", "blue")]
    preference = probe.preference(features, pairs)
    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizerFast.from_pretrained(folder)
    processor = CLIPImageProcessor.from_pretrained(folder)
    for picture, pair, value in zip(pictures, pairs, preference):
        inputs = tokenizer(list(pair), padding=True, return_tensors="pt")
        pixels = processor(images=[picture], return_tensors="pt", input_data_format="channels_last")
        with torch.no_grad():
            logits = model(**inputs, **pixels).logits_per_image[0]
        assert value == pytest.approx(float(logits.softmax(0)[1]), abs=1e-4)
    assert probe.preference(features, [pair[::-1] for pair in pairs]) == pytest.approx(1 - preference, abs=1e-9)


def test_a_picture_is_seen_alike_in_any_batch(probe, pictures):
    alone = np.concatenate([probe.features(pictures[index : index + 1]) for index in range(3)])
    assert probe.features(pictures) == pytest.approx(alone, abs=1e-5)


def test_long_phrases_are_cut_and_counted(probe):
    assert np.isfinite(probe.texts(["red shirt " * 100])).all()
    fits = "a" * 75  # a token each, between the two that begin and end a text
    assert np.array_equal(probe.texts([fits + "b"]), probe.texts([fits + "m"]))
    assert (probe.cut([fits]), probe.cut([fits + "b", fits, "red shirt " * 100])) == (0, 2)


def test_captions_are_scored_by_the_mean_over_their_sentences(folder, probe, pictures, caplog):
    """Against transformers' own: what stands behind CLIP's 77 tokens of a whole caption counts here."""
    captions = ["A man in a red shirt.", "A man in blue. Behind him a wall! Is it red?", "red " * 60 + "A wall. Blue."]
    scores = np.einsum("bd,bd->b", probe.features(pictures), probe.captions(captions))
    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizerFast.from_pretrained(folder)
    processor = CLIPImageProcessor.from_pretrained(folder)
    sentences = [
        captions[:1],
        ["A man in blue.", "Behind him a wall!", "Is it red?"],
        ["red " * 60 + "A wall.", "Blue."],
    ]
    for picture, own, score in zip(pictures, sentences, scores):
        inputs = tokenizer(
            [one.strip() for one in own], padding=True, truncation=True, max_length=77, return_tensors="pt"
        )
        pixels = processor(images=[picture], return_tensors="pt", input_data_format="channels_last")
        with torch.no_grad():
            logits = model(**inputs, **pixels).logits_per_image[0] / model.logit_scale.exp()
        assert score == pytest.approx(float(logits.mean()), abs=1e-5)
    long = "red " * 80
    behind = [probe.captions([f"{long}. {end}"]) for end in ("Blue.", "A man in a shirt.")]
    assert not np.allclose(*behind, atol=1e-4)
    assert np.array_equal(*(probe.texts([f"{long}. {end}"]) for end in ("Blue.", "A man in a shirt.")))
    assert np.isfinite(probe.captions([""])).all()


def test_without_its_files_there_is_none(tmp_path):  # E04
    assert open_probe(None, "cpu") == (None, NO_PROBE)
    probe, reason = open_probe("somebody/a-clip-that-is-not-here", "cpu")
    assert probe is None
    assert "neither a folder nor in the hub's cache" in reason
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="CLIP"):
        open_probe(str(tmp_path), "cpu")


class Believes:
    """Finds in every picture what its only number says: 1 is the new phrase."""

    label = "believer"

    def cut(self, phrases):
        return sum(len(phrase) > 100 for phrase in phrases)

    def preference(self, features, phrases):
        assert all(old != new for old, new in phrases)
        return features[:, 0]


def test_edits_are_held_against_the_unedited_picture(judged, known_pictures):
    context = make_context(judged)
    context.probe = Believes()
    rows = judged.rows({(label, 0): known_pictures["truth"] for label in LABELS})
    for number, row in enumerate(rows.select(MODEL, "text")):
        row["feature_probe"] = np.float32([0.2 + 0.01 * (number % 3)])
    for label in LABELS[1:]:
        for row in rows.select(MODEL, label):
            row["feature_probe"] = np.float32([0.9 if label == "edit/attribute" else 0.21])
    metrics, _ = edit.summarise(rows, context, context.config.edit)
    found = {metric.name: metric for metric in metrics}
    assert found["edit/direction_probe"].value == pytest.approx(0.69)
    assert found["edit/direction_probe"].low > 0.6
    assert found["edit/direction_probe/opposite"].value == pytest.approx(0, abs=1e-6)
    assert found["edit/direction_probe"].settings["probe"] == "believer"
    assert found["edit/direction_probe"].settings["phrases_cut"] >= 0
    assert found["edit/direction_probe"].baselines == {"no_edit": 0.0}


def test_the_examiner_keeps_what_the_probe_saw_of_drawn_pictures(figures, probe):
    rows = figures.rows("holdout")
    batch = read_batch(figures, tuple(row for row in rows if row["bucket"] == rows[0]["bucket"]))
    examiner = Examiner(figures, None, None, None, probe)
    drawn = examiner.rows(batch, batch.pixels, kind=MODEL, condition="text", seed=0, joints=[])
    assert np.stack([row["feature_probe"] for row in drawn]) == pytest.approx(probe.features(batch.pixels), abs=1e-5)
    real = examiner.rows(batch, batch.pixels, kind=REAL, condition="real", joints=[])
    assert {row["feature_probe"] is None for row in real} == {True}
