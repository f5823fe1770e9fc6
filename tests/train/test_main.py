"""The command line: run, continue, refuse, and sample."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prep.demo import build_demo_encoders, demo_folder
from prep.shards import Dataset
from tests.train.tiny import TEXT_ENCODER, TEXT_WIDTH, write_config, write_dataset
from train import draw as draw_module
from train.__main__ import main
from train.noise import noise


@pytest.fixture(scope="module")
def config(tiny_dataset, tmp_path_factory) -> Path:
    """The config of a run that is finished."""
    folder = tmp_path_factory.mktemp("main")
    path = write_config(folder / "tiny.yaml", tiny_dataset, folder / "run")
    assert main(["run", "--config", str(path), "train.steps=6"]) == 0
    return path


@pytest.fixture
def run(config) -> Path:
    """Its run folder."""
    return config.parent / "run"


@pytest.fixture
def prompts(monkeypatch):
    """A text encoder of the synthetic dataset's width in place of the demo T5, which has another."""

    class Encoder:
        width = TEXT_WIDTH

        def __init__(self, model, revision, device, max_tokens):
            assert max_tokens == 512

        def fingerprint(self):
            return TEXT_ENCODER

        def encode(self, captions):
            words = [len(word) for word in captions[0].split()]
            embedding = np.repeat(np.array(words, np.float16)[:, None], TEXT_WIDTH, 1) + np.arange(TEXT_WIDTH)
            return [type("Tokens", (), {"embedding": embedding.astype(np.float16)})]

    monkeypatch.setattr("prep.t5.T5Encoder", Encoder)


def sample(run: Path, output: Path, *arguments: str) -> int:
    return main(["sample", "--checkpoint", str(run), "--output", str(output), "--steps", "2", *arguments])


def test_a_run_folder_holds_what_was_promised(run, capsys):
    assert {path.name for path in run.iterdir()} == {
        "config.yaml", "provenance.json", "metrics.jsonl", "tensorboard", "checkpoints", "run.lock",
    }  # fmt: skip
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step-000003", "step-000006"]
    provenance = json.loads((run / "provenance.json").read_text())
    assert provenance["dataset"]["encoders"] == "demo"
    assert str(run) not in json.dumps(provenance)


def test_a_finished_run_says_so(config, capsys):
    assert main(["run", "--config", str(config), "train.steps=6"]) == 0
    assert "already trained to step 6; nothing to do" in capsys.readouterr().out


