"""The first screen answers: what pictures look like, what is obeyed, whether to trust it, and what to do next."""

import json
import re
import shlex
import shutil
from html import unescape
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

import evaluate.__main__ as evaluate
import prep.__main__ as prep
import train.__main__ as train
from evaluate import run
from evaluate.config import EvaluateConfig
from evaluate.drawing.draw import shown_first
from evaluate.report import first_screen, report
from evaluate.report.files import EvaluationFiles, name_runs
from evaluate.report.next_step import Line, next_step
from evaluate.subject import Subject
from nanodit.errors import DataError
from tests.browser import chromium, look
from tests.evaluate.conftest import Oracle
from tests.evaluate.report.test_report import edit_json, provenance
from train.method.dropout import ConditioningConfig
from train.method.flow import FlowConfig

# where the pictures, and the lines with the next step, end on the page
PLACES = """(() => {
  const ends = what => [...document.querySelectorAll(what)].map(one => one.getBoundingClientRect().bottom + scrollY);
  return {pictures: ends('#first img'), lines: ends('#first dd, #first .next')};
})()"""
CONFIG = {
    "tests": ["attributes", "pose", "divergence", "memorisation"],
    "conditions": {"all": 1.0, "text+pose": 2.0, "text": 2.0},
    "sampler": {"method": "euler", "steps": 2},
    "divergence": {"prompts": 8, "noises": 2},
    "pose": {"conditions": [], "mirrored": 0},
    "memorisation": {"training": 0},
    "grid_images": 5,
}


@pytest.fixture(scope="module")
def folders(figures, known_pictures, tmp_path_factory) -> dict[str, Path]:
    """Evaluations of a model that draws the truth, and of one that draws training images."""
    found, config = {}, EvaluateConfig.model_validate(CONFIG)
    table, rows = ConditioningConfig(preset="quickstart").resolve(), tuple(figures.rows("holdout"))
    for name in ("truth", "copycat"):
        folder = tmp_path_factory.mktemp(name) / "validation_outputs" / "step-000123"
        subject = Subject(Oracle(figures, known_pictures[name]), FlowConfig(), table, figures, rows)
        evidence = run.evaluate(subject, config, folder)
        given = provenance(config) | {"left_out": {"altered_twins": []}}
        run.write(folder, config, evidence, given, [])
        found[name] = folder
    return found


@pytest.fixture
def copies(folders, tmp_path) -> dict[str, Path]:
    """The same in run folders that a test may change."""
    places = {name: tmp_path / name / "validation_outputs" / folder.name for name, folder in folders.items()}
    return {name: Path(shutil.copytree(folder, places[name])) for name, folder in folders.items()}


def first(*folders: Path) -> str:
    """The words and tags of the first screen, without what pictures hold."""
    html = report.render([EvaluationFiles.read(folder) for folder in folders])
    body = html.partition("<main>")[2].partition('id="first"')[2].partition("</section>")[0]
    body = re.sub("<span>([^<]*)</span>", r"\1", body)  # the words of a command
    return re.sub(r"\s+", " ", unescape(re.sub('data:image[^"]*', "data:", body)))


def line(shown: str, name: str) -> str:
    """The verdict of a line in a word, and what follows it."""
    found = re.search(rf"<dt>{name}</dt><dd><span class=\"pill [a-z]+\">([^<]*)</span>([^<]*)</dd>", shown)
    return f"{found[1]}: {found[2].strip()}"


def trust(shown: str) -> str:
    return re.sub("<[^>]*>", "|", shown.partition('class="trust"')[2])


def test_four_prompts_stand_as_rows_of_real_text_pose_and_nearest_training_image(folders):
    shown = first(folders["truth"])
    heads = re.findall('<div class="head">([^<]*)</div>', shown)
    assert heads == ["real", "text alone", "text + pose", "nearest in training"]
    assert shown.count('class="cell"') == shown.count("<img") == 16
    assert shown.count('class="prompt"') == 4
    assert "nearest to the picture given text + pose, by DINO" in shown


