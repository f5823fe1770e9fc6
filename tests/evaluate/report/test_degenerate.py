"""Pictures that cannot be scored: whatever a model draws, every test stores it, and the page shows it and says so."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from evaluate import run
from evaluate.config import EvaluateConfig
from evaluate.records import Metric
from evaluate.report.report import EvaluationFiles, render, write_report
from evaluate.report.summary import summary
from evaluate.statistics.intervals import Interval
from evaluate.subject import Subject
from evaluate.suite import TESTS
from nanodit.files import canonical_json
from tests.evaluate.conftest import Constant
from tests.evaluate.report.test_report import provenance
from train.method.dropout import ConditioningConfig
from train.method.flow import FlowConfig

KINDS = {  # what a model draws -> why it cannot be scored, and whether that is all of its pictures
    "blank": (lambda z: torch.zeros_like(z), "constant", True),
    "black": (lambda z: torch.full_like(z, -1), "constant", True),
    "nan": (lambda z: torch.full_like(z, torch.nan), "non-finite", True),
    "infinite": (lambda z: torch.full_like(z, torch.inf), "non-finite", True),
    "one blank of each batch": (lambda z: torch.cat([torch.zeros_like(z[:1]), z[1:]]), "constant", False),
    "nobody in it": (lambda z: z, None, False),
    "a speck": (lambda z: _speck(z), None, False),  # as little as is not constant, and the same for every sample
}
TABLE = ConditioningConfig(preset="default")
CONFIG = {
    "conditions": {"all": 1.0, "text": 1.0},
    "sampler": {"method": "euler", "steps": 1},
    "heldout_loss": {"bins": 2},
    "reconstruction": {"conditions": ["all"]},
    "swap": {"prompts": 12, "matrix": 2},
    "edit": {"prompts": 12},
    "divergence": {"prompts": 12, "noises": 2},
    "pose": {"conditions": [], "mirrored": 12},
    "grid_images": 2,
}


def _speck(z):
    image = torch.zeros_like(z)
    image[:, :, 0, 0] = 3 / 255
    return image


@pytest.fixture(scope="module")
def drawn(readable_figures, tmp_path_factory):
    """The folder and the evidence of an evaluation with every test, for each of KINDS."""
    config, found = EvaluateConfig.model_validate(CONFIG), {}
    for kind, (answer, _, _) in KINDS.items():
        rows = tuple(readable_figures.rows("holdout"))
        subject = Subject(Constant(answer), FlowConfig(), TABLE.resolve(), readable_figures, rows, batch_size=8)
        folder = tmp_path_factory.mktemp("run") / "validation_outputs" / "step-000123"
        evidence = run.evaluate(subject, config, folder)
        run.write(folder, config, evidence, provenance(config), [])
        found[kind] = folder, evidence
    return found


class _Shown(HTMLParser):
    """What a reader sees of a page, and what its charts are drawn with; without the configurations."""

    def __init__(self, html: str):
        super().__init__()
        self.words, self.numbers, self._hidden = [], [], 0
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self._hidden += tag in ("pre", "style", "title")
        self.numbers += [value or "" for name, value in attributes if name in ("style", "points", "d", "x", "y", "cx")]

    def handle_endtag(self, tag):
        self._hidden -= tag in ("pre", "style", "title")

    def handle_data(self, data):
        if not self._hidden:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def check_page(html: str) -> str:
    """Return the text of a page on which nothing stands for a number that is none."""
    shown = _Shown(html)
    assert not re.findall(r"\b(?:nan|NaN|null(?! edit)|None(?! of)|inf|Infinity)\b", shown.text)
    assert not [one for one in shown.numbers if re.search("nan|inf|None", one)]
    return shown.text


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_shows_every_test_and_says_how_many_pictures_could_not_be_scored(drawn, kind, tmp_path):
    folder, evidence = drawn[kind]
    _, reason, every = KINDS[kind]
    pictures = [row for row in evidence.samples if row["kind"] == "model"]
    bad = [row for row in pictures if row["degenerate"]]
    assert ({row["degenerate"] for row in bad} == {reason}) if reason else not bad
    assert not every or len(bad) == len(pictures) > 150
    (page, *_) = write_report(folder, tmp_path / "page.html")
    text = check_page(Path(page).read_text())
    said = f"{len(bad)} of {len(pictures)} pictures drawn cannot be scored: {len(bad)} {reason}"
    assert (said in text) == bool(bad), kind
    for name in ("swap", "edit", "divergence", "pose", "attributes"):  # its pictures are there all the same
        assert f"<h2>{TESTS[name].section.title}</h2>" in Path(page).read_text(), name
    for metric in evidence.metrics:
        assert metric.value is None or metric.value == metric.value, metric.name
        assert metric.value is not None or metric.reason, metric.name
    for line in summary(evidence.metrics, evidence.skipped).splitlines():
        assert not re.search(r"\b(nan|inf|null)\b", line), line


def test_no_test_of_all_blank_pictures_has_a_number(drawn):
    for kind in ("blank", "black", "nan", "infinite"):
        for metric in drawn[kind][1].metrics:
            scored = metric.name.startswith("heldout") and kind in ("blank", "black")  # predictions, not pictures
            assert (metric.value is None) != scored, metric.name


def test_runs_with_and_without_stand_side_by_side(drawn):
    files = [EvaluationFiles.read(drawn[kind][0]) for kind in ("nobody in it", "blank", "nan")]
    text = check_page(render(files))
    assert "B run" in text or "B:" in text


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_never_becomes_a_metric(bad):
    for interval in (Interval(bad, None, None, 12), Interval(0.5, bad, 1.0, 12)):
        metric = Metric.of("a/b", interval, baselines={"floor": bad, "ceiling": 1.0})
        assert (metric.value, metric.low, metric.high, metric.n) == (None, None, None, 12)
        assert metric.baselines == {"ceiling": 1.0}
        assert metric.reason.startswith("degenerate")
        canonical_json(metric.to_dict())
