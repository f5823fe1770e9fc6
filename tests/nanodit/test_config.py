"""The strict loader: every mistake is refused with file, path and nearest name."""

from __future__ import annotations

import math

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import Field

from nanodit.config import Config, dump_config, load_config, parse_yaml, walk_keys
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