def test_the_nearest_training_image_of_a_copy_is_what_was_copied(figures, folders):
    content = json.loads((folders["copycat"] / "extras.json").read_text())["nearest"]
    holdout, train = figures.rows("holdout"), {}
    for row in figures.rows("train"):
        train.setdefault(row["bucket"], []).append(row["key"])
    copied = {row["key"]: train[row["bucket"]][place % len(train[row["bucket"]])] for place, row in enumerate(holdout)}
    assert len(content["pictures"]) == 4
    for one in content["pictures"]:
        assert one["training_key"] == copied[one["key"]]
        assert one["distance"] < 1e-3
        assert (folders["copycat"] / one["training_image"]).is_file()


@pytest.mark.parametrize(
    ("drawn", "chosen"),
    [
        (["all", "text+pose", "text"], ["text", "text+pose"]),
        (["dino", "all", "text"], ["text", "dino"]),
        (["all"], ["all"]),
        (["all", "dino", "pose"], ["all", "dino"]),
        (["text", "text@1", "text+pose"], ["text", "text+pose"]),
        ([], []),
    ],
)
def test_other_conditions_stand_in_for_those_that_were_not_drawn(drawn, chosen):
    assert shown_first(drawn) == chosen


def test_each_verdict_has_its_line(folders):
    truth, copycat = first(folders["truth"]), first(folders["copycat"])
    assert line(truth, "copies").startswith("none found: ")
    assert re.search(r"A share of \d+\.\d % or more would have been found, four times in five\.", line(truth, "copies"))
    assert line(copycat, "copies").startswith("alarm: Copies of training images")
    assert line(truth, "variety").startswith("collapsed: ")  # the truth whatever the noise
    assert "Pictures of different prompts differ 1.0" in line(truth, "variety")
    assert re.findall("<b>([a-z]+)</b>", truth.partition("<dt>level</dt>")[2].partition("</dl>")[0]) == [
        "colours",
        "joints",
    ]
    assert "nanodit prep report" in copycat
    assert "There are copies" in copycat


def test_what_was_not_measured_says_so(copies):
    folder = copies["truth"]

    def forget(content):
        content["metrics"] = []
        content["skipped"] = [{"name": "pose_pck", "reason": "no pose models"}]
        content["provenance"]["evaluation"]["tests"] = ["pose"]

    edit_json(folder / "report.json", forget)
    edit_json(folder / "extras.json", dict.clear)
    shown = first(folder)
    assert line(shown, "text") == "not measured: The tests attributes and edit did not run."
    assert line(shown, "pose") == "not measured: Skipped: no pose models."
    assert line(shown, "variety") == "not measured: The test divergence did not run."
    assert line(shown, "copies") == "not measured: The test memorisation did not run."
    assert "<dt>level</dt>" not in shown
    assert "nearest in training" not in shown
    assert "Measure “text” and “copies”: this evaluation did not look." in shown
    assert '<a href="#skips">1 skipped</a>' in shown


def test_more_images_are_asked_for_only_where_there_are_more(copies):
    folder = copies["truth"]

    def undecided(content):
        known = next(one for one in content["metrics"] if one["name"] == "attribute_accuracy/text")
        gain = {"name": "attribute_gain/text", "value": 0.3, "low": -0.2, "high": 0.8, "reason": None}
        gain |= {"baselines": {"no_gain": 0.0, "ceiling_on_real": 1.0}}
        gain |= {"settings": known["settings"] | {"without": "nothing"}}
        content["metrics"] = [known, known | gain]
        content["provenance"]["evaluation"] |= {"samples": 24, "tests": ["reconstruction", *CONFIG["tests"]]}

    edit_json(folder / "report.json", undecided)
    assert "More images would decide nothing here" in first(folder)  # all 24 were measured
    edit_json(folder / "report.json", lambda content: content["provenance"]["dataset"]["counts"].update(holdout=500))
    assert "Measure “text” on more images: too few to decide." in first(folder)
    edit_json(folder / "report.json", lambda content: content["provenance"]["evaluation"].update(samples=64))
    assert "More images would decide nothing here" in first(
        folder
    )  # of the part that may be tested on there are no more


