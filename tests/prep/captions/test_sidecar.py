"""Sidecar captions: text or an error, never an empty string."""

import errno
import os
from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from prep.captions.config import CaptionConfig
from prep.captions.sidecar import MAX_BYTES, BadCaption, SidecarCaptions, usual_name
from prep.config import PrepConfig
from prep.passes.captions import caption_recipe


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"A red shirt.", "A red shirt."),
        (b"\xef\xbb\xbfA red shirt.\r\n", "A red shirt."),  # byte order mark, Windows line end
        ("Ein grünes Hemd.\n\n  Zwei Zeilen.\t".encode(), "Ein grünes Hemd. Zwei Zeilen."),
    ],
)
def test_the_caption_is_the_text_of_the_sidecar(tmp_path, content, text):
    (tmp_path / "a.b.txt").write_bytes(content)
    assert SidecarCaptions(tmp_path).caption("a.b.png").text == text


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "caption_missing"),
        (b"", "caption_empty"),
        (b"\xef\xbb\xbf \n\t", "caption_empty"),
        ("\u200b\u200d\ufeff \u2060".encode(), "caption_empty"),
        ("\u3164\u2800\u00ad".encode(), "caption_empty"),
        (b"caf\xe9", "caption_not_utf8"),
        ("A red shirt".encode("utf-16"), "caption_not_utf8"),
        ("A red shirt".encode("utf-16-le"), "caption_nul"),
        (b"a" * (MAX_BYTES + 1), "caption_too_long"),
    ],
)
def test_trap_03_a_bad_caption_is_an_error_with_a_reason(tmp_path, content, reason):
    if content is not None:
        (tmp_path / "picture.txt").write_bytes(content)
    captions = SidecarCaptions(tmp_path)
    with pytest.raises(BadCaption, match=r"picture\.txt") as error:  # trap 3
        captions.caption("picture.jpg")
    assert error.value.reason == reason
    assert captions.fingerprint("picture.jpg") == reason


def test_the_fingerprint_follows_the_bytes_of_the_sidecar(tmp_path):
    captions = SidecarCaptions(tmp_path)
    (tmp_path / "a.txt").write_text("one")
    before = captions.fingerprint("a.png")
    (tmp_path / "a.txt").write_text("two")
    assert captions.fingerprint("a.png") != before


def test_sidecars_of_nested_sources_lie_beside_them(tmp_path):
    (tmp_path / "one" / "two").mkdir(parents=True)
    (tmp_path / "one" / "two" / "x.txt").write_text("here")
    assert SidecarCaptions(tmp_path).caption("one/two/x.webp").text == "here"


@pytest.mark.parametrize("suffix", [".TXT", ".Txt"])
def test_the_case_of_the_suffix_does_not_matter(tmp_path, suffix):
    (tmp_path / f"A{suffix}").write_text("From a camera.")
    assert SidecarCaptions(tmp_path).caption("A.JPG").text == "From a camera."
    (tmp_path / "A.txt").write_text("The usual name.")
    assert SidecarCaptions(tmp_path).caption("A.JPG").text == "The usual name."


@given(st.text("a.B", min_size=1, max_size=6).filter(lambda text: text.strip(".")), st.sampled_from(["", "x/", "x.y/"]))
def test_the_usual_name_is_that_of_pathlib(name, folder):
    assert usual_name(folder + name) == str(PurePosixPath(folder + name).with_suffix(".txt"))


