"""The plan of a sweep: written and checked before its first trial, from files alone, without Ray."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from nanodit.config import dump_config, load_config, parse_yaml
from nanodit.errors import ConfigError, ResourceError
from nanodit.files import canonical_json, write_atomic
from prep.dataset.reader import Dataset
from train.checkpoint.resume import SAFE_TO_CHANGE, differences
from train.config import TrainConfig
from train.sweep.config import Sweep, SweepConfig, Trial, changes_on_resume, dump_sweep, load_sweep
from train.sweep.record import CONFIG, ENDED, FAILED, PLAN, RUNNING, read_record, write_record
from train.sweep.trial import Work, code_hash


def prepare(file: Path, overrides: Sequence[str], name: str, work: Work) -> Path:
    """Return the folder of the sweep that a trial belongs to; write its plan where a trial run by hand is the first."""
    folder = Path(load_config(SweepConfig, file, overrides).output)
    if not (folder / PLAN).exists():
        write_plan(load_sweep(file, overrides), work, 1, False)
    trials = json.loads((folder / PLAN).read_text(encoding="utf-8"))["trials"]
    if name not in trials:
        raise ConfigError(f"--trial {name}: {folder / PLAN} has no such trial; there: {', '.join(trials)}")
    return folder


def check_folder(sweep: Sweep, work: Work, resume: bool) -> None:
    """Refuse a folder that holds another sweep, and a primary metric that the evaluation would not hold."""
    folder = sweep.folder
    begun = (folder / PLAN).exists()
    if not begun:
        first = sweep.trials[0]
        primary = sweep.config.primary
        text = work.evaluation(Path(sweep.config.evaluate), sweep.evaluation_of(first.arm))
        work.check(text, first.config, primary.metric, primary.mode)
        return
    if not resume:
        raise ConfigError(f"{folder} already holds a sweep; continue it with --resume, or choose another `output`")
    changes = changes_on_resume(load_config(SweepConfig, folder / CONFIG), sweep.config)
    for trial in sweep.trials:
        changes += _changes_of(sweep, trial)
    changes += _evaluation_changes(sweep, work)
    if changes:
        raise ConfigError(
            f"{folder} was begun with another config:\n         "
            + "\n         ".join(changes)
            + "\n       Set these back, or choose another `output`. Seeds may be added; resources may change"
        )


def _changes_of(sweep: Sweep, trial: Trial) -> list[str]:
    file = sweep.trials_folder / trial.name / "config.yaml"
    if not file.exists():
        return []
    before, after = load_config(TrainConfig, file).model_dump(mode="json"), trial.config.model_dump(mode="json")
    free = (*SAFE_TO_CHANGE, *(["train.steps"] if sweep.config.budget.hours else []))
    return [
        f"{trial.name}: {key}: {theirs!r} -> {ours!r}"
        for key, theirs, ours in differences(before, after)
        if not any(key == one or key.startswith(one + ".") for one in free)
    ]


def _evaluation_changes(sweep: Sweep, work: Work) -> list[str]:
    changes = []
    for name, text in _evaluations(sweep, work).items():
        file = sweep.folder / "evaluate" / name
        if not file.exists():
            continue
        before, now = (  # read anew: keys may have come since, with a default
            parse_yaml(one, name) for one in (work.evaluation(file, ()), text)
        )
        if "holdout" not in parse_yaml(file.read_text(encoding="utf-8"), str(file)):  # of before it was divided
            before["holdout"] = "all of it, which no evaluation reads since it has two parts"
        changes += [
            f"evaluation of arm {file.stem}: {key}: {theirs!r} -> {ours!r}"
            for key, theirs, ours in differences(before, now)
        ]
    return changes


def planned_arms(folder: Path) -> list[str]:
    """Return the arms that were asked for so far: a sweep goes on with other ones beside them."""
    file = folder / PLAN
    return list(json.loads(file.read_text(encoding="utf-8"))["arms"]) if file.exists() else []


def write_plan(sweep: Sweep, work: Work, concurrent: int, fractional: bool) -> None:
    """Write what the trials' processes read: sweep.json, and the configs of trials and evaluations as they are now."""
    folder = sweep.folder
    for name, text in _evaluations(sweep, work).items():
        write_atomic(folder / "evaluate" / name, text)
    for trial in sweep.trials:
        file = sweep.trials_folder / trial.name / "config.yaml"
        if not file.exists():
            write_atomic(file, dump_config(trial.config))
    trials = {
        trial.name: {
            "arm": trial.arm.name, "seed": trial.config.seed, "trained_by": trial.trained_by,
            "evaluation": f"{trial.arm.folder}.yaml",
        }
        for trial in sweep.trials
    }  # fmt: skip
    write_atomic(folder / CONFIG, dump_sweep(sweep))
    record = sweep.record(concurrent, fractional) | {"trials": trials, "looks": looks(sweep)}
    write_atomic(folder / PLAN, canonical_json(record))