def test_a_condition_that_no_pair_of_pictures_isolates_is_to_be_measured(copies):
    folder = copies["truth"]  # without pictures given nothing, and given the pose alone

    def plain(content):
        content["metrics"] = [one for one in content["metrics"] if not one["name"].startswith("divergence")]
        content["skipped"] = []

    edit_json(folder / "report.json", plain)
    shown = first(folder)
    assert line(shown, "text") == "not measured: No two sets of pictures were drawn that differ in it alone."
    assert "Measure “text”: this evaluation did not look." in shown
    tests = ["attributes", "pose", "reconstruction"]
    edit_json(folder / "report.json", lambda content: content["provenance"]["evaluation"].update(tests=tests))
    assert "this evaluation did not look" not in first(folder)  # what training left out, no evaluation tells


def test_without_a_judge_the_nearest_image_is_that_of_mean_colours(copies):
    edit_json(copies["truth"] / "extras.json", lambda content: content["nearest"].update(space="feature_pixels"))
    assert "by mean colours" in first(copies["truth"])


def test_an_evaluation_without_pictures_has_a_first_screen(copies):
    folder = copies["truth"]
    table = pq.read_table(folder / "samples.parquet")
    pq.write_table(table.slice(0, 0), folder / "samples.parquet")
    edit_json(folder / "extras.json", dict.clear)
    shown = first(folder)
    assert "No pictures: this evaluation drew none, or kept none" in shown
    assert "no pictures were judged" in trust(shown)
    assert "<img" not in shown


def test_a_path_that_leads_out_of_the_folder_is_refused(copies):
    folder = copies["truth"]
    edit_json(
        folder / "extras.json", lambda content: content["nearest"]["pictures"][0].update(training_image="../../x.png")
    )
    with pytest.raises(DataError, match=r"extras\.json is damaged \(nearest: ValueError"):
        first(folder)


def test_trust_names_the_gate_the_images_the_noises_and_who_read_the_test_before(copies):
    folder = copies["truth"]
    said = trust(first(folder))
    assert "no holdout image is in training, nor an altered form of one" in said
    assert "24 images of the whole holdout" in said
    assert "1 noise each, one training seed" in said
    assert "read the same test images" not in said  # of a holdout in parts alone

    def test_part(content):
        content["provenance"]["holdout"] = "test"
        content["provenance"]["left_out"] = {"altered_twins": ["a", "b"]}

    edit_json(folder / "report.json", test_part)
    assert "|0 other evaluations kept beside it read the same test images" in trust(first(folder))
    others = [Path(shutil.copytree(folder, folder.with_name(name))) for name in ("step-000060", "step-000060-model")]
    said = trust(first(folder))
    assert "24 images of the test part of the holdout" in said
    assert "(2 left out, as training has them mirrored, brighter or cropped)" in said
    assert "2 other evaluations kept beside it read the same test images" in said
    assert "|1 other evaluation kept beside it read" in trust(first(folder, others[0]))  # what is shown is no other
    edit_json(others[0] / "report.json", lambda content: content["provenance"].pop("holdout"))  # of before: it read all
    assert "2 other evaluations kept beside it read the same test images" in trust(first(folder))
    edit_json(others[0] / "report.json", lambda content: content["provenance"].update(holdout="dev"))
    edit_json(others[1] / "report.json", lambda content: content["provenance"]["dataset"].update(fingerprint="ef" * 32))
    assert "|0 other evaluations" in trust(first(folder))
    (others[1] / "report.json").write_text("[]")  # a note on the past: damage there is no error here
    assert "|0 other evaluations" in trust(first(folder))
    validated = folder.with_name("step-000030") / "heldout.json"
    validated.parent.mkdir()
    for record, counted in (({"holdout": "dev"}, "|0 other evaluations"), ({}, "|1 other evaluation kept beside")):
        validated.write_text(json.dumps(record))
        assert counted in trust(first(folder))
    edit_json(folder / "report.json", lambda content: content["provenance"].pop("left_out"))
    assert "whether an altered form of one is, nobody checked" in trust(first(folder))


