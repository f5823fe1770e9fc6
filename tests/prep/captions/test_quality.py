"""Which answers are captions, and what is asked next: pure rules."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prep.captions.quality import (
    Accepted,
    Answer,
    Ask,
    CaptionRules,
    Flaw,
    find_flaw,
    has_loop,
    next_step,
    next_steps,
    normalised,
    tidy,
)
from tests.prep.caption_server import SPOILT, caption

OPTIONS = {"num_predict": 400, "seed": 7, "temperature": 0.0}
RULES = CaptionRules(min_words=60, max_words=300, options=OPTIONS, reask_temperature=0.5)
GOOD = caption(b"a picture")


def answer(text: str, end: str | None = "stop") -> Answer:
    return Answer(tidy(text), end, OPTIONS)


def flaw(text: str, end: str | None = "stop") -> str | None:
    found = find_flaw(answer(text, end), RULES)
    return found.reason if found else None


@pytest.mark.parametrize(
    ("text", "end", "reason"),
    [
        (GOOD, "stop", None),
        (GOOD, None, None),
        (GOOD + ' A sign reads "I\'m sorry, I cannot help you" in red letters.', "stop", None),
        ("Heresy painted on a wall. " + GOOD, "stop", None),
        ("", "stop", "caption_empty"),
        (" \n ... \n", "stop", "caption_empty"),
        ("A short caption.", "stop", "caption_too_short"),
        (GOOD * 5, "stop", "caption_repeats"),
        (caption(b"long", words=400), "stop", "caption_too_long"),
        (SPOILT["loop"], "stop", "caption_repeats"),
        (SPOILT["loop"], "length", "caption_repeats"),  # more room would not help
        (GOOD[:-9], "length", "caption_truncated"),
        (GOOD[:-9], None, "caption_truncated"),
        (SPOILT["refusal"], "stop", "caption_refused"),
        ("I’m unable to describe people. " + GOOD, "stop", "caption_refused"),
        (GOOD + " As an AI language model, I do not guess.", "stop", "caption_refused"),
        ("Sorry, " + GOOD, "stop", "caption_refused"),
        (GOOD, "refused", "caption_refused"),
        ("Here is a detailed description of the image: " + GOOD, "stop", "caption_preamble"),
        ("Here's a dense paragraph describing it:\n\n" + GOOD, "stop", "caption_preamble"),
        ("Sure! " + GOOD, "stop", "caption_preamble"),
        ("**Caption:** " + GOOD, "stop", "caption_preamble"),
        (GOOD + " Would you like me to describe the background?", "stop", "caption_preamble"),
        (GOOD + "\0", "stop", "caption_garbled"),
        (GOOD + "\ud800", "stop", "caption_garbled"),  # what JSON can say and UTF-8 cannot
        ("", "failed", "caption_failed"),
        ("", "timeout", "caption_timeout"),
    ],
)
def test_flaws_have_reasons(text, end, reason):
    assert flaw(text, end) == reason


def test_scripts_without_spaces_count_characters():
    assert (
        flaw(
            "这是一张照片里面有一个穿着红色外套的女人站在窗前" * 2 + "她的右手拿着一本书目光看向左边背景是白色的墙壁。"
        )
        is None
    )


@settings(deadline=None)  # a busy machine proves nothing
@given(st.lists(st.sampled_from("abcdefgh"), max_size=60))
def test_loops_are_runs_of_eight_words_that_come_three_times(words):
    runs = [tuple(words[start : start + 8]) for start in range(len(words) - 7)]
    assert has_loop(words) == any(runs.count(run) >= 3 for run in runs)


@settings(deadline=None)  # a busy machine proves nothing
@given(st.text())
def test_whatever_a_server_sends_is_one_line_of_valid_text_or_a_flaw(text):
    clean = tidy(text)
    assert clean.encode().decode() == clean
    assert tidy(clean) == clean
    assert "\n" not in clean
    assert flaw(text) is not None or len(clean.split()) >= 30


ANSWERS = st.sampled_from(
    [
        answer(GOOD), answer(""), answer(GOOD[:-9], "length"), answer(SPOILT["refusal"]), answer("Short."),
        answer(SPOILT["loop"]), answer("", "failed"), answer("", "timeout"),
    ]
)  # fmt: skip


@settings(deadline=None)  # a busy machine proves nothing
@given(st.lists(ANSWERS, max_size=6))
def test_questions_end(replies):
    """Each kind of flaw is met once with a further question; three questions settle every case."""
    answers, asked = [], []
    for reply in replies:
        step = next_step(answers, RULES)
        if not isinstance(step, Ask):
            break
        assert step.options not in asked  # nobody is asked the same twice
        asked.append(step.options)
        answers.append(reply)
    assert len(asked) <= 3
    step = next_step(answers, RULES)
    if answers and find_flaw(answers[-1], RULES) is None:
        assert step == Accepted(GOOD, OPTIONS)
    if len(asked) == 3:
        assert not isinstance(step, Ask)


def test_what_is_asked_next_mends_what_was_wrong():
    assert next_step([], RULES) == Ask(OPTIONS)
    cut, refusal = answer(GOOD[:-9], "length"), answer(SPOILT["refusal"])
    assert next_step([cut], RULES) == Ask(OPTIONS | {"num_predict": 800})
    assert next_step([refusal], RULES) == Ask(OPTIONS | {"seed": 8, "temperature": 0.5})
    assert next_step([cut, refusal], RULES) == Ask(OPTIONS | {"num_predict": 800, "seed": 8, "temperature": 0.5})
    assert next_step([cut, cut], RULES).reason == "caption_truncated"
    assert next_step([refusal, refusal], RULES).reason == "caption_refused"
    assert next_step([answer("", "failed")], RULES).reason == "caption_failed"


def test_a_changed_limit_judges_old_answers_and_asks_only_about_those_that_fail_now():
    short, longer = answer("A man in a red coat."), answer("A man in a red coat stands here.")
    assert isinstance(next_step([short, longer], RULES), Flaw)
    loose = CaptionRules(5, 300, OPTIONS, 0.5)
    assert next_step([short, longer], loose) == Accepted(short.text, OPTIONS)
    assert isinstance(next_step([answer(GOOD)], CaptionRules(100, 300, OPTIONS, 0.5)), Ask)


@settings(deadline=None)  # a busy machine proves nothing
@given(st.permutations(["a", "b", "c", "d"]))
def test_of_images_with_one_caption_the_first_in_order_keeps_it(order):
    other = answer(caption(b"another"))
    answers = {"a": [answer(GOOD)], "b": [answer(GOOD.upper())], "c": [other], "d": [answer(GOOD), answer(GOOD)]}
    steps = next_steps({key: answers[key] for key in order}, RULES)
    assert isinstance(steps["a"], Accepted)
    assert isinstance(steps["c"], Accepted)
    assert steps["b"] == Ask(OPTIONS | {"seed": 8, "temperature": 0.5})
    assert steps["d"] == Flaw("caption_repeats", "the same caption as that of image a", "quality")
    assert normalised(GOOD) == normalised(GOOD.upper().replace(".", "!"))