def test_the_resolved_config_is_a_config(config, run, capsys):
    assert main(["run", "--config", str(run / "config.yaml")]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_never_refuses_a_folder_with_a_run(config, capsys):
    assert main(["run", "--config", str(config), "--resume", "never", "train.steps=6"]) == 2
    assert "already holds a run" in capsys.readouterr().err


def test_a_branch_continues_another_run_elsewhere(config, run, tmp_path, capsys):
    arguments = ["run", "--config", str(config), f"output={tmp_path / 'branch'}", "train.steps=6"]
    assert main([*arguments, "--resume", str(run / "checkpoints" / "step-000003")]) == 0
    for name in ("model", "ema", "optimizer"):
        ours, theirs = (f / "checkpoints" / "step-000006" / f"{name}.safetensors" for f in (tmp_path / "branch", run))
        assert ours.read_bytes() == theirs.read_bytes()
    assert json.loads((tmp_path / "branch" / "provenance.json").read_text())["started_at_steps"] == [3]
    assert main([*arguments, "--resume", str(run / "checkpoints" / "step-000003")]) == 2
    assert "has checkpoints after step 3 (step-000006 to step-000006)" in capsys.readouterr().err


def test_a_listed_change_is_allowed(config, run, tmp_path, capsys):
    arguments = ["run", "--config", str(config), f"output={tmp_path / 'longer'}", "train.steps=8", "train.lr=1e-3"]
    resume = ["--resume", str(run)]
    assert main([*arguments, *resume, "--allow-change", "train.steps"]) == 2
    assert "train.lr: 0.003 -> 0.001" in capsys.readouterr().err
    assert main([*arguments, *resume, "--allow-change", "train.steps", "--allow-change", "train.lr"]) == 0


def test_another_environment_is_refused_unless_allowed(config, run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "Z80")
    arguments = ["run", "--config", str(config), f"output={tmp_path / 'moved'}", "train.steps=6"]
    arguments += ["--resume", str(run / "checkpoints" / "step-000003")]
    assert main(arguments) == 2
    assert "cpu_capability: '" in capsys.readouterr().err
    assert main([*arguments, "--allow-environment-change"]) == 0


def test_no_gpu_is_said(config, capsys):
    assert main(["run", "--config", str(config), "train.device=cuda"]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err


def test_a_prompt_becomes_an_image_with_its_settings(run, tmp_path, prompts, capsys):
    assert sample(run, tmp_path / "a.png", "--prompt", "a red square", "--seed", "3") == 0
    assert "a.png" in capsys.readouterr().out
    image = Image.open(tmp_path / "a.png")
    assert image.size == (64, 64)
    settings = json.loads(image.text["nanodit"])
    assert settings["prompt"] == "a red square"
    assert settings["seed"] == 3
    assert settings["sampler"] == "heun"
    assert "step 6 (ema)" in settings["checkpoint"]
    sample(run, tmp_path / "b.png", "--prompt", "a red square", "--seed", "3")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    sample(run, tmp_path / "c.png", "--prompt", "a red square", "--seed", "4")
    assert (tmp_path / "c.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_several_images_of_any_size(run, tmp_path, prompts):
    arguments = [
        "--prompt",
        "x",
        "--count",
        "3",
        "--seed",
        "5",
        "--size",
        "80x56",
        "--guidance",
        "2",
        "--sampler",
        "euler",
    ]
    assert sample(run, tmp_path / "out.png", *arguments) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out-5.png", "out-6.png", "out-7.png"]
    assert Image.open(tmp_path / "out-6.png").size == (80, 56)
    # an image does not depend on how many are drawn with it
    sample(run, tmp_path / "alone.png", *arguments[:2], "--seed", "6", *arguments[6:])
    alone, beside = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("alone.png", "out-6.png"))
    assert np.abs(alone - beside).max() <= 1


def test_a_holdout_samples_conditions(run, tiny_dataset, tmp_path, capsys):
    row = next(row for row in Dataset(tiny_dataset).rows("holdout") if row["bucket"] == "56x80")
    for conditions in ("text,pose", "all"):
        output = tmp_path / f"{conditions}.png"
        assert sample(run, output, "--key", row["key"], "--conditions", conditions) == 0
        assert Image.open(output).size == (56, 80)
    assert json.loads(Image.open(tmp_path / "text,pose.png").text["nanodit"])["conditions"] == "text+pose"
    training = Dataset(tiny_dataset).rows("train")[0]["key"]
    assert sample(run, tmp_path / "x.png", "--key", training) == 2
    assert "not a holdout sample" in capsys.readouterr().err


def test_trap_22_the_noise_is_keyed_by_sample_and_seed(run, tiny_dataset, tmp_path, monkeypatch):
    starts = []
    real = draw_module.sample
    monkeypatch.setattr(draw_module, "sample", lambda m, c, start, **k: starts.append(start) or real(m, c, start, **k))
    row = Dataset(tiny_dataset).rows("holdout")[0]
    for conditions in ("text", "text,pose"):
        sample(run, tmp_path / "x.png", "--key", row["key"], "--conditions", conditions, "--seed", "9")
    width, height = map(int, row["bucket"].split("x"))
    for start in starts:
        assert np.array_equal(start[0].numpy(), noise(row["key"], 9, height, width))  # trap 22


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--conditions", "pose"], "conditions pose: never trained by this run's dropout table"),
        (["--conditions", "text,cls"], "conditions text+cls: never trained"),
        (["--conditions", "text,hair"], "unknown hair"),
        (["--size", "60x64"], "multiples of the patch size, 8"),
        (["--size", "big"], "not of the form WIDTHxHEIGHT"),
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--count", "0"], "--count 0: must be at least 1"),
        (["--guidance", "nan"], "--guidance nan: must be a number"),
        (["--guidance", "-1"], "--guidance -1.0: must be a number"),
        (["--self-guidance", "inf"], "--self-guidance inf: must be a number"),
        (["--self-guidance"], "self-guidance: this model was trained without routing"),
        (["--output", "picture.jpg"], "--output picture.jpg: must be a file named *.png"),
        (["--output", "picture"], "must be a file named *.png"),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_name(run, tiny_dataset, tmp_path, arguments, message, capsys):
    key = Dataset(tiny_dataset).rows("holdout")[0]["key"]
    assert sample(run, tmp_path / "x.png", "--key", key, *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


def test_a_senseless_request_is_refused_before_the_checkpoint_is_read(tmp_path, capsys):
    (tmp_path / "folder.png").mkdir()
    nowhere = tmp_path / "nowhere"
    assert sample(nowhere, tmp_path / "folder.png", "--prompt", "x") == 2
    assert "folder.png: must be a file" in capsys.readouterr().err
    assert sample(nowhere, tmp_path / "x.png", "--prompt", "x", "--dataset", str(tmp_path)) == 2
    assert "--dataset: a prompt needs none" in capsys.readouterr().err


def test_conditions_that_the_dataset_lacks_are_refused_by_name(tmp_path, capsys):
    dataset = write_dataset(tmp_path / "dataset", layers=("px", "text", "t5"))
    path = write_config(tmp_path / "c.yaml", dataset, tmp_path / "run")
    assert main(["run", "--config", str(path), "train.steps=1"]) == 0
    key = Dataset(dataset).rows("holdout")[0]["key"]
    assert sample(tmp_path / "run", tmp_path / "x.png", "--key", key, "--conditions", "text,pose") == 2
    assert "--conditions text+pose: the dataset has no pose; it has text" in capsys.readouterr().err
    assert sample(tmp_path / "run", tmp_path / "x.png", "--key", key, "--conditions", "all") == 0


def test_a_dataset_without_conditions_is_refused(tmp_path, capsys):
    dataset = write_dataset(tmp_path / "dataset", layers=("px", "text"))
    path = write_config(tmp_path / "c.yaml", dataset, tmp_path / "run")
    assert main(["run", "--config", str(path)]) == 3
    assert "has no conditions to train on" in capsys.readouterr().err


def test_guided_pictures_need_the_unconditional_model(tiny_dataset, tmp_path, capsys):
    path = write_config(tmp_path / "c.yaml", tiny_dataset, tmp_path / "run")
    overrides = ["conditioning.preset=null", "conditioning.table={text: 0.5, all: 0.5}", "train.steps=1"]
    arguments = ["run", "--config", str(path), *overrides, "visual_debug.guidance=2"]
    assert main([*arguments, "visual_debug.every_steps=1"]) == 2
    assert "visual_debug.guidance 2: the dropout table never trains `nothing`" in capsys.readouterr().err
    assert main(arguments) == 0, "no pictures are drawn"


def test_guidance_needs_the_unconditional_model(tiny_dataset, tmp_path, prompts, capsys):
    path = write_config(tmp_path / "c.yaml", tiny_dataset, tmp_path / "run")
    overrides = ["conditioning.preset=null", "conditioning.table={text: 0.5, all: 0.5}", "train.steps=1"]
    assert main(["run", "--config", str(path), *overrides]) == 0
    assert sample(tmp_path / "run", tmp_path / "x.png", "--prompt", "x", "--guidance", "3") == 2
    assert "conditions nothing: never trained" in capsys.readouterr().err


def test_a_prompt_gives_text_alone(run, tmp_path, prompts, capsys):
    assert sample(run, tmp_path / "x.png", "--prompt", "x", "--conditions", "text,pose") == 2
    assert "a prompt gives text alone" in capsys.readouterr().err


def test_a_model_without_text_takes_no_prompt(tmp_path, prompts, capsys):
    dataset = write_dataset(tmp_path / "dataset", layers=("px", "dino"))
    path = write_config(tmp_path / "c.yaml", dataset, tmp_path / "run")
    assert main(["run", "--config", str(path), "train.steps=1"]) == 0
    assert sample(tmp_path / "run", tmp_path / "x.png", "--prompt", "x") == 2
    assert "trained without text" in capsys.readouterr().err


def test_another_text_encoder_is_refused(run, tmp_path, capsys):
    assert sample(run, tmp_path / "x.png", "--prompt", "a woman") == 3  # the demo T5 is not the synthetic features'
    assert "not the text encoder of the training captions" in capsys.readouterr().err


@pytest.mark.slow
def test_figures_from_end_to_end(figures_dataset, tmp_path, capsys):
    path = write_config(tmp_path / "c.yaml", figures_dataset, tmp_path / "run")
    assert main(["run", "--config", str(path), "train.steps=4", "visual_debug.every_steps=4"]) == 0
    assert (tmp_path / "run" / "visual_debug" / "step-000004" / "grid.png").exists()
    assert sample(tmp_path / "run", tmp_path / "a.png", "--prompt", "A woman in a red top.", "--guidance", "2") == 0
    assert sample(tmp_path / "run", tmp_path / "b.png", "--prompt", "A man in a blue top.", "--guidance", "2") == 0
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
    encoder = build_demo_encoders(demo_folder()).t5
    arguments = ["--prompt", "A woman in a red top.", "--guidance", "2", "--text-encoder", str(encoder)]
    assert sample(tmp_path / "run", tmp_path / "c.png", *arguments) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "c.png").read_bytes()
