"""Micro-batches that do not fit into a GPU's memory: computed in parts, to the weights of a run that had room."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from pathlib import Path

import pytest
import torch

from tests.train.everything import everything
from tests.train.loop.test_trainer import make
from tests.train.tiny import write_config
from train.__main__ import main
from train.check.made_up import awaken
from train.checkpoint.checkpoint import find_latest, verify
from train.loop.splitting import part_of
from train.loop.trainer import Trainer
from train.method.perceptual import View

OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB"
CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
FULL = {"class": lambda: torch.OutOfMemoryError(OUT_OF_MEMORY), "text": lambda: RuntimeError(CUBLAS)}
# TREAD in all steps, REPA, LPIPS of crops, every subset of conditions in a step of two buckets, mirrored images
MIXED = everything(
    train__steps=2, train__lr=3e-4, train__precision="fp32", train__token_budget="null", train__batch_size=6,
    train__grad_accumulation_steps=3, train__phases="[]", tread__dense_tail=0, perceptual__every=1,
    perceptual__view="crop", checkpoint__every_steps=2, validation__every_steps=0, visual_debug__every_steps=0,
    ema__snapshots=0, train__gradient_checkpointing="none", data__short_captions=0.0,
)  # fmt: skip
UNDISTURBED: dict[str, torch.Tensor] = {}  # weights of the run that nothing disturbs


class SmallCard:
    """Lets a network run out of memory above ``room`` images, in some of its calls: on the way there or back.

    ``calls`` are the numbers of the calls, from 0, of which the first attempt fails; None for all.
    """

    def __init__(
        self,
        trainer: Trainer,
        room: int,
        where: str,
        full: Callable[[], Exception],
        calls: Collection[int] | None = None,
    ) -> None:
        self.room, self.where, self.full, self.calls = room, where, full, calls
        self.asked: list[int] = []
        block = trainer.model.blocks[1]  # those behind it have their gradients by then, those before it have not
        block.register_forward_pre_hook(self._forward)

    def _forward(self, block, arguments):
        x = arguments[0]
        self.asked.append(len(x))
        if len(x) <= self.room or (self.calls is not None and len(self.asked) - 1 not in self.calls):
            return None
        if self.where == "forward":
            raise self.full()
        x = x.clone()
        x.register_hook(self._fail)
        return (x, *arguments[1:])

    def _fail(self, gradient):
        raise self.full()


def trained(dataset: Path, output: Path, *overrides: str, card: Callable[[Trainer], object] = lambda _: None):
    trainer = make(dataset, output, *overrides)
    trainer.optimizer.use_fast_bf16(False)  # Muon's rounding to bfloat16 would hide what is compared
    awaken(trainer.model)  # what begins at zero hides what comes before it
    card(trainer)
    trainer.run()
    return trainer


@pytest.fixture
def undisturbed(tiny_dataset, tmp_path_factory, vgg_home, dinov2_home) -> dict[str, torch.Tensor]:
    if not UNDISTURBED:
        UNDISTURBED.update(trained(tiny_dataset, tmp_path_factory.mktemp("whole") / "run", *MIXED).model.state_dict())
    return UNDISTURBED


@pytest.mark.parametrize(
    ("call", "where", "full"),
    [
        ("first", "backward", "class"), ("middle", "backward", "text"), ("last", "backward", "class"),
        ("all", "backward", "class"), ("all", "forward", "text"),
    ],
)  # fmt: skip
def test_weights_are_those_of_a_run_that_had_room(
    call, where, full, undisturbed, tiny_dataset, tmp_path, vgg_home, dinov2_home, capsys
):
    calls = {"first": {0}, "middle": {1}, "last": {-1}, "all": None}[call]
    cards = []

    def card(trainer):
        own = calls
        if calls == {-1}:  # of the first step's micro-batches
            own = {sum(len(trainer.batches.make(i).groups) for i in trainer.batches.plan.numbers(0)) - 1}
        cards.append(SmallCard(trainer, 2, where, FULL[full], own))

    split = trained(tiny_dataset, tmp_path / "run", *MIXED, card=card)
    assert len(cards[0].asked) > 6, "something was computed in parts"
    weights = split.model.state_dict()
    gaps = {name: float((weights[name] - value).abs().max()) for name, value in undisturbed.items()}
    assert max(gaps.values()) <= 1e-6, max(gaps, key=gaps.get)
    said = capsys.readouterr().out
    assert said.count("warning: step 1: ") == 1
    assert "do not fit into the free memory of cpu" in said


def test_where_memory_suffices_nothing_is_other(tiny_dataset, tmp_path, vgg_home, dinov2_home):
    plain = make(tiny_dataset, tmp_path / "a" / "run", *MIXED)
    watched = make(tiny_dataset, tmp_path / "b" / "run", *MIXED)
    watched.splitter.active = True
    for trainer in (plain, watched):
        for number in trainer.batches.plan.numbers(0):
            trainer.micro_step(trainer.batches.make(number))
    for one, other in zip(plain.model.parameters(), watched.model.parameters()):
        assert one.grad is other.grad is None or torch.equal(one.grad, other.grad)


def test_parts_hold_what_belongs_to_their_images(tiny_dataset, tmp_path, vgg_home, dinov2_home):
    trainer = make(tiny_dataset, tmp_path / "run", *MIXED)
    losses = trainer.losses.values()
    batch = next(b for b in map(trainer.batches.make, range(6)) if len(b.groups[0].prepared) == 2)
    whole = batch.groups[0]
    images = len(whole.conditions)
    parts = [part_of(whole, i, i + 1, losses) for i in range(images)]
    assert [part.images for part in parts] == [
        slice(whole.images.start + i, whole.images.start + i + 1) for i in range(images)
    ]
    assert torch.equal(torch.cat([part.prepared["teacher"] for part in parts]), whole.prepared["teacher"])
    views = [View(i, view.top, view.left) for i, part in enumerate(parts) for view in part.prepared.get("views", ())]
    assert views == whole.prepared["views"]
    assert all(part.prepared["views"] for part in parts if "views" in part.prepared)
    assert part_of(whole, 0, images, losses) is whole


def test_what_was_too_large_is_not_tried_again_in_this_process(tiny_dataset, tmp_path):
    trainer = make(tiny_dataset, tmp_path / "run", "train.steps=4", "train.batch_size=8")
    card = SmallCard(trainer, 3, "forward", FULL["class"])
    trainer.run()
    assert max(card.asked[6:]) <= 3
    assert trainer.splitter.limit == 2 * 80 * 56, "half of a micro-batch of 4"
    records = [json.loads(line) for line in (tmp_path / "run" / "warnings.jsonl").read_text().splitlines()]
    assert [(record["step"], record["what"]) for record in records] == [(1, "memory")]
    assert "set train.gradient_checkpointing=all when the run is continued, or" in records[0]["reason"]
    assert "train.token_budget=140 in a new run" in records[0]["reason"]


def test_what_is_advised_is_a_config_that_loads(tiny_dataset, tmp_path):
    """One image of a small bucket at a time has fewer tokens than one of a large bucket."""
    trainer = make(tiny_dataset, tmp_path / "run", "train.steps=1", "train.batch_size=2")
    most = max(map(trainer.batches.plan.tokens, trainer.batches.plan.sizes))
    trainer.splitter.limit, trainer.splitter._note = 88 * 48, "one"
    trainer._say_split()
    (record,) = map(json.loads, (tmp_path / "run" / "warnings.jsonl").read_text().splitlines())
    (advised,) = re.findall(r"train\.token_budget=(\d+)", record["reason"])
    assert int(advised) == most > 88 * 48 // 64
    make(tiny_dataset, tmp_path / "other" / "run", f"train.token_budget={advised}")


def test_one_image_that_does_not_fit_ends_with_4_and_the_last_checkpoint(tiny_dataset, tmp_path, monkeypatch, capsys):
    file = write_config(tmp_path / "c.yaml", tiny_dataset, tmp_path / "run")
    assert main(["run", "--config", str(file), "train.steps=3"]) == 0
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000003"
    built = Trainer.__init__

    def small(trainer, config, dataset, device, *arguments):
        built(trainer, config, dataset, device, *arguments)
        if device.type != "meta":
            SmallCard(trainer, 0, "backward", FULL["text"], calls=range(9, 99))  # in the third step from here

    monkeypatch.setattr(Trainer, "__init__", small)
    assert main(["run", "--config", str(file), "train.steps=12", "--allow-change", "train.steps"]) == 4
    said = capsys.readouterr().err
    assert "out of memory: the run takes about" in said
    assert "A single image alone did not fit" in said
    assert not re.search(r"^ *train\.token_budget=\d+:", said, re.MULTILINE), "smaller micro-batches were tried"
    assert re.search(r"^ *train\.gradient_checkpointing=", said, re.MULTILINE)
    assert "The last checkpoint, if there is one, is intact" in said
    assert verify(checkpoint)
    latest = find_latest(tmp_path / "run")
    assert latest.name > checkpoint.name, "the steps until then are saved"
    assert verify(latest)


def test_before_a_run_has_begun_a_lack_of_memory_is_an_error(tiny_dataset, tmp_path):
    trainer = make(tiny_dataset, tmp_path / "run")
    SmallCard(trainer, 2, "forward", FULL["class"])
    with pytest.raises(torch.OutOfMemoryError):
        trainer.micro_step(trainer.batches.make(0))


def test_other_errors_are_not_split_away(tiny_dataset, tmp_path):
    trainer = make(tiny_dataset, tmp_path / "run")
    trainer.splitter.active = True
    SmallCard(trainer, 2, "forward", lambda: RuntimeError("CUDNN_STATUS_INTERNAL_ERROR"))
    with pytest.raises(RuntimeError, match="INTERNAL_ERROR"):
        trainer.micro_step(trainer.batches.make(0))


@pytest.mark.parametrize("what", ["visual_debug", "validation"])
@pytest.mark.parametrize("full", FULL)
def test_pictures_and_validation_without_room_change_no_bit(what, full, tiny_dataset, tmp_path, monkeypatch, capsys):
    overrides = ["train.steps=3", f"{what}.every_steps=2"]
    quiet = trained(tiny_dataset, tmp_path / "quiet" / "run", "train.steps=3", "visual_debug.every_steps=0")
    called = []

    def fail(*arguments, **keywords):
        called.append(1)
        raise FULL[full]()

    monkeypatch.setattr(
        "train.method.sampling.integrate" if what == "visual_debug" else "evaluate.suite.heldout_loss.to_x", fail
    )
    looked = trained(tiny_dataset, tmp_path / "looked" / "run", *overrides)
    assert called
    assert looked.step == 3
    said = capsys.readouterr().out
    assert said.count(f"warning: {what} at step") == 2
    tried = (what, full) == ("validation", "class")  # in halves, down to one; the words count on a GPU alone
    reason = "evaluation: a single item does not fit" if tried else "out of memory: CUDA"
    assert said.count(f"training goes on: {reason}") == 2
    theirs = quiet.model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in looked.model.state_dict().items())
