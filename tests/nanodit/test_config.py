"""The strict loader: every mistake is refused with file, path and nearest name."""

from __future__ import annotations

import math
import os
from typing import Literal

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import Field

from nanodit.config import Config, Place, dump_config, load_config, override_text, parse_yaml, walk_keys
from nanodit.errors import ConfigError
from prep.config import PrepConfig


class Inner(Config):
    lr: float = Field(default=3e-4, gt=0)
    steps: int = 10
    name: str | None = None


class Outer(Config):
    inner: Inner = Inner()
    seed: int = 0
    enabled: bool = False
    tags: list[str] = Field(default=[])
    bars: dict[str, float] = Field(default={})
    out: str


def write(folder, text, name="config.yaml"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_numbers_are_numbers(tmp_path):
    config = load_config(Outer, write(tmp_path, "out: x\ninner: {lr: 3e-4, steps: 7}\n"), ["inner.lr=1e-3"])
    assert config.inner.lr == 1e-3
    assert config.inner.steps == 7


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("out: x\ninner: {lrr: 1.0}", "unknown key `inner.lrr`; did you mean `inner.lr`?"),
        ("out: x\nlr: 1.0", "unknown key `lr`; did you mean `inner.lr`?"),
        ("out: x\nseeds: 1", "did you mean `seed`?"),
        ("out: x\nenabled: 'false'", "`enabled`"),
        ("out: x\nenabled: no", "`enabled`"),
        ("out: x\nseed: 1.5", "`seed`"),
        ("out: x\nseed: '1'", "`seed`"),
        ("out: x\ninner: {lr: -1.0}", "`inner.lr`"),
        ("out: x\ninner: {lr: 1:30}", "`inner.lr`"),
        ("out: x\ninner: {lr: .inf}", "`inner.lr`: Input should be a finite number"),
        ("out: x\nbars: {a: .nan}", "`bars.a`: Input should be a finite number"),
        ("out: x\ninner:", "`inner`"),
        ("out: x\nout: y", "duplicate key 'out'"),
        ("out: !!python/object/apply:os.system [true]", "only plain YAML"),
        ("out: !custom x", "only plain YAML"),
        ("out: x\n  seed: 1", "not valid YAML"),
        ("[1, 2]", "a config must be a mapping"),
        ("seed: 1", "`out` is required"),
        ("out: x\n1: 2", "key 1 is not text"),
        ("extends: nowhere.yaml\nout: x", "nowhere.yaml"),
    ],
)
def test_mistakes_are_refused_by_name(tmp_path, text, expected):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(Outer, path)
    assert expected in str(caught.value)
    assert ".yaml" in str(caught.value)
    assert caught.value.exit_code == 2


@given(st.text(alphabet=st.characters(codec="ascii", categories=["Ll", "Lu"]), min_size=1, max_size=12))
def test_any_unknown_key_is_refused(key):
    if key in Outer.model_fields:
        return
    with pytest.raises(ConfigError, match=rf"`{key}`|null|true|false|not text"):
        load_config(Outer, None, ["out=x", f"{key}=1"])


def test_inheritance_merges_sections_and_blames_the_right_file(tmp_path):
    write(tmp_path, "out: base\nseed: 3\ninner: {lr: 0.1, steps: 5}\n", "base.yaml")
    child = write(tmp_path, "extends: base.yaml\ninner: {steps: 6}\n")
    config = load_config(Outer, child)
    assert (config.out, config.seed, config.inner.lr, config.inner.steps) == ("base", 3, 0.1, 6)
    write(tmp_path, "out: base\ninner: {lrr: 0.1}\n", "base.yaml")
    with pytest.raises(ConfigError, match=r"base\.yaml: unknown key `inner\.lrr`"):
        load_config(Outer, child)


def test_a_mapping_with_keys_of_the_users_is_replaced_and_not_merged(tmp_path):
    write(tmp_path, "out: base\nbars: {text: 0.5, pose: high}\n", "base.yaml")
    child = write(tmp_path, "extends: base.yaml\nbars: {text: 0.9}\n")
    assert load_config(Outer, child).bars == {"text": 0.9}
    assert load_config(Outer, child, ["bars.pose=0.1"]).bars == {"text": 0.9, "pose": 0.1}
    child = write(tmp_path, "extends: base.yaml\nbars: {pose: low}\n")
    with pytest.raises(ConfigError, match=r"config\.yaml: `bars\.pose`"):
        load_config(Outer, child)
    with pytest.raises(ConfigError, match=r"base\.yaml: `bars\.pose`"):
        load_config(Outer, write(tmp_path, "extends: base.yaml\nseed: 1\n"))


def test_circular_inheritance_is_refused(tmp_path):
    write(tmp_path, "extends: b.yaml\n", "a.yaml")
    write(tmp_path, "extends: a.yaml\n", "b.yaml")
    with pytest.raises(ConfigError, match="circle"):
        load_config(Outer, tmp_path / "a.yaml")


