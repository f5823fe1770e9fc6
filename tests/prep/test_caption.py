"""Sidecar captions: text or an error, never an empty string."""

import os

import pytest

from prep.caption import MAX_BYTES, BadCaption, SidecarCaptions


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