def test_a_link_out_of_the_source_is_not_published(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (tmp_path / "secret.txt").write_text("the content of another file")
    (source / "a.txt").symlink_to(tmp_path / "secret.txt")
    (source / "b.txt").write_text("shared by two pictures")
    (source / "c.txt").symlink_to(source / "b.txt")
    (source / "d.txt").symlink_to(source / "nowhere.txt")
    (source / "e.txt").mkdir()
    (source / "g.txt").symlink_to(source / "g.txt")
    os.mkfifo(source / "f.txt")  # reading it would wait for ever
    captions = SidecarCaptions(source)
    assert captions.caption("c.png").text == "shared by two pictures"
    reasons = {name: captions.fingerprint(f"{name}.png") for name in "adefg"}
    assert reasons == {
        "a": "outside_source",
        "d": "caption_missing",
        "e": "caption_unreadable",
        "f": "caption_unreadable",
        "g": "caption_missing",
    }


@pytest.mark.parametrize(
    ("code", "reason"),
    [(errno.ENOENT, "caption_missing"), (errno.EACCES, "caption_unreadable"), (errno.EIO, "caption_unreadable")],
)
def test_a_caption_that_is_there_and_cannot_be_read_is_not_missing(tmp_path, monkeypatch, code, reason):
    """A model would write another one over it."""
    (tmp_path / "a.txt").write_text("A red shirt.")

    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("prep.captions.sidecar.open", refuse, raising=False)
    with pytest.raises(BadCaption, match=r"a\.txt: ") as bad:
        SidecarCaptions(tmp_path).caption("a.png")
    assert bad.value.reason == reason


@pytest.mark.parametrize("host", ["ftp://a", "http://", "http://a?x=1", "http://user:secret@a:11434", "http://a:port"])
def test_hosts_must_be_urls_without_credentials(host):
    with pytest.raises(ValidationError, match="host"):
        CaptionConfig(backend="ollama", hosts=[host])
    with pytest.raises(ValidationError, match="host"):
        CaptionConfig(backend="ollama", hosts=[{"url": host, "slots": 1}])


def test_hosts_have_slots_of_their_own_or_those_of_all():
    config = CaptionConfig(backend="ollama", slots=2, hosts=["a", {"url": "https://b:1", "slots": 4}])
    assert [(host.url, host.slots) for host in config.servers] == [("a", 2), ("https://b:1", 4)]
    with pytest.raises(ValidationError, match="listed twice"):
        CaptionConfig(backend="ollama", hosts=["a", {"url": "a", "slots": 4}])


def test_trap_09_without_hosts_the_address_is_that_of_the_environment(monkeypatch):
    monkeypatch.setenv("OLLAMA_HOST", "http://192.0.2.7:11434")
    assert [host.url for host in CaptionConfig(backend="ollama").servers] == ["http://192.0.2.7:11434"]  # trap 9
    monkeypatch.setenv("OLLAMA_HOST", "")
    assert [host.url for host in CaptionConfig(backend="ollama").servers] == ["http://127.0.0.1:11434"]
    with pytest.raises(ValidationError, match="backend openai needs hosts"):
        CaptionConfig(backend="openai")


RECIPE_KEYS = {
    "backend": "openai", "model": "llava:7b", "digest": "e", "image_side": 64, "reask_temperature": 0.9,
    "min_words": 1, "max_words": 999,
    "options": {"num_ctx": 2048, "num_predict": 9, "temperature": 0.1, "seed": 3, "think": True},
}  # fmt: skip
# keys that say how captions are got and not what they are; their effects are tested in test_captioner.py
OTHER_KEYS = {"from", "overwrite", "keep_edited", "on_missing"}
OTHER_KEYS |= {"hosts", "slots", "api_key_variable", "timeout", "cool_down", "patience"}


def test_trap_09_every_key_has_an_effect(tmp_path):
    def recipe(**changes) -> dict:
        captions = {"backend": "ollama", "digest": "d", "hosts": ["http://a/v1"], **changes}
        return caption_recipe(PrepConfig(source="s", output="o", captions=CaptionConfig(**captions)))

    base = recipe()
    assert "think" not in base["options"]  # as it always was: the answers that are there keep their names
    for key, value in RECIPE_KEYS.items():
        for change in [{name: one} for name, one in value.items()] if isinstance(value, dict) else [value]:
            assert recipe(**{key: change}) != base, f"{key}: {change}"
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("Another prompt.")
    assert recipe(prompt=str(prompt)) != base
    for changes in ({"slots": 3}, {"timeout": 1.0}, {"cool_down": 1.0}, {"patience": 1.0}, {"hosts": ["b", "c"]}):
        assert recipe(**changes) == base
    short = recipe(short=True)
    assert short != base
    for changes in ({"short_prompt": str(prompt)}, {"short_min_words": 2}, {"short_max_words": 50}):
        assert recipe(short=True, **changes) != short
        assert recipe(**changes) == base
    known = {*RECIPE_KEYS, *OTHER_KEYS, "prompt", "short", "short_prompt", "short_min_words", "short_max_words"}
    assert known == set(CaptionConfig.model_fields)
