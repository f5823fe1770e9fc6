"""Every form of attention to contexts of unequal length, against one boolean mask over padding; gradients as well."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.train.model.test_network import FEATURES, conditions, make_model, randomised
from train.model import attend as attend_module
from train.model.attend import Seen, attend, attend_each, attend_each_backward, interleave, reads_packed, seen, separate
from train.model.context import find_spans, token_counts
from train.model.spans import Spans

N, H, K = 5, 2, 8
LENGTHS = {"unequal": (4, 1, 7), "equal": (3, 3), "one image": (6,), "one has none": (2, 0, 5), "none at all": (0, 0)}
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def spans_of(lengths: tuple[int, ...]) -> Spans:
    longest = max(lengths) + 2  # padding that nobody needs
    return Spans.of(torch.arange(longest) < torch.tensor(lengths)[:, None])


def inputs(lengths: tuple[int, ...]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    images, tokens = len(lengths), sum(lengths)
    shapes = [(images, N, H, K)] * 3 + [(tokens, H, K)] * 2
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def masked(q, k, v, context_k, context_v, spans: Spans) -> torch.Tensor:
    """The reference: every image's context padded to one length, and a mask."""
    images, longest = len(spans.lengths), max(spans.lengths) + 3
    rows = torch.cat([torch.arange(length) + i * longest for i, length in enumerate(spans.lengths)])
    keys, values = (
        torch.cat((own, torch.zeros(images * longest, H, K).index_put((rows,), other).unflatten(0, (images, -1))), 1)
        for own, other in ((k, context_k), (v, context_v))
    )
    mask = torch.cat((torch.ones(images, N).bool(), torch.arange(longest) < torch.tensor(spans.lengths)[:, None]), 1)
    scores = q.transpose(1, 2) @ keys.permute(0, 2, 3, 1) * K**-0.5
    weights = scores.masked_fill(~mask[:, None, None], float("-inf")).softmax(-1)
    return (weights @ values.transpose(1, 2)).transpose(1, 2)


def results(function, tensors) -> list[torch.Tensor]:
    """The output and all gradients."""
    for tensor in tensors:
        tensor.grad = None
    output = function(*tensors)
    torch.manual_seed(1)
    (output * torch.randn(output.shape)).sum().backward()  # of any strides
    return [output.detach(), *(tensor.grad for tensor in tensors)]