def test_shares_between_other_ends_do_not_stand_side_by_side(copies, folders):
    alike = first(folders["truth"], copies["truth"])
    assert alike.count('class="track"') == 4

    def easier(content):
        for metric in content["metrics"]:
            if metric["name"].startswith("attribute_accuracy"):
                metric["baselines"] = metric["baselines"] | {"nearest_train": 0.9}

    edit_json(copies["truth"] / "report.json", easier)
    unlike = first(folders["truth"], copies["truth"])
    assert unlike.count('class="track"') == 2  # of joints
    assert unlike.count("other ends than beside it, so no bar") == 2


# --- the next step ----------------------------------------------------------------------------------------------------

GIVEN = {
    "checkpoint": "step-000100",
    "step": 100,
    "weights": "ema",
    "training": {"output": "runs/a b", "dataset": "data", "train": {"steps": 100}},
    "evaluation": {"samples": 64},
}
WELL = {
    "text": ("obeyed", "met"),
    "pose": ("obeyed", "met"),
    "variety": ("as real", "met"),
    "copies": ("none found", "met"),
}


def lines(**changed) -> list[Line]:
    """All well but for what is ``changed``: the word, its style, and whether it is open."""
    return [Line(name, word, "", style, *rest) for name, (word, style, *rest) in (WELL | changed).items()]


DEAF, PARTLY = ("not obeyed", "missed"), ("partly obeyed", "inconclusive")
BLIND = ("not measured", "plain")
UNLOOKED, FEW = ("not measured", "plain", True), ("undecided", "inconclusive", True)


@pytest.mark.parametrize(
    ("found", "words", "command"),
    [
        (lines(), "All well", "nanodit train sample --checkpoint 'runs/a b/checkpoints/step-000100' --prompt 'A man'"),
        (lines(pose=BLIND), "What was measured is well; “pose” could not be: draw", "nanodit train sample"),
        (lines(**dict.fromkeys(WELL, BLIND)), "None of this could be measured", "nanodit evaluate run"),
        (lines(text=DEAF), "The text is not obeyed yet: train on.", "nanodit train run --config 'runs/a b/config.ya"),
        (lines(pose=DEAF), "The pose is not obeyed yet", "train.steps=200"),
        (lines(text=DEAF, pose=PARTLY), "Text and pose are not obeyed yet", "nanodit train run"),
        (lines(text=PARTLY), "The text is only partly obeyed yet", "nanodit train run"),
        (lines(copies=("alarm", "missed"), text=DEAF), "There are copies", "nanodit prep report --dataset data"),
        (lines(variety=("collapsed", "missed"), copies=UNLOOKED), "Pictures vary too little", "--count 8 --grid"),
        (lines(variety=("less than real", "inconclusive")), "All well", "nanodit train sample"),
        (lines(copies=UNLOOKED), "Measure “copies”: this evaluation did not look.", "--tier pulse"),
        (lines(text=FEW), "Measure “text” on more images", "--tier table"),
        (lines(text=FEW, copies=UNLOOKED), "Measure “text” and “copies”", "--tier table"),
        (lines(text=FEW, pose=FEW, copies=UNLOOKED), "Measure “text”, “pose” and “copies”: ", "--tier table"),
        (lines(text=("undecided", "inconclusive")), "More images would decide nothing here", "nanodit train sample"),
    ],
)  # fmt: skip
def test_the_next_step_is_the_first_thing_that_stands_in_the_way(found, words, command):
    step = next_step(found, False, GIVEN, "A man")
    assert step.words.startswith(words)
    assert command in step.command
    program, package, *arguments = shlex.split(step.command)
    assert program == "nanodit"
    {"prep": prep.parser, "train": train._parser, "evaluate": evaluate._parser}[package]().parse_args(arguments)


def test_pictures_that_cannot_be_scored_come_before_everything():
    step = next_step(lines(copies=("alarm", "missed")), True, GIVEN)
    assert step.words.startswith("Some pictures cannot be scored")
    assert step.command == "nanodit train run --config 'runs/a b/config.yaml' train.steps=200"


