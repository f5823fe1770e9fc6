"""Captions of figures: grammatical, varied, from a closed vocabulary.

Left and right are the figure's own, except where a phrase says "of the picture" (or "its", of the picture). A colour
always stands directly before the noun it belongs to ("a red jumper", "black hair"), under exactly the palette's name.
"""

from __future__ import annotations

import re

from prep.figures.scene import (
    BACKGROUND_COLOURS,
    BUILDS,
    HAIR_COLOURS,
    HAIR_STYLES,
    OBJECTS,
    SKIN_COLOURS,
    TOP_COLOURS,
    TROUSERS_COLOURS,
    Dice,
    Scene,
)

# Words a caption may have: detailed, and short enough for 64 tokens with punctuation (one padding step of the trainer).
DETAILED_WORDS, SHORT_WORDS = (60, 200), (48, 54)

_TOP_NOUNS = {"jumper": ("jumper", "sweater"), "shirt": ("shirt",), "top": ("top", "tee")}
_TOP_DETAILS = {"jumper": "with long sleeves", "shirt": "with a collar", "top": "with short sleeves"}
_TROUSERS_NOUNS = ("trousers", "pants")
_WALL_NOUNS = ("wall", "background", "backdrop")
_HAIR = {
    "short": ("short {c} hair", "{c} hair cut short"),
    "long": ("long {c} hair", "{c} hair that falls over the shoulders"),
    "curly": ("curly {c} hair", "{c} hair full of curls"),
    "bun": ("{c} hair in a bun", "{c} hair tied up in a bun"),
    "pigtails": ("{c} hair in pigtails", "{c} hair tied in two pigtails"),
}
_LEGS = {
    "straight": ("stands", "stands upright", "stands with straight legs"),
    "apart": ("stands with legs apart", "stands with feet wide apart"),
    "walking": ("walks to {p} {lead}", "takes a step to {p} {lead}"),
    "lifted": ("lifts {p} {lead} knee", "stands on one leg with the {lead} knee lifted"),
    "lunge": ("bends {p} {lead} knee deeply", "leans into a lunge on the {lead} leg"),
    "jumping": ("jumps with bent knees", "leaps off the floor"),
    "sitting": ("sits on a wooden stool", "is sitting on a stool"),
}
_FREE_ARM = {
    "down": ("{P} {free} arm hangs down at {p} side.", "{P} {free} arm is relaxed by {p} side."),
    "hip": ("{P} {free} hand rests on {p} hip.", "{S} keeps {p} {free} hand on the hip."),
    "wave": ("{S} waves with {p} {free} hand.", "{P} {free} hand is waving."),
    "raised": ("{P} {free} arm is raised high.", "{S} holds {p} {free} arm up in the air."),
    "out": ("{P} {free} arm is stretched out to the side.", "{S} holds {p} {free} arm straight out to the side."),
}
_HELD_ARM = {
    "low": ("with the arm held low", "with the arm down"),
    "bent": ("with the elbow bent", "with a bent arm"),
    "raised": ("with the arm raised high", "high above the head"),
    "out": ("with the arm stretched out to the side", "far out to the side"),
}
_PLACE = {
    "left": "on the left of the picture",
    "right": "on the right of the picture",
    "centre": "in the centre of the picture",
}
_VIEW = {
    "full": (
        "{S} is shown from head to toe {place}.",
        "The whole body can be seen {place}.",
        "{S} is seen in full {place}.",
    ),
    "closer": (
        "{S} is shown from the shins up {place}.",
        "The picture ends above {p} feet and {s} is {place}.",
        "{S} is seen from close by {place}, without the feet.",
    ),
}
_LIGHT = {
    "left": ("Soft light comes from the left of the picture.", "The picture is lit from its left."),
    "right": ("Soft light comes from the right of the picture.", "The picture is lit from its right."),
    "above": ("Soft light comes from above.", "The picture is lit from above."),
    "even": ("The light is soft and even.", "Even light fills the picture."),
}
_GAZE = {
    "ahead": ("{S} looks straight ahead and smiles.", "{S} smiles straight at the viewer."),
    "left": ("{S} looks to {p} left and smiles.", "{P} face is turned a little to {p} left."),
    "right": ("{S} looks to {p} right and smiles.", "{P} face is turned a little to {p} right."),
}
_LOOKS = (
    "{S} has {skin} skin and a {build} build.",
    "{S} has a {build} build and {skin} skin.",
    "With {skin} skin and a {build} build, {s} looks friendly.",
)
_OPENING = (
    "A {person} with {hair} {pose} in front of {wall}.",
    "In front of {wall}, a {person} with {hair} {pose}.",
    "This is a drawing of a {person} with {hair} who {pose} in front of {wall}.",
)
_CLOTHES = (
    "{S} wears {top} and {trousers}.",
    "{S} is dressed in {trousers} and {top}.",
    "{P} clothes are {top} and {trousers}.",
    "{S} has {top} and {trousers} on.",
)
_HELD = (
    "In {p} {hand} hand {s} holds {thing}, {arm}.",
    "{S} holds {thing} in {p} {hand} hand, {arm}.",
    "{P} {hand} hand holds {thing}, {arm}.",
    "{S} carries {thing} in {p} {hand} hand, {arm}.",
)
_EXTRAS = (
    "The drawing is simple and clear, with clean lines and flat colours.",
    "A soft shadow lies on the floor below.",
    "The floor has the same colour as the wall, only a little darker.",
    "Nothing else is in the room.",
    "It is a friendly picture of one person.",
    "The shoes are dark.",
)