@pytest.mark.parametrize("override", ["seed", "=1", "inner..lr=1", "seed.x=1", "inner.lr.x=1"])
def test_malformed_overrides_are_refused(override):
    with pytest.raises(ConfigError):
        load_config(Outer, None, ["out=x", "seed=1", "inner.lr=1.0", override])


NAMES = [
    "r/try #2",
    "2024",
    "007",
    "1e5",
    "[v2] pics",
    "{x}",
    "a: b",
    "@home",
    "'q",
    "~",
    '"q"',
    "|",
    "- a",
    "null",
    " a ",
    "&a",
]


@given(st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Cn"])))
@example("a=b")
def test_text_is_taken_as_it_is(text):
    if yaml.reader.Reader.NON_PRINTABLE.search(text) or not text.strip():
        return
    assert load_config(Outer, None, [f"out={text}"]).out == text
    assert load_config(Outer, None, ["out=x", f"inner.name={text}"]).inner.name == (None if text == "null" else text)


@pytest.mark.parametrize("name", NAMES)
def test_names_of_folders_are_taken_as_they_are(name):
    assert load_config(Outer, None, [override_text("out", name)]).out == name
    assert load_config(Outer, None, ["out=x", override_text("tags", [name])]).tags == [name]


@pytest.mark.parametrize("text", ["", " ", "\t"])
def test_a_variable_that_a_shell_does_not_have_is_no_text(text):
    with pytest.raises(ConfigError, match="`out`: Input should be a valid string, got None"):
        load_config(Outer, None, [f"out={text}"])
    assert load_config(Outer, None, ["out=x", f"inner.name={text}"]).inner.name is None


class Mixed(Config):
    noise: Literal["auto", "host"] = "auto"
    workers: Literal["auto"] | int = "auto"
    place: Place | None = None


def test_only_text_alone_is_taken_as_it_is():
    mixed = load_config(Mixed, None, ["noise='host' ", "workers=3", "place=~/a #1"])
    assert (mixed.noise, mixed.workers, mixed.place) == ("host", 3, os.path.expanduser("~/a #1"))
    assert load_config(Mixed, None, ["workers=auto", "place=null"]) == Mixed()
    with pytest.raises(ConfigError, match="workers"):
        load_config(Mixed, None, ['workers="3"'])


BOMB = "out: x\na0: &a0 [1, 1]\n" + "".join(
    f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (BOMB, "aliases stand for more than 100,000 values"),
        ("out: x\ntags: &a [*a]", "aliases stand for more than 100,000 values"),
        ("out: x\nseed: " + "7" * 5000, "config.yaml:2: an integer of 5000 digits"),
        ("out: 'a\x07b'", r"control character '\x07' at position 7"),
        ("out: 'a\x1b[2Jb'", r"control character '\x1b' at position 7"),
    ],
)
def test_hostile_files_are_refused_at_once(tmp_path, text, expected):
    with pytest.raises(ConfigError) as caught:
        load_config(Outer, write(tmp_path, text))
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("out=a\x07b", r"override out: control character '\x07'"),
        ("seed=\x00", r"override seed: control character '\x00'"),
        ("out=caf\udce9", r"override out: not UTF-8 text: 'caf\udce9'"),
        ("seed=" + "7" * 5000, "an integer of 5000 digits"),
    ],
)
def test_hostile_overrides_are_refused(override, expected):
    with pytest.raises(ConfigError) as caught:
        load_config(Outer, None, ["out=x", override])
    assert expected in str(caught.value)


@example(Outer(out="\x85"))
@given(
    st.builds(
        Outer,
        inner=st.builds(Inner, lr=st.floats(min_value=1e-30, max_value=1e30), steps=st.integers(), name=st.text()),
        out=st.text(),
        tags=st.lists(st.text()),
    )
)
def test_a_dumped_config_reads_back_equal(config):
    assert Outer.model_validate(parse_yaml(dump_config(config), "dump")) == config


def test_plain_yaml_libraries_read_the_dump_alike():
    config = Outer(out="3e-4", inner=Inner(lr=3e-4, name="no"))
    data = yaml.safe_load(dump_config(config))
    assert data["out"] == "3e-4"
    assert data["inner"]["name"] == "no"
    assert math.isclose(float(data["inner"]["lr"]), 3e-4)


def test_walk_lists_every_leaf():
    assert walk_keys(Outer) == ["inner.lr", "inner.steps", "inner.name", "seed", "enabled", "tags", "bars", "out"]


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    config = load_config(PrepConfig, None, ["source=~/photos", "output=s3://bucket/name"])
    assert (config.source, config.output) == ("/home/somebody/photos", "s3://bucket/name")