def test_a_run_that_has_not_ended_goes_on_as_it_is_and_other_weights_are_named():
    unfinished = GIVEN | {"step": 50}
    assert next_step(lines(text=DEAF), False, unfinished).command == "nanodit train run --config 'runs/a b/config.yaml'"
    assert "--weights model" in next_step(lines(), False, GIVEN | {"weights": "model"}).command
    assert "--weights model" in next_step(lines(text=FEW), False, GIVEN | {"weights": "model"}).command
    assert "--prompt TEXT" in next_step(lines(), False, {}).command


@pytest.mark.parametrize(
    ("given", "folder"),
    [({}, "step-000100-table"), ({"weights": "model", "holdout": "dev"}, "step-000100-model-dev-table")],
)
def test_another_evaluation_does_not_replace_the_one_on_the_page(given, folder):
    command = shlex.split(next_step(lines(text=FEW), False, GIVEN | given).command)
    assert command[command.index("--output") + 1] == f"runs/a b/validation_outputs/{folder}"


def test_an_evaluation_in_a_folder_of_its_own_is_made_again_there(copies):
    folder = copies["truth"]
    assert " --output " not in report.facts(name_runs([EvaluationFiles.read(folder)])[0])["command"]
    told = report.facts(name_runs([EvaluationFiles.read(folder.rename(folder.with_name("step-000123-pulse")))])[0])
    command = shlex.split(told["command"])
    place = command[command.index("--output") + 1]
    assert place.endswith("validation_outputs/step-000123-pulse")
    assert f"{place}/config.yaml" in command


@pytest.mark.parametrize(
    ("caption", "prompt"),
    [
        ("A man. He runs.", "A man"),
        ("رجل يركض", "رجل يركض"),
        ("--help", ""),
        ("A man\x1b[2J", ""),
        ("A \u202enam", ""),
        ("long " * 60, ""),
        (None, ""),
    ],
)
def test_the_prompt_of_a_command_is_one_word_of_it(caption, prompt):
    rows = {("real", "real", "key", 0): {"caption": caption}}
    assert first_screen._prompt(SimpleNamespace(files=SimpleNamespace(rows=rows)), ["key"]) == prompt


def test_a_page_of_several_runs_does_not_ask_for_another_one():
    assert "OTHER_RUN" in next_step(lines(), False, GIVEN).words
    assert next_step(lines(), False, GIVEN, compared=True).words == "All well: draw from it."


# --- in a browser -----------------------------------------------------------------------------------------------------


def test_pictures_come_before_tables_and_tables_before_what_numbers_depend_on(folders):
    html = report.render([EvaluationFiles.read(folder) for folder in folders.values()])
    headings = re.findall(r"<h2>([^<]*)</h2>", html)
    order = [
        "Bars and alarms",
        "Pictures",
        "Nearest training images",
        "Run against run",
        "Metrics",
        "Where this comes from",
    ]
    assert [heading for heading in headings if heading in order] == order
    assert html.index('id="first"') < html.index("<h2>Bars and alarms</h2>")
    assert html.index("<table") > html.index("<h2>Pictures</h2>")


@pytest.mark.slow
def test_the_first_screen_holds_pictures_and_verdicts_on_a_desktop_and_a_phone(folders, tmp_path):
    """Chromium: nothing wider than the window, four rows of pictures and the verdicts within the first screens."""
    one = report.write_report(folders["truth"], tmp_path / "one.html")[0]
    three = report.write_report([*folders.values(), folders["truth"]], tmp_path / "three.html")[0]
    with chromium(tmp_path / "profile") as port:
        for page in (one, three):
            for width in (1280, 390, 320):
                seen = look(port, page, width, "light", PLACES)
                assert seen["scroll"] <= width, seen["wide"]
                assert not seen["wide"]
                assert seen["complaints"] == []
                bottoms, verdicts = seen["asked"]["pictures"], seen["asked"]["lines"]
                assert len(bottoms) == 16 * (1 if page == one else 3)
                if page == one and width == 1280:
                    assert max(*bottoms, *verdicts) < 800
                if page == one and width == 390:
                    assert max(bottoms) < 844
