"""Edits of captions of people and photographs: enough of them, by whole words; and the user's own pairs."""

import re
from collections import Counter
from pathlib import Path

import pytest

from evaluate.config import EvaluateConfig
from evaluate.drawing.edits import choose
from evaluate.drawing.vocabulary import TYPES, VOCABULARY, Swap, load_pairs
from evaluate.suite import edit
from nanodit.errors import ConfigError
from nanodit.files import canonical_json, sha256_bytes
from prep.figures.figures import draw_figure
from tests.evaluate.suite.test_edit import make_context

CAPTIONS = Path(__file__).with_name("captions.txt").read_text(encoding="utf-8").strip().split("\n\n")


def every(caption, type="attribute", own=()):
    """All edits that any key gets."""
    found = [choose(caption, type, f"sample {number}", own) for number in range(80)]
    return {one.text for one in found if one is not None}


def test_the_words_of_the_original_recipe_work():
    assert "A blonde woman smiles." in every("A brunette woman smiles.")
    assert "She is a brunette." in every("She is a blonde.")
    caption = "A brunette woman in a red shirt stands in an alley."
    assert {
        "A blonde woman in a red shirt stands in an alley.",
        "A brunette woman in a blue shirt stands in an alley.",
    } <= (every(caption))


def test_nine_of_ten_dense_captions_of_photographs_have_an_edit():
    assert len(CAPTIONS) == 20
    assert all(130 <= len(caption.split()) <= 180 for caption in CAPTIONS), [len(one.split()) for one in CAPTIONS]
    kinds = {type: Counter() for type in TYPES}
    for type in TYPES:
        edited = 0
        for number, caption in enumerate(CAPTIONS):
            found = [choose(caption, type, f"{number} {place}") for place in range(20)]
            edited += found[0] is not None
            kinds[type].update({one.kind for one in found if one is not None})
        print(f"{type}: {edited} of 20: {', '.join(f'{kind} {count}' for kind, count in kinds[type].most_common())}")
        assert edited >= 18, type
    assert len(kinds["attribute"]) >= 12
    assert {"light", "framing", "age", "posture", "hair"} <= set(kinds["opposite"])


def test_edits_of_them_are_by_whole_words_and_keep_articles_and_capitals():
    for number, caption in enumerate(CAPTIONS):
        for type in TYPES:
            for place in range(20):
                one = choose(caption, type, f"{number} {place}")
                if one is None:
                    continue
                assert one.text != caption
                assert not re.search(r"\ba [aeio]", one.text.replace("a one", "")), one.text
                assert not re.search(r"\ban [bcdfgjklmnpqrstvwxyz]", one.text), one.text
                for start, end, new in one.replacements:
                    around = caption[start - 1 : start] + caption[end : end + 1]
                    assert not re.search(r"[\w-]", around), (caption[start:end], around)
                    assert new[0].isupper() == caption[start].isupper()


@pytest.mark.parametrize(
    ("caption", "type", "texts"),
    [
        ("Covered in dust, the table stands there.", "attribute", set()),  # no red in covered
        ("Outstanding tanned people.", "attribute", set()),  # no tan
        ("A softlight.", "opposite", set()),
        ("Brunette, she smiles.", "attribute", {"Blonde, she smiles."}),
        ("An elderly man waves.", "opposite", {"A young man waves."}),
        ("A woman in her sixties.", "opposite", {"A woman in her twenties."}),
        ("A soft light falls on snow.", "opposite", {"A harsh light falls on snow."}),
        ("The walls are soft.", "opposite", set()),
        ("A dog and another dog.", "attribute", {"A cat and another cat."}),
        ("A low-angle view.", "opposite", set()),
        ("A close-up portrait.", "opposite", {"A wide-angle portrait."}),
        ("A black and white vase.", "attribute", set()),  # of two colours
        ("She is seated.", "opposite", {"She is standing."}),
        ("An indoor scene.", "opposite", {"An outdoor scene."}),
    ],
)
def test_words_need_what_they_are_said_of(caption, type, texts):
    assert every(caption, type) == texts


def test_every_word_has_others_of_its_own_type():
    for swap in VOCABULARY:
        assert swap.type in TYPES
        assert swap.others
        assert swap.word not in swap.others
    assert {"hair colour", "hair", "clothing", "colour", "age", "light", "framing", "object"} <= {
        swap.kind for swap in VOCABULARY
    }


