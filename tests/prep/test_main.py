"""The command line: verbs, exit codes, and configs that say what they mean."""

import importlib
from pathlib import Path

import pytest

from nanodit.config import load_config, walk_keys
from nanodit.errors import ConfigError, run_command
from prep.__main__ import main
from prep.config import PrepConfig

CONFIGS = Path(__file__).parents[2] / "configs" / "prep"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_is_valid(path):
    load_config(PrepConfig, path)


def test_the_base_config_says_every_key_and_its_default():
    base = load_config(PrepConfig, CONFIGS / "base.yaml")
    assert base == PrepConfig(source=base.source, output=base.output)
    text = (CONFIGS / "base.yaml").read_text()
    for key in walk_keys(PrepConfig):
        assert f"{key.rsplit('.', 1)[-1]}:" in text, key


@pytest.mark.parametrize(
    "override",
    [
        "caption_model=x",
        "captions.backend=openai",
        "base=64.5",
        "seed=-1",
        "layers=[px]",
        "layers=[]",
        "holdout=1",
        "shard_size=0",
        "t5.max_tokens=513",
        "t5.words=words.txt",
        "t5.words=[]",
    ],
)
def test_what_has_no_effect_is_an_error(override):
    with pytest.raises(ConfigError):  # trap 9: every key in a config has an effect or is an error
        load_config(PrepConfig, CONFIGS / "base.yaml", [override])


def test_text_brings_its_features_and_pixels_are_always_there():
    def layers(value):
        return PrepConfig(source="a", output="b", layers=value).active_layers

    assert layers(["text", "dino", "pose"]) == ("px", "text", "t5", "dino", "pose")
    assert layers(["pose", "text"]) == ("px", "text", "t5", "pose")


def test_figures_are_written(tmp_path, capsys):
    assert main(["figures", str(tmp_path / "figures"), "--count", "2", "--size", "64", "--seed", "3"]) == 0
    assert len(list((tmp_path / "figures").glob("*.png"))) == 2
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote 2 figures to {tmp_path / 'figures'}"


@pytest.mark.parametrize(
    ("prepare", "overrides", "code", "message"),
    [
        (None, [], 2, "is not a folder"),
        ("empty", [], 3, "holds no images"),
        ("empty", ["output=a.png"], 2, "a.png is a file, not a folder"),
        ("empty", ["output=s3:/bucket/name"], 2, "neither a folder nor the URL"),
        ("empty", ["output=source/inside"], 2, "must not lie inside each other"),
        ("empty", ["base=72"], 2, "seven distinct buckets"),
    ],
)
def test_bad_input_ends_with_its_exit_code(tmp_path, monkeypatch, capsys, prepare, overrides, code, message):
    monkeypatch.chdir(tmp_path)
    if prepare:
        Path("source").mkdir()
        Path("source", "notes.txt").touch()
        Path("source", "._notes.txt").touch()
    Path("a.png").touch()
    for verb in ("plan", "run"):
        arguments = [verb, "source=source", "output=out", *overrides]
        assert run_command(lambda words=arguments: main(words)) == code
        assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("index.parquet"))
    assert code == 3 or not list(tmp_path.rglob("runs"))  # wrong usage leaves nothing behind


@pytest.mark.parametrize(
    ("package", "arguments"),
    [
        ("prep", ["run", "source=source", "output=out", "--prun"]),
        ("prep", ["figures", "out", "--coun", "2", "--size", "64"]),
        ("prep", ["verify", "--data", "out"]),
        ("train", ["run", "--conf", "x.yaml"]),
        ("train", ["sample", "--check", "x", "--prompt", "x", "--output", "x.png"]),
        ("evaluate", ["run", "--check", "x"]),
        ("evaluate", ["report", "x", "--out", "x.html"]),
    ],
)
def test_the_beginning_of_an_option_is_no_option(package, arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"{package}.__main__").main(arguments)
    assert ended.value.code == 2
    assert "required" in (error := capsys.readouterr().err) or "unrecognized arguments" in error
