"""Invocations that a tired or hostile user may type: each ends with its exit code and a sentence, never a traceback."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from nanodit.cli import main
from tests.train.tiny import write_config, write_dataset
from train.__main__ import main as train

BOMB = "a0: &a0 [1, 1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a dataset, a finished run, its export, a damaged evaluation, and files of all kinds."""
    folder = tmp_path_factory.mktemp("hostile")
    write_dataset(folder / "dataset")
    write_config(folder / "c.yaml", folder / "dataset", folder / "run")
    assert train(["run", "--config", str(folder / "c.yaml"), "train.steps=3"]) == 0
    assert train(["export", "--checkpoint", str(folder / "run"), "--output", str(folder / "export")]) == 0
    (folder / "empty").mkdir()
    (folder / "images").mkdir()
    (folder / "file").write_text("text")
    (folder / "binary.yaml").write_bytes(bytes(range(256)))
    (folder / "bomb.yaml").write_text(BOMB)
    (folder / "deep.yaml").write_text("[" * 5000 + "]" * 5000)
    (folder / "digits.yaml").write_text("seed: " + "9" * 5000)
    (folder / "list.yaml").write_text("- a\n")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "pose.json").write_text("[1, 2")
    (folder / "latin.txt").write_bytes(b"caf\xe9\n")
    (folder / "text.png").write_text("not a picture")
    os.mkfifo(folder / "fifo.yaml")
    damaged = folder / "damaged"
    (damaged / "validation_outputs" / "step-000003").mkdir(parents=True)
    (damaged / "validation_outputs" / "step-000003" / "report.json").write_text("{")
    shutil.copytree(folder / "run", folder / "cut")
    model = folder / "cut" / "checkpoints" / "step-000003" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:100])
    shutil.copytree(folder / "run", folder / "state")
    (folder / "state" / "checkpoints" / "step-000003" / "state.json").write_text("null")
    shutil.copytree(folder / "dataset", folder / "nulls")
    info = json.loads((folder / "nulls" / "dataset.json").read_text())
    (folder / "nulls" / "dataset.json").write_text(json.dumps(dict.fromkeys(info)))
    shutil.copytree(folder / "dataset", folder / "no index")
    (folder / "no index" / "index.parquet").write_bytes(b"PAR1")
    return folder


RUN = ["train", "run", "--config", "c.yaml"]
SAMPLE = ["train", "sample", "--checkpoint", "run", "--output", "x.png"]
EVALUATE = ["evaluate", "run", "--checkpoint"]
PREP = ["prep", "plan", "source=images", "output=out"]