def forms(spans: Spans) -> dict[str, Seen]:
    lengths = torch.tensor(spans.lengths)
    shown = torch.arange(spans.longest) < lengths[:, None]
    found = {
        "each": Seen(lengths),
        "padded": Seen(slots=spans.slots, mask=F.pad(shown, (N, 0), value=True)[:, None, None]),
    }
    return found | ({"plain": Seen()} if spans.are_equal else {})


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_every_form_is_the_masked_one(lengths):
    spans, tensors = spans_of(lengths), inputs(lengths)
    expected = results(lambda *x: masked(*x, spans), tensors)
    for name, form in forms(spans).items():
        found = results(lambda q, k, v, *context, form=form: attend(q, k, v, context, form), tensors)
        for one, other in zip(found, expected):
            torch.testing.assert_close(one, other, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("form", ["each", "padded"])
def test_a_length_that_is_off_by_one_is_another_result(form):
    lengths = LENGTHS["unequal"]
    wrong, tensors = (lengths[0] + 1, lengths[1], lengths[2] - 1), inputs(lengths)
    right = masked(*tensors, spans_of(lengths))
    q, k, v, *context = tensors
    assert not torch.allclose(attend(q, k, v, context, forms(spans_of(wrong))[form]), right, **TOLERANCE)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_our_operators_are_what_torch_expects_of_one(lengths):
    q, k, v, *context = inputs(lengths)
    lengths = torch.tensor(lengths)
    torch.library.opcheck(interleave, (k, context[0], lengths))
    packed = torch.cat((k.flatten(0, 1), context[0])).detach()
    torch.library.opcheck(separate, (packed, lengths, len(lengths), N))
    keys, values = (interleave(*pair, lengths).detach().requires_grad_() for pair in ((k, context[0]), (v, context[1])))
    torch.library.opcheck(attend_each, (q, keys, values, lengths))
    out, sums = attend_each(q, keys, values, lengths)
    saved = (torch.ones_like(out), q, keys, values, out, sums, lengths)
    torch.library.opcheck(attend_each_backward, tuple(x.detach() for x in saved))


def test_in_half_precision_on_a_cpu_the_explicit_form_is_the_masked_one():
    spans, tensors = spans_of(LENGTHS["unequal"]), inputs(LENGTHS["unequal"])
    halves = [tensor.detach().bfloat16().requires_grad_() for tensor in tensors]
    padded = forms(spans)["padded"]
    found = results(lambda q, k, v, *context: attend(q, k, v, context, padded), halves)
    for one, other in zip(found, results(lambda *x: masked(*x, spans), tensors)):
        torch.testing.assert_close(one.float(), other, rtol=5e-2, atol=5e-2)


def test_what_is_seen_depends_on_lengths_device_and_dtype():
    few, many, equal = spans_of((4, 1)), spans_of((4000, 1)), spans_of((4, 4))
    cpu = {"tokens": 64, "heads": 3, "head_size": 64, "dtype": torch.float32}
    assert seen(equal, **cpu, compiled=False) == Seen()
    assert seen(equal, **cpu, compiled=True).mask.shape == (2, 1, 1, 68), "one graph for all on a CPU"
    assert seen(few, **cpu, compiled=False).mask.shape == (2, 1, 1, 68)
    assert seen(many, **cpu, compiled=False).lengths.tolist() == [4000, 1]
    assert seen(many, **cpu, compiled=True).lengths is None
    assert seen(many, **{**cpu, "dtype": torch.bfloat16}, compiled=False).lengths is None
    meta = few.map(lambda tensor: tensor.to("meta"))
    assert seen(meta, **cpu, compiled=False).lengths.tolist() == [4, 1]


@pytest.mark.parametrize(
    ("card", "dtype", "head_size", "expected"),
    [
        ((8, 0), torch.bfloat16, 64, True), ((9, 0), torch.float16, 256, True), ((12, 0), torch.bfloat16, 8, True),
        ((7, 5), torch.bfloat16, 64, False), ((8, 0), torch.float32, 64, False), ((8, 0), torch.bfloat16, 36, False),
        ((8, 0), torch.bfloat16, 264, False),
    ],
)  # fmt: skip
def test_packed_contexts_are_read_where_flash_attention_can(card, dtype, head_size, expected, monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: card)
    assert reads_packed(torch.device("cuda"), dtype, head_size) is expected
    assert not reads_packed(torch.device("cpu"), dtype, head_size)


def test_the_host_finds_the_spans_that_the_network_would():
    every = conditions(4, (5, 9, 30, 17))
    pose = every.pose.clone()
    pose[0, :, 2] = 0  # nobody
    model, row = make_model(), {"dino_h": 4, "dino_w": 4}
    subsets = [
        frozenset({"pose", "text"}),
        frozenset(),
        frozenset({"text", "cls", "patches", "pose"}),
        frozenset({"cls"}),
    ]
    for kept in (subsets, {"text", "pose"}, (), {"cls", "pose"}):
        given = every.replace(pose=pose).keeping(kept)
        counts = token_counts(given, model.config, row)
        spans = find_spans(given, FEATURES.modalities, counts)
        assert spans.lengths == model.encode_context(given, 32, 32).spans.lengths
        z, t = torch.randn(4, 3, 32, 32), torch.rand(4)
        assert torch.equal(model(z, t, replace(given, spans=spans)), model(z, t, given))
    assert spans.lengths == (4, 136, 136, 136)


def test_the_network_gives_the_same_in_every_form(monkeypatch):
    model, z, t = randomised(make_model()), torch.randn(3, 3, 32, 32), torch.rand(3)
    given = conditions(3, (5, 30, 9)).keeping([{"text"}, {"text", "pose"}, set()])

    def run(worth: int) -> list[torch.Tensor]:
        monkeypatch.setattr(attend_module, "WORTH_A_CALL", worth)
        model.zero_grad()
        output = model(z, t, given)
        output.square().sum().backward()
        return [output.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    for one, other in zip(run(0), run(1 << 60), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * max(1.0, float(other.abs().max())))