def test_the_figures_edits_are_those_before_there_was_a_vocabulary():
    """Of 60 figures, both styles of caption and all types: as the rules chose them when only figures had rules."""
    found = []
    for index in range(60):
        for short in (True, False):
            caption = draw_figure(3, index, 32, short).caption
            for type in ("attribute", "opposite", "paraphrase"):
                one = choose(caption, type, f"figure {index}")
                found.append([type, one and one.text])
    assert (
        sha256_bytes(canonical_json(found).encode())
        == "bd58a1507bc2c346c3f2e895fe455799591913901eedb2a81df0a4bf094b9e3a"
    )


# --- the user's own pairs


def write(tmp_path, text):
    file = tmp_path / "pairs.yaml"
    file.write_text(text, encoding="utf-8")
    return str(file)


def test_pairs_are_a_mapping_or_a_list(tmp_path):
    expected = (Swap("own pair", "attribute", "brunette", ("blonde",)), Swap("own pair", "attribute", "no", ("a red",)))
    assert load_pairs(write(tmp_path, "brunette: blonde\nno: a red\n")) == expected
    assert load_pairs(write(tmp_path, "- [brunette, blonde]\n- {from: no, to: a red}\n")) == expected
    (one,) = load_pairs(write(tmp_path, "- {from: by day, to: by night, type: opposite}\n"))
    assert one.type == "opposite"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: b\nc:\n", r"line 2: `to` must be words"),
        ("a: b\n\nc: [d]\n", r"line 3: `to` must be words"),
        ("a: b\na: c\n", r"line 2: a is there twice"),
        ("a: A\n", r"line 1: a is replaced by itself"),
        ("- [a, b]\n- [c]\n", r"line 2: write \[FROM, TO\]"),
        ("- {from: a, to: b}\n- {from: a, too: b}\n", r"line 2: write"),
        ("- {from: a, to: b, type: colour}\n", r"line 1: unknown type colour; known: attribute, opposite"),
        ("a: b\n  c: d\n", r"line 2: not YAML"),
        ("just words\n", r"line 1: write pairs"),
        ("", r"line 1: write pairs"),
        ("[]\n", r"holds no pair"),
    ],
)
def test_errors_name_the_line(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_pairs(write(tmp_path, text))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"edit\.edits: .*none\.yaml: No such file"):
        load_pairs(str(tmp_path / "none.yaml"))


def test_own_pairs_go_before_the_vocabulary_and_leave_other_captions_to_it():
    own = (Swap("own pair", "attribute", "red shirt", ("kimono",)),)
    assert every("A brunette woman in a Red  shirt.", own=own) == {"A brunette woman in a Kimono."}
    assert every("A brunette woman.", own=own) == {"A blonde woman."}
    assert every("He is standing by a red shirtfront.", own=own) == set()


def test_the_test_takes_them_and_says_so_in_the_settings(judged, tmp_path):
    file = write(tmp_path, "zebra: robot\n")
    config = EvaluateConfig.model_validate({"edit": {"edits": file}}).edit
    context = make_context(judged)
    keys = context.keys
    context.rows = {key: row | {"caption": f"A zebra. {row['caption']}"} for key, row in context.rows.items()}
    pictures, _ = edit.pictures(context, config)
    texts = {one.key: one.text for one in pictures if one.condition == "edit/attribute"}
    assert set(texts) == set(keys)
    assert all(text.startswith("A robot. ") for text in texts.values())
    asked = edit._ask(context, config)
    assert asked.counts("attribute")["own_pairs"] == sha256_bytes(Path(file).read_bytes())[:16]
    assert "own_pairs" not in edit._ask(context, context.config.edit).counts("attribute")


def test_settings_say_which_vocabulary_edited_photographs_and_stay_those_of_before_for_figures(judged, monkeypatch):
    context = make_context(judged)
    assert "vocabulary" not in edit._ask(context, context.config.edit).counts("attribute")
    context.rows = {key: row | {"caption": f"A zebra. {row['caption']}"} for key, row in context.rows.items()}
    now = edit._ask(context, context.config.edit).counts("attribute")["vocabulary"]
    monkeypatch.setattr(edit, "VOCABULARY", VOCABULARY[1:])
    assert edit._ask(context, context.config.edit).counts("attribute")["vocabulary"] not in (now, "")