def scene_caption(scene: Scene, dice: Dice, short: bool = False) -> str:
    """Describe a scene in 60 to 130 words, or in 48 to 54 when ``short``; the wording comes from ``dice``.

    Every caption names hair, background, legs, top, trousers, held object and hand, and what the other arm does; a
    detailed one adds place, light, gaze, skin and build, and a short one as many of these as fit.
    """
    low, high = SHORT_WORDS if short else DETAILED_WORDS
    for _ in range(100):
        opening, core, details = _sentences(scene, dice, short)
        spare = dice.shuffled(_EXTRAS)
        if short:  # fill up with what fits
            body = list(core)
            for sentence in [*details, *spare]:
                if _count(opening, *body, sentence) <= high:
                    body.append(sentence)
        else:
            body = [*core, *details, *spare[: int(dice.uniform(0, 3))]]
        caption = " ".join([opening, *dice.shuffled(body)])
        if low <= _count(caption) <= high:
            return caption
    raise AssertionError(f"no wording of {low} to {high} words for {scene.attributes}")


def _sentences(scene: Scene, dice: Dice, short: bool) -> tuple[str, list[str], list[str]]:
    """Return the opening, the sentences that every caption has, and those that say more."""
    words = _words(scene, dice, short)

    def say(templates: tuple[str, ...]) -> str:
        return dice.pick(templates).format(**words)

    free_arm = scene.right_arm if scene.held_hand == "left" else scene.left_arm
    core = [say(_CLOTHES), say(_HELD), say(_FREE_ARM[free_arm])]
    details = [say(_VIEW[scene.framing]), say(_LIGHT[scene.light]), say(_GAZE[scene.gaze]), say(_LOOKS)]
    return say(_OPENING), core, details


def _words(scene: Scene, dice: Dice, short: bool) -> dict[str, str]:
    """Return what the fields of the templates stand for in this scene."""
    subject, possessive = ("she", "her") if scene.person == "woman" else ("he", "his")
    free = "right" if scene.held_hand == "left" else "left"
    held_arm = scene.left_arm if scene.held_hand == "left" else scene.right_arm
    top = f"a {scene.top} {dice.pick(_TOP_NOUNS[scene.top_style])}"
    if not short and dice.uniform(0, 1) < 0.5:
        top += f" {_TOP_DETAILS[scene.top_style]}"
    article = "an" if scene.background[0] in "aeiou" else "a"
    pronouns = {"s": subject, "S": subject.capitalize(), "p": possessive, "P": possessive.capitalize()}
    return pronouns | {
        "person": scene.person,
        "hair": dice.pick(_HAIR[scene.hair_style]).format(c=scene.hair),
        "pose": dice.pick(_LEGS[scene.legs]).format(p=possessive, lead=scene.leading_leg),
        "wall": f"{article} {scene.background} {dice.pick(_WALL_NOUNS)}",
        "top": top,
        "trousers": f"{scene.trousers} {dice.pick(_TROUSERS_NOUNS)}",
        "hand": scene.held_hand,
        "free": free,
        "thing": f"a {scene.held_colour} {scene.held_object}",
        "arm": dice.pick(_HELD_ARM[held_arm]),
        "place": _PLACE[scene.placement],
        "skin": scene.skin,
        "build": scene.build,
    }


def _count(*texts: str) -> int:
    return sum(len(text.split()) for text in texts)


def _vocabulary() -> tuple[str, ...]:
    groups = (_TOP_NOUNS, _HAIR, _LEGS, _FREE_ARM, _HELD_ARM, _VIEW, _LIGHT, _GAZE)
    phrases = [phrase for group in groups for choices in group.values() for phrase in choices]
    phrases += [*_TOP_DETAILS.values(), *_PLACE.values(), *_TROUSERS_NOUNS, *_WALL_NOUNS]
    phrases += [*_LOOKS, *_OPENING, *_CLOTHES, *_HELD, *_EXTRAS]
    phrases += [*TOP_COLOURS, *TROUSERS_COLOURS, *HAIR_COLOURS, *BACKGROUND_COLOURS, *SKIN_COLOURS]
    phrases += [*HAIR_STYLES, *BUILDS, *OBJECTS, "left right she he her his a an"]
    text = re.sub(r"\{\w+\}", " ", " ".join(phrases))
    return tuple(sorted(set(re.findall("[a-z]+", text.lower()))))


# Every word that a caption can hold, in lower case and sorted. Captions consist of these words, single spaces, full
# stops and commas; only the first letter of a sentence is a capital. There are no digits, hyphens or apostrophes, so
# that ``re.findall("[a-z]+|[.,]", caption.lower())`` loses nothing but spaces and capitals.
VOCABULARY: tuple[str, ...] = _vocabulary()