def looks(sweep: Sweep) -> list[int]:
    """Return the numbers of seeds at which the sweep could be judged: those it had before each extension, and now."""
    file, now = sweep.folder / PLAN, len(sweep.config.seeds)
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    past = before.get("looks") or ([len(before["seeds"])] if before else [])
    return past if past and past[-1] == now else [*past, now]


def _evaluations(sweep: Sweep, work: Work) -> dict[str, str]:
    """Return the config of each arm's evaluation, as YAML, by file name."""
    file = Path(sweep.config.evaluate)
    return {f"{arm.folder}.yaml": work.evaluation(file, sweep.evaluation_of(arm)) for arm in sweep.arms.values()}


def capacity(config: SweepConfig, cluster: Mapping[str, float]) -> tuple[int, bool]:
    """Return how many trials run at once, and whether they share a GPU. Raises :class:`ResourceError` if none fits."""
    needed = demands(config, cluster)
    for name, amount in needed.items():
        if amount > cluster.get(name, 0):
            raise ResourceError(
                f"a trial asks for {amount:g} {name} and there are {cluster.get(name, 0):g}; set resources."
                f"{name.lower()} to what one trial may take"
            )
    fitting = min(int(cluster[name] / amount + 1e-9) for name, amount in needed.items() if amount)
    return min(fitting, config.concurrent or fitting), 0 < needed["GPU"] < 1


def demands(config: SweepConfig, cluster: Mapping[str, float]) -> dict[str, float]:
    """Return the resources that one trial takes, by Ray's names."""
    gpu = config.resources.gpu
    return {"CPU": config.resources.cpu, "GPU": min(1.0, cluster.get("GPU", 0)) if gpu is None else gpu}


def check_cohort(sweep: Sweep, new_cohort: bool) -> None:
    """Refuse to add trials to those of other code, data or torch, unless that is wanted: reports keep them apart."""
    import torch

    records = {trial.name: read_record(sweep.trials_folder / trial.name) for trial in sweep.trials}
    now = {"code": code_hash(), "torch": torch.__version__}
    unfinished = [trial for trial in sweep.trials if records[trial.name].get("status") not in ENDED]
    changes = []
    for trial in sweep.trials:
        then = records[trial.name].get("cohort", {})
        here = now | {"dataset": Dataset(trial.config.dataset).fingerprint}
        changes += [
            f"{name}: {then[name]} -> {value}" for name, value in here.items() if name in then and then[name] != value
        ]
    if changes and unfinished and not new_cohort:
        raise ConfigError(
            f"{sweep.folder}: changed since its first trials: {'; '.join(dict.fromkeys(changes))}. Go back to that, "
            "choose another `output`, or pass --new-cohort: the report then compares only trials of one cohort"
        )


def reset_failed(sweep: Sweep) -> None:
    """Mark failed trials as to be run again."""
    for trial in sweep.trials:
        record = read_record(sweep.trials_folder / trial.name)
        if record.get("status") == FAILED:
            write_record(sweep.trials_folder / trial.name, record | {"status": RUNNING, "failures": 0, "ended": None})


def describe(sweep: Sweep, concurrent: int) -> Iterator[str]:
    """Yield the lines that a sweep begins with; an arm that changes more than it declares comes with a warning."""
    arms = sweep.record(1, False)["arms"]
    at_a_time = "one at a time" if concurrent == 1 else f"{concurrent} at a time: no claims about time and memory"
    yield f"sweep {sweep.folder}: {len(sweep.trials)} trials of {len(arms)} arms, {at_a_time}"
    for name, arm in arms.items():
        changed = ", ".join(f"{key} {before!r} -> {after!r}" for key, (before, after) in arm["differences"].items())
        seeds = ", ".join(map(str, sweep.arms[name].seeds))
        against = f" against {arm['against']}: {changed or 'other seeds'}" if arm["against"] else ""
        yield f"  {name}{against}; seeds {seeds}"
        if arm["undeclared"]:
            yield (
                f"warning: arm {name} differs from {arm['against']} in more than its factor "
                f"{arm['factor'] or '(none is declared)'}: {', '.join(arm['undeclared'])}. What it shows cannot be "
                "laid to one cause; the report says so"
            )
        if arm["against"] not in (None, *arms):
            yield f"warning: {name} is not compared: no arm {arm['against']}; name it in --arms, too"
    if len(grown := looks(sweep)) > 1 and sweep.config.max_seeds is None:
        yield (
            f"warning: this sweep grew ({', then '.join(map(str, grown))} seeds) and had not declared max_seeds: its "
            "report is exploratory, without verdicts. For these, set max_seeds and another `output`"
        )
    for question in sweep.config.questions:
        if absent := sweep.absent(question):
            where = "name it in --arms, too" if set(absent) <= set(sweep.declared) else "set `questions`"
            yield f"warning: {question.ask!r} is not asked: no arm {' and no arm '.join(absent)}; {where}"
