"""Which answers are captions, and what is asked next: pure rules."""

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prep.captions import quality
from prep.captions.prompts import prompt_text
from prep.captions.quality import (
    Accepted,
    Answer,
    Ask,
    CaptionRules,
    Flaw,
    find_flaw,
    has_loop,
    has_stutter,
    next_step,
    next_steps,
    normalised,
    readable,
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
        (GOOD + " Would you like me to describe the background?", "stop", "caption_closing"),
        ("", "thinking", "caption_only_thinking"),
        ("<think>One person, a wall, a lamp and", "length", "caption_only_thinking"),
        (GOOD + "\0", "stop", "caption_garbled"),
        (GOOD + "\ud800", "stop", "caption_garbled"),  # what JSON can say and UTF-8 cannot
        ("", "failed", "caption_failed"),
        ("", "timeout", "caption_timeout"),
    ],
)
def test_flaws_have_reasons(text, end, reason):
    assert flaw(text, end) == reason


ANSWERS_OF_MODELS = Path(__file__).parent / "answers"
CAPTIONS = (ANSWERS_OF_MODELS / "good.txt").read_text(encoding="utf-8").strip().split("\n\n")
BAD = [
    line.split(" | ", 1)
    for line in (ANSWERS_OF_MODELS / "bad.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]
PROMPT = prompt_text(None)
DEFAULTS = CaptionRules(60, 300, OPTIONS, 0.5, PROMPT)


def filled(template: str, good: str) -> str:
    """An answer of bad.txt around one of good.txt."""
    sentences = re.split(r"(?<=[.!?]) ", good)
    half = len(sentences) // 2
    for name, text in {
        "\\n": "\n", "{good}": good, "{start}": " ".join(sentences[:half]), "{end}": " ".join(sentences[half:])
    }.items():  # fmt: skip
        template = template.replace(name, text)
    return template


def test_captions_of_all_styles_are_kept():
    """People, art, products, landscapes, dry and florid ones; quotations, numbers, other scripts, accents."""
    assert len(set(CAPTIONS)) == 60
    flaws = [(flaw.detail, text) for text in CAPTIONS if (flaw := find_flaw(answer(text), DEFAULTS))]
    assert len(flaws) <= 2, flaws


HARMLESS = """Below is a narrow river, and above are two cranes.
The following pages are blank.
A T-shirt says I CAN'T KEEP CALM in white capitals.
A sign asks visitors to PLEASE TRY AGAIN LATER.
Great-grandmother and child share a blanket.
Wait staff in white jackets carry trays.
Looking at the camera, she shields her eyes from the sun.
On the wall there is no picture, only a nail and a pale rectangle.
The browser window is empty, and no image is visible on the screen.
A woman in scrubs, as a dental assistant would wear them, holds a mirror.
The photograph was attached to the page with two strips of tape.
It is 3 p.m. – the hands of the clock show it.
His jersey bears # 12, and another one has No. 1 on it.
Subtitles read 'I'm sorry, I can't help you' in yellow.
A card says „Es tut mir leid“ in gold letters.
The banner says WELCOME TO ÇANAKKALE and, smaller, hoş geldiniz.
The menu lists: 1. Soup 2. Salad 3. Fish.
A neon sign reads 東京タワー.
The screen shows x < 5 and y > 3.
Elizabeth I, in a ruff of lace, looks to the left.
Two words, "STOP": and "GO": are painted on the road.
The road is long and straight and long and straight again.
A painting titled La Liberté guidant le peuple hangs over the sofa.""".splitlines()


@pytest.mark.parametrize("sentence", HARMLESS)
def test_what_only_looks_like_talk_is_kept(sentence):
    for text in (f"{CAPTIONS[0]} {sentence}", f"{sentence} {CAPTIONS[0]}", f"{CAPTIONS[0]} {sentence} {CAPTIONS[1]}"):
        assert find_flaw(answer(text), DEFAULTS) is None


@pytest.mark.parametrize(("position", "reason", "template"), [(i, *row) for i, row in enumerate(BAD)])
def test_whatever_models_add_to_a_caption_is_a_flaw(position, reason, template):
    good = CAPTIONS[position % len(CAPTIONS)]
    for text in (readable(filled(template, good)), readable(good)):
        flaw = find_flaw(Answer(text, "stop", OPTIONS), DEFAULTS)
        assert (flaw.reason if flaw else None) == (reason if text != readable(good) else None), flaw
    assert len(BAD) >= len(CAPTIONS)


REASONING = [
    "<think>\nTwo people. I can't see the left one's hands.\n</think>\n\n{good}",
    "<thinking>Sure! Here is a caption: ...</thinking>{good}",
    "<Reasoning effort='low'>a <think>b</think> c</Reasoning> {good}",
    "{good}\n<think>That is 160 words.</think>",
    "[THINK]Two people.[/THINK]{good}",
    "◁think▷Two people.◁/think▷{good}",
    "<|channel|>analysis<|message|>Two people.<|end|><|start|>assistant<|channel|>final<|message|>{good}<|return|>",
    "<|start|>assistant<|channel|>analysis<|message|>Two.<|channel|>final <|constrain|>text<|message|>{good}",
    "<|channel|>analysis Two people. <|channel|>final {good}",
    "<|channel|>final<|message|>{good}<|return|>",
    "analysisThe user wants a paragraph.assistantfinal{good}",
]


@pytest.mark.parametrize("template", REASONING)
def test_closed_reasoning_is_cut_away_and_the_rest_is_judged(template):
    for good in (CAPTIONS[0], CAPTIONS[9]):
        thought = Answer(readable(template.replace("{good}", good)), "stop", OPTIONS)
        assert next_step([thought], DEFAULTS) == Accepted(tidy(good), OPTIONS)
        assert next_step([thought], CaptionRules(5, 20, OPTIONS, 0.5)).options["seed"] == 8  # too long: asked again
        spoilt = Answer(readable(template.replace("{good}", f"{good} Let me know if that helps.")), "stop", OPTIONS)
        assert find_flaw(spoilt, DEFAULTS).reason == "caption_closing"


def test_an_answer_that_is_only_thinking_says_what_to_do_and_gets_more_room():
    thought = Answer("", "thinking", OPTIONS)
    assert next_step([thought], DEFAULTS) == Ask(OPTIONS | {"num_predict": 800})
    detail = "the model answered only in its thinking; set captions.options.think: false or a larger num_predict"
    assert next_step([thought, thought], DEFAULTS) == Flaw("caption_only_thinking", detail, "room")


GERMAN = next(text for reason, text in BAD if text.startswith("Eine junge Frau"))
IN_GERMAN = "Beschreibe das Bild in einem Absatz, der alles nennt, was zu sehen ist, und nichts von dem, was fehlt."
CHINESE = next(text for reason, text in BAD if text.startswith("这张照片"))


@pytest.mark.parametrize(
    ("prompt", "text", "reason"),
    [
        (PROMPT, GERMAN, "caption_language"),
        (PROMPT, CHINESE, "caption_language"),
        (PROMPT + " Answer in German.", GERMAN, None),
        (PROMPT + " Antworte auf Deutsch.", GERMAN, None),
        (PROMPT + " Write it in English, never in German.", GERMAN, "caption_language"),
        (PROMPT + " 请用中文回答。", CHINESE, None),
        (IN_GERMAN,
         GERMAN, None),
        (IN_GERMAN,
         CAPTIONS[0], "caption_language"),
        ("请用一段话客观地描述这张照片。", CHINESE, None),
        ("请用一段话客观地描述这张照片。", CAPTIONS[0], "caption_language"),
        ("Caption:", GERMAN, None),  # nobody knows what language that is
        ("", CHINESE, None),
    ],
)  # fmt: skip
def test_the_language_is_one_that_the_prompt_has_or_names(prompt, text, reason):
    flaw = find_flaw(answer(text), CaptionRules(30, 300, OPTIONS, 0.5, prompt))
    assert (flaw.reason if flaw else None) == reason, flaw


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


@settings(deadline=None)
@given(st.lists(st.sampled_from("ab"), max_size=30))
def test_stutters_are_short_runs_that_follow_each_other(words):
    runs = {length: times for length, times in quality.STUTTERS.items() if length * times <= len(words)}
    assert has_stutter(words) == any(
        all(words[start + step] == words[start + step + length] for step in range(length * (times - 1)))
        for length, times in runs.items()
        for start in range(len(words) - length * times + 1)
    )


@settings(deadline=None)  # a busy machine proves nothing
@given(st.text())
def test_whatever_a_server_sends_is_one_line_of_valid_text_or_a_flaw(text):
    clean = tidy(text)
    assert clean.encode().decode() == clean
    assert tidy(clean) == clean
    assert "\n" not in clean
    assert flaw(text) is not None or len(clean.split()) >= 30


def test_what_is_looked_at_is_bounded():
    assert readable("a\r\n \n\n\n  b  c\u2028d ") == "a\n\nb c\nd"
    long = Answer(" ".join(f"{number}-{number}" for number in range(3000)), "stop", OPTIONS)
    assert find_flaw(long, RULES).reason == "caption_too_long"


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
