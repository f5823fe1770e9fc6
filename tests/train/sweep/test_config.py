"""What a sweep's YAML means: arms, their differences, seeds, budgets, and fairness between arms."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from nanodit.config import load_config, walk_keys
from nanodit.errors import ConfigError
from prep.dataset.reader import Dataset
from tests.train.sweeps import tiny_sweep, write_sweep
from train.config import TrainConfig
from train.loop.trainer import Trainer
from train.sweep.config import SweepConfig, changes_on_resume, dump_sweep, flatten, load_sweep
from train.sweep.plan import describe, write_plan
from train.sweep.trial import Work

SHIPPED = sorted(Path("configs/sweep").glob("*.yaml"))


def arms_of(sweep) -> dict:
    return sweep.record(1, False)["arms"]


def test_an_arm_starts_from_another_and_differs_in_its_factor_alone(tiny_dataset, tmp_path):
    arms = {
        "A": {"overrides": {"optimizer.type": "adamw"}},
        "B": {"on": "A", "factor": "tread", "overrides": {"tread": {"enabled": True}}},
        "C": {"on": "B", "factor": "optimizer", "overrides": {"optimizer.type": "muon", "train.lr": 1e-3}},
        "D": {"factor": "tread", "overrides": {"tread.enabled": True, "optimizer.type": "adamw"}},
    }
    found = arms_of(tiny_sweep(tmp_path, tiny_dataset, arms=arms, aa_seeds=[7]))
    assert [arm["role"] for arm in found.values()] == ["baseline", "arm", "arm", "arm", "a/a"]
    assert [arm["against"] for arm in found.values()] == [None, "A", "B", "A", "A"]
    assert found["B"]["differences"] == {"tread.enabled": [False, True]}
    assert found["C"]["differences"] == {"optimizer.type": ["adamw", "muon"], "train.lr": [0.003, 0.001]}
    assert found["C"]["overrides"]["tread.enabled"] is True
    assert found["D"]["differences"] == found["B"]["differences"]
    assert found["A/A"]["differences"] == {}
    assert not any(arm["undeclared"] for arm in found.values())


def test_what_an_arm_changes_beyond_its_factor_is_undeclared(tiny_dataset, tmp_path):
    arms = {
        "A": {},
        "B": {"on": "A", "factor": "tread", "overrides": {"tread.enabled": True, "train.grad_clip": 0.5}},
        "C": {"on": "A", "overrides": {"tread.enabled": True}},
        "D": {"factor": ["tread", "optimizer"], "overrides": {"tread.enabled": True, "train.lr": 1e-3}},
        "E": {"factor": "tread", "overrides": {"tread.enabled": True}, "evaluate": {"seeds": 2}},
    }
    found = arms_of(tiny_sweep(tmp_path, tiny_dataset, arms=arms))
    undeclared = {name: arm["undeclared"] for name, arm in found.items()}
    expected = {"A": [], "B": ["train.grad_clip"], "C": ["tread.enabled"], "D": [], "E": ["evaluate.seeds"]}
    assert undeclared == expected


def test_trials_come_seed_by_seed_with_a_budget_and_threads_of_their_own(tiny_dataset, tmp_path):
    sweep = tiny_sweep(tmp_path, tiny_dataset, seeds=[3, 5], aa_seeds=[8], budget={"samples": 50})
    names = ["A-seed3", "B-seed3", "A-A-seed8", "A-seed5", "B-seed5"]
    assert [trial.name for trial in sweep.trials] == names
    first = sweep.trials[0].config
    assert (first.seed, first.train.steps, first.train.threads) == (3, 13, 1)  # 4 images a step
    assert first.run_folder == sweep.folder / "trials" / "A-seed3"
    assert not any(trial.trained_by for trial in sweep.trials)


def test_arms_that_are_measured_differently_share_their_training(tiny_dataset, tmp_path):
    arms = {"g1": {}, "g2": {"factor": "guidance", "evaluate": {"conditions": {"all": 2.0}}}}
    factors = {"guidance": ["evaluate.conditions"]}
    sweep = tiny_sweep(tmp_path, tiny_dataset, arms=arms, factors=factors, seeds=[0, 1], aa_seeds=[2])
    trained = {trial.name: trial.trained_by for trial in sweep.trials}
    assert trained == {
        "g1-seed0": None, "g2-seed0": "g1-seed0", "A-A-seed2": None, "g1-seed1": None, "g2-seed1": "g1-seed1",
    }  # fmt: skip
    g2 = arms_of(sweep)["g2"]
    assert (g2["differences"], g2["undeclared"]) == ({"evaluate.conditions": [None, {"all": 2.0}]}, [])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arms": {"A": {}, "B": {"on": "C"}}}, "on C is no arm before it; there: A"),
        ({"arms": {"A": {}, "B": {"factor": "repa"}}}, "factor repa is not in factors: tread, optimizer"),
        ({"arms": {"A": {}, "B/C": {}}}, "a name is letters"),
        ({"arms": {"A": {}, "B": {"overrides": {"train.lr": 3e-3}}}}, "arm B differs from A in nothing"),
        ({"arms": {"A": {}, "B": {"overrides": {"tread.enable": True}}}}, "arm B.*did you mean `tread.enabled`"),
        ({"arms": {"A": {"overrides": {"seed": 3}}}}, "seed is set by the sweep itself"),
        ({"overrides": {"train.steps": 3}}, "train.steps is set by the sweep itself"),
        ({"seeds": [0, 1], "aa_seeds": [1]}, "must be different numbers"),
        ({"seeds": [0, 1, 2, 3], "max_seeds": 3}, "4 seeds, but max_seeds declares at most 3"),
        ({"questions": [{"arms": ["A"], "ask": "Why?", "measures": ["slope"]}]}, "questions.0.arms"),
        ({"budget": {"steps": 3, "hours": 1.0}}, "a budget is one of steps, samples and hours"),
        ({"budget": {}}, "a budget is one of steps, samples and hours"),
        ({"early_stopping": "asha"}, "set validation.every_steps"),
        ({"early_stopping": "asha", "budget": {"hours": 1.0}}, "equal steps"),
        ({"resources": {"gpu": 1.5}}, "whole ones"),
        ({"primary": {"metric": "heldout_loss", "mode": "low"}}, "primary.mode"),
    ],
)
def test_what_cannot_be_meant_is_refused(tiny_dataset, tmp_path, changes, said):
    with pytest.raises(ConfigError, match=f"(?s){said}") as caught:
        tiny_sweep(tmp_path, tiny_dataset, **changes)
    assert len(str(caught.value).replace(str(tmp_path), "")) < 400, "the mistake, without all of the config"


def test_the_written_config_is_the_sweep(tiny_dataset, tmp_path):
    sweep = tiny_sweep(tmp_path, tiny_dataset, aa_seeds=[9])
    sweep.folder.mkdir()
    (sweep.folder / "sweep.yaml").write_text(dump_sweep(sweep), encoding="utf-8")
    again = load_sweep(sweep.folder / "sweep.yaml")
    assert again.trials == sweep.trials
    assert changes_on_resume(sweep.config, again.config) == []
    assert yaml.safe_load(dump_sweep(sweep))["base"] == "../base.yaml"  # moves with the folder


def test_a_sweep_may_grow_but_not_change(tiny_dataset, tmp_path):
    def config(**changes) -> SweepConfig:
        return load_config(SweepConfig, write_sweep(tmp_path, tiny_dataset, **changes))

    assert changes_on_resume(config(), config(seeds=[0, 1], aa_seeds=[4], retries=5, resources={"cpu": 2})) == []
    assert changes_on_resume(config(seeds=[0, 1]), config()) == ["seeds: [0, 1] -> [0]"]
    assert changes_on_resume(config(), config(max_seeds=6)) == ["max_seeds: None -> 6"]  # declared before, or never
    assert changes_on_resume(config(), config(budget={"steps": 13})) == ["budget.steps: 12 -> 13"]


def test_extensions_are_recorded_as_looks_and_a_resume_is_none(tiny_dataset, tmp_path):
    work = Work(None, None, lambda file, overrides: "", None)
    folder = tmp_path / "sweep"

    def planned(**changes):
        sweep = tiny_sweep(tmp_path, tiny_dataset, output=str(folder), **changes)
        write_plan(sweep, work, 1, False)
        said = [line for line in describe(sweep, 1) if "max_seeds" in line]
        return json.loads((folder / "sweep.json").read_text())["looks"], said

    assert planned(seeds=[0, 1, 2]) == ([3], [])
    assert planned(seeds=[0, 1, 2]) == ([3], [])
    record = json.loads((folder / "sweep.json").read_text())
    del record["looks"]  # of an earlier version
    (folder / "sweep.json").write_text(json.dumps(record))
    looks, (said,) = planned(seeds=[0, 1, 2, 3, 4])
    assert looks == [3, 5]
    assert "exploratory" in said
    shutil.rmtree(folder)
    assert planned(seeds=[0, 1, 2], max_seeds=5) == ([3], [])
    assert planned(seeds=[0, 1, 2, 3, 4], max_seeds=5) == ([3, 5], [])


def test_questions_are_recorded_and_may_be_asked_later(tiny_dataset, tmp_path):
    asked = [{"arms": ["A", "B"], "ask": "What does TREAD save?", "measures": ["peak_memory"]}]
    sweep = tiny_sweep(tmp_path / "asked", tiny_dataset, questions=asked)
    assert sweep.record(1, False)["questions"] == asked
    before = load_config(SweepConfig, write_sweep(tmp_path, tiny_dataset))
    assert changes_on_resume(before, sweep.config) == []


def test_questions_about_arms_that_were_left_out_are_not_asked(tiny_dataset, tmp_path):
    asked = [{"arms": ["A", name], "ask": f"What of {name}?", "measures": ["slope"]} for name in ("B", "Z")]
    sweep = tiny_sweep(tmp_path, tiny_dataset, questions=asked)
    assert sweep.record(1, False)["questions"] == asked[:1]
    warnings = [line for line in describe(sweep, 1) if "not asked" in line]
    assert warnings == ["warning: 'What of Z?' is not asked: no arm Z; set `questions`"]


def test_nested_overrides_become_dotted_ones_and_tables_stay_whole():
    nested = {"train": {"lr": 1e-3}, "tread.enabled": True, "conditioning": {"preset": None, "table": {"text": 1.0}}}
    assert flatten(nested) == {
        "train.lr": 1e-3, "tread.enabled": True, "conditioning.preset": None, "conditioning.table": {"text": 1.0},
    }  # fmt: skip


def test_arms_begin_with_equal_weights_and_see_equal_images_times_and_noise(tiny_dataset, tmp_path):
    arms = {
        "A": {"overrides": {"optimizer.type": "adamw"}},
        "B": {"on": "A", "overrides": {"tread.enabled": True}},
        "C": {"on": "B", "overrides": {"optimizer.type": "muon"}},
        "D": {"on": "C", "overrides": {"repa.enabled": True}},
    }
    dataset, first = Dataset(tiny_dataset), None
    for trial in tiny_sweep(tmp_path, tiny_dataset, arms=arms).trials:
        trainer = Trainer(trial.config, dataset, torch.device("cpu"))
        weights = {name: value for name, value in trainer.model.state_dict().items() if not name.startswith("repa_")}
        batches = [trainer.batches.make(number) for number in range(4)]
        seen = [(batch.keys, batch.t.tolist(), [n.tolist() for n in batch.noise], batch.subsets) for batch in batches]
        first = first or (weights, seen)
        assert weights.keys() == first[0].keys()
        assert all(torch.equal(weights[name], first[0][name]) for name in weights), trial.name
        assert seen == first[1], trial.name


@pytest.mark.parametrize("base", ["production", "baseline", "quickstart", "figures-256", "production-8gb"])
def test_the_ablation_on_photos_takes_any_base(base):
    overrides = [f"base=configs/train/{base}.yaml", "dataset=datasets/mine"]
    sweep = load_sweep(Path("configs/sweep/ablation-photos.yaml"), overrides)
    found = {name: (arm["against"], arm["differences"], arm["undeclared"]) for name, arm in arms_of(sweep).items()}
    assert found == {
        "A": (None, {}, []),
        "B": ("A", {"tread.enabled": [False, True]}, []),
        "C": ("B", {"optimizer.type": ["adamw", "muon"]}, []),
        "D": ("C", {"repa.enabled": [False, True]}, []),
        "A/A": ("A", {}, []),
    }
    first = sweep.trials[0].config
    assert (first.tread.enabled, first.optimizer.type, first.repa.enabled) == (False, "adamw", False)
    assert all(trial.config.train == first.train for trial in sweep.trials)
    assert (first.train.steps, first.dataset) == (5000, "datasets/mine")
    theirs = load_config(TrainConfig, Path(f"configs/train/{base}.yaml"))
    assert (first.model, first.train.lr, first.perceptual) == (theirs.model, theirs.train.lr, theirs.perceptual)


def test_a_base_of_the_command_line_is_relative_to_the_folder_or_to_the_sweep(tiny_dataset, tmp_path, monkeypatch):
    file = write_sweep(tmp_path / "sweeps", tiny_dataset)
    (tmp_path / "here.yaml").write_text("extends: sweeps/base.yaml\nlog_every: 7\n", encoding="utf-8")
    (tmp_path / "sweeps" / "other.yaml").write_text("extends: base.yaml\nlog_every: 9\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    logged = {
        name: load_sweep(file, [f"base={name}"]).trials[0].config.log_every for name in ("here.yaml", "other.yaml")
    }
    assert logged == {"here.yaml": 7, "other.yaml": 9}


def test_a_base_is_beside_the_file_that_names_it(tiny_dataset, tmp_path):
    write_sweep(tmp_path / "theirs", tiny_dataset)
    mine = tmp_path / "mine" / "sweep.yaml"
    mine.parent.mkdir()
    mine.write_text("extends: ../theirs/sweep.yaml\nseeds: [3]\n", encoding="utf-8")
    sweep = load_sweep(mine)
    assert Path(sweep.config.base).resolve() == tmp_path / "theirs" / "base.yaml"
    assert [trial.config.seed for trial in sweep.trials] == [3, 3]
    (tmp_path / "mine" / "base.yaml").write_text("extends: ../theirs/base.yaml\nlog_every: 7\n", encoding="utf-8")
    mine.write_text("extends: ../theirs/sweep.yaml\nbase: base.yaml\n", encoding="utf-8")
    assert load_sweep(mine).trials[0].config.log_every == 7


CHAIN = {
    "A": {},
    "B": {"on": "A", "factor": "tread", "overrides": {"tread.enabled": True}},
    "C": {"on": "B", "factor": "optimizer", "overrides": {"train.lr": 1e-3}},
    "shown": {"on": "C", "factor": "grid", "evaluate": {"heldout_loss.bins": 4}},
}


def test_chosen_arms_keep_what_they_inherit_and_absent_ones_are_not_compared(tiny_dataset, tmp_path):
    asked = [{"arms": ["A", name], "ask": f"What of {name}?", "measures": ["slope"]} for name in ("B", "C")]
    factors = {"tread": ["tread"], "optimizer": ["train.lr"], "grid": ["evaluate.heldout_loss"]}
    sweep = tiny_sweep(tmp_path, tiny_dataset, arms=CHAIN, factors=factors, questions=asked, aa_seeds=[7])
    part = sweep.choose(["C", "A"])
    assert [trial.name for trial in part.trials] == ["A-seed0", "C-seed0"]
    assert part.trials[1].config.tread.enabled
    record = part.record(1, False)
    assert list(record["arms"]) == ["A", "C"]
    assert record["arms"]["C"] == sweep.record(1, False)["arms"]["C"]
    assert record["questions"] == asked[1:]
    assert [line for line in describe(part, 1) if line.startswith("warning")] == [
        "warning: C is not compared: no arm B; name it in --arms, too",
        "warning: 'What of B?' is not asked: no arm B; name it in --arms, too",
    ]
    assert list(sweep.choose(["shown"]).arms) == ["C", "shown"], "whose weights it measures"
    assert list(sweep.choose(["A/A"]).arms) == ["A/A"]
    assert sweep.choose([]).trials == list(sweep.trials)
    for name, said in (("shwn", "did you mean shown?"), ("Z", "there: A, B, C, shown, A/A")):
        with pytest.raises(ConfigError, match=rf"--arms {name}: there is no such arm; {re.escape(said)}"):
            sweep.choose(["A", name])


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_sweeps_change_what_they_declare(file):
    sweep = load_sweep(file)
    arms = arms_of(sweep)
    assert not [name for name, arm in arms.items() if arm["undeclared"]]
    assert arms["A/A"]["role"] == "a/a"
    assert len(sweep.config.seeds) >= 3
    assert len(sweep.config.aa_seeds) >= 3
    assert file.read_text(encoding="utf-8").startswith("# ")


def test_the_shipped_sweeps_are_those_promised():
    names = ["ablation-photos", "ablation", "full-factorial", "guidance", "muon-lr", "quick"]
    assert [file.stem for file in SHIPPED] == names
    factorial = load_sweep(Path("configs/sweep/full-factorial.yaml"))
    settings = {
        (trial.config.tread.enabled, trial.config.optimizer.type, trial.config.repa.enabled)
        for trial in factorial.trials
    }
    assert len(settings) == 8
    tokens = [(256 // trial.config.model.patch_size) ** 2 for trial in factorial.trials]
    assert min(tokens) >= 1024, "routing would cost more than it saves"


def test_ablation_yaml_comments_on_every_key():
    text = Path("configs/sweep/ablation.yaml").read_text(encoding="utf-8")
    lines = text.splitlines()
    for key in walk_keys(SweepConfig):
        if key not in ("budget.steps", "budget.hours"):  # of which one is given, and the comment names all
            name = key.rsplit(".", 1)[-1]
            line = next((line for line in lines if f"{name}:" in line.split("#")[0]), "")
            section = next((line for line in lines if line.startswith(key.partition(".")[0])), "")
            assert "#" in line + section, key