HOSTILE = [
    # what the command line holds
    ([], 2, "required: COMMAND"),
    (["draw"], 2, "invalid choice: 'draw'"),
    (["train"], 2, "required: VERB"),
    (["train", "run"], 2, "required: --config"),
    ([*RUN, "train.step=3"], 2, "did you mean `train.steps`?"),
    ([*RUN, "train.steps"], 2, "is not of the form dotted.path=value"),
    ([*RUN, "train.steps=many"], 2, "`train.steps`"),
    ([*RUN, "train.steps=-1"], 2, "`train.steps`"),
    ([*RUN, "train.steps=1e3"], 2, "`train.steps`"),
    ([*RUN, "train.steps=" + "9" * 5000], 2, "an integer of 5000 digits"),
    ([*RUN, "train.lr=.inf"], 2, "`train.lr`"),
    ([*RUN, "train.lr=nan"], 2, "`train.lr`"),
    ([*RUN, "train.phases=[[["], 2, "not valid YAML"),
    ([*RUN, "train.phases=&a [*a]"], 2, "aliases stand for more than"),
    ([*RUN, "output=a\x00b"], 2, "control character '\\x00'"),
    ([*RUN, "output=caf\udce9"], 2, "not UTF-8 text"),
    ([*RUN, "train=null"], 2, "`train`"),
    ([*RUN, "=3"], 2, "is not of the form"),
    ([*RUN, "--max-hours", "0"], 2, "must be more than 0"),
    ([*RUN, "--resume", "nowhere"], 2, "nowhere"),
    ([*RUN, "--resume", "never"], 2, "already holds a run"),
    ([*RUN, "--dataset-version", "old"], 2, "invalid choice"),
    # config files
    (["train", "run", "--config", "nowhere.yaml"], 2, "nowhere.yaml: cannot be read as a config"),
    (["train", "run", "--config", "."], 2, "cannot be read as a config: Is a directory"),
    (["train", "run", "--config", "loop"], 2, "cannot be read as a config"),
    (["train", "run", "--config", "binary.yaml"], 2, "not UTF-8 text"),
    (["train", "run", "--config", "bomb.yaml"], 2, "aliases stand for more than"),
    (["train", "run", "--config", "deep.yaml"], 2, "deep.yaml"),
    (["train", "run", "--config", "digits.yaml"], 2, "digits.yaml:1: an integer of 5000 digits"),
    (["train", "run", "--config", "list.yaml"], 2, "must be a mapping"),
    # places
    ([*RUN, "output=file"], 4, "error: file: File exists"),
    ([*RUN, "output=file/run"], 4, "error: file/run: Not a directory"),
    ([*RUN, "output=loop/run"], 4, "Too many levels of symbolic links"),
    ([*RUN, "output="], 2, "`output`: Input should be a valid string, got None"),
    (["prep", "run", "source=", "output="], 2, "`source`: Input should be a valid string, got None"),
    ([*RUN, "dataset=empty", "output=new"], 3, "is not a finished dataset"),
    ([*RUN, "dataset=nowhere", "output=new"], 3, "is not a finished dataset"),
    ([*RUN, "dataset=file", "output=new"], 2, "is a file, not a folder"),
    ([*RUN, "dataset=ftp://host/x", "output=new"], 2, "cannot read ftp URLs"),
    ([*RUN, "dataset=s3:/bucket/x", "output=new"], 2, "neither a folder nor the URL"),
    ([*RUN, "dataset=nulls", "output=new"], 3, "dataset.json"),
    ([*RUN, "dataset=no index", "output=new"], 3, "index.parquet"),
    # drawing
    ([*SAMPLE], 2, "nothing to draw from"),
    ([*SAMPLE, "--prompt", "  "], 2, "--prompt: is empty"),
    ([*SAMPLE, "--prompt", "a\x07b"], 2, "--prompt: control character"),
    ([*SAMPLE, "--prompt", "caf\udce9"], 2, "--prompt: not UTF-8 text"),
    ([*SAMPLE, "--prompts", "latin.txt"], 2, "not UTF-8 text"),
    ([*SAMPLE, "--prompt", "x", "--seed", "-1"], 2, "must be 0 or more"),
    ([*SAMPLE, "--prompt", "x", "--steps", "0"], 2, "steps 0: must be at least 1"),
    ([*SAMPLE, "--prompt", "x", "--output", "empty"], 2, "must be a file named *.png"),
    ([*SAMPLE, "--prompt", "x", "--output", "file/x.png"], 2, "file is not a folder"),
    ([*SAMPLE, "--pose", "pose.json"], 3, "pose.json"),
    ([*SAMPLE, "--reference", "text.png"], 3, "text.png"),
    ([*SAMPLE, "--reference", "nowhere.png"], 2, "nowhere.png"),
    ([*SAMPLE, "--key", "nobody"], 2, "nobody"),
    (["train", "sample", "--checkpoint", "empty", "--prompt", "x", "--output", "x.png"], 2, "neither a checkpoint"),
    (["train", "sample", "--checkpoint", "cut", "--prompt", "x", "--output", "x.png"], 3, "cut"),
    (["train", "sample", "--checkpoint", "state", "--prompt", "x", "--output", "x.png"], 3, "state"),
    (["train", "export", "--checkpoint", "run", "--output", "export"], 2, "already exists"),
    (["train", "export", "--checkpoint", "run", "--output", "file/export"], 2, "file is not a folder"),
    # evaluation and preparation
    ([*EVALUATE, "empty"], 2, "neither a checkpoint"),
    ([*EVALUATE, "run", "--output", "file"], 2, "is a file; name a folder"),
    ([*EVALUATE, "run", "tests=[beauty]"], 2, "tests"),
    ([*EVALUATE, "run", "samples=0"], 2, "samples"),
    (["evaluate", "report", "damaged"], 3, "report.json"),
    (["evaluate", "report", "empty"], 2, "no report.json"),
    (["prep", "report", "--dataset", "dataset", "--output", "empty"], 2, "is a folder; name a file"),
    ([*PREP], 3, "holds no images"),
    (["prep", "plan", "source=nowhere", "output=out"], 2, "is not a folder"),
    (["prep", "plan", "source=images", "output=images/out"], 2, "must not lie inside each other"),
    ([*PREP, "base=100"], 2, "base"),
    (["prep", "report", "--dataset", "empty"], 3, "is not a finished dataset"),
    (["prep", "report", "--dataset", "dataset", "--source", "file"], 2, "--source file: is not a folder"),
    (["prep", "verify", "--dataset", "nulls"], 3, "nulls: published files are damaged"),
    (["prep", "versions", "dataset", "--older-than", "soon"], 2, "soon"),
    (["prep", "versions", "dataset", "--drop", "zz"], 2, "zz"),
    (["prep", "figures", "file", "--count", "1", "--size", "64"], 2, "is a file; name a folder"),
    (["prep", "figures", "new", "--count", "-1", "--size", "64"], 2, "need a count of at least 1"),
]


@pytest.mark.parametrize(("command", "code", "words"), HOSTILE, ids=lambda value: None)
def test_it_ends_with_a_sentence(place, monkeypatch, capfd, command, code, words):
    monkeypatch.chdir(place)
    before = [path for path in place.rglob("*") if "/readers" not in str(path)]
    try:
        ended = main([str(word) for word in command])
    except SystemExit as end:  # of argparse
        ended = end.code
    told = capfd.readouterr().err
    assert ended == code, told
    assert words in told
    assert "Traceback" not in told
    assert all(map(os.path.lexists, before)), "nothing is lost"


def test_there_are_sixty_of_them():
    assert len(HOSTILE) >= 60
