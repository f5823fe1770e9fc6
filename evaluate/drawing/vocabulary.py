"""The words that edits of captions of people and photographs exchange, by kind, and the user's own pairs from a file.

Each entry says by what a word may be replaced and what must follow it for the rule to be sure. Captions of the built-in
figures have rules of their own in :mod:`evaluate.drawing.edits`, whose choices these do not touch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from nanodit.errors import ConfigError

ChangeType = Literal["attribute", "opposite"]
TYPES = ("attribute", "opposite")


@dataclass(frozen=True)
class Swap:
    """A word, or several, and what may stand instead; ``follows`` are words of which one must come next, or none.

    ``last``: used where nothing surer applies, as other garments and objects are.
    """

    kind: str
    type: ChangeType
    word: str
    others: tuple[str, ...]
    follows: str = ""
    last: bool = False


_PEOPLE = "man woman person people boy girl child lady gentleman figure couple adult men women male female"
_LIGHT = "light lighting sunlight illumination glow shadows daylight"
_SHOT = "portrait shot photograph photo view image picture perspective framing composition"
_HAIR = "hair curls locks ponytail bun braid braids fringe bangs waves strands"
_GARMENTS = (
    "shirt blouse sweater t-shirt hoodie cardigan jacket coat blazer dress skirt trousers pants jeans shorts scarf hat "
    "cap tie suit vest top apron sweatshirt tank uniform robe"
)
_OBJECTS = (
    "table chair cushion cushions pillow pillows blanket rug carpet cup mug vase bowl plate plates flowers flower rose "
    "roses umbrella boat van truck bus bench fence roof tiles house box towel lamp apron cart tractor sign tent kayak "
    "helmet balloon balloons ribbon shutters awning tablecloth stool armchair bucket basket notebook folder suitcase"
)
_COLOURS = "red orange yellow green blue purple pink white black brown grey"

# kind, type, words that may stand for one another, what must follow
_GROUPS: tuple[tuple[str, ChangeType, str, str, bool], ...] = (
    ("hair colour", "attribute", "brunette blonde", "", False),
    ("hair colour", "attribute", "dark-haired fair-haired red-haired grey-haired", "", False),
    ("hair colour", "attribute", "auburn chestnut platinum blonde", _HAIR, False),
    ("pattern", "attribute", "striped checked floral polka-dot plaid", _GARMENTS, False),
    ("material", "attribute", "denim leather woollen linen cotton", _GARMENTS, False),
    ("eyes", "attribute", "brown blue green", "eyes", False),
    ("material", "attribute", "wooden metal stone glass plastic", "table chair bench door fence bowl box floor", False),
    ("colour", "attribute", _COLOURS, _OBJECTS, True),
    ("clothing", "attribute", "shirt blouse sweater hoodie cardigan", "", True),
    ("clothing", "attribute", "jacket coat blazer", "", True),
    ("clothing", "attribute", "trousers jeans shorts leggings", "", True),
    ("clothing", "attribute", "hat cap beanie", "", True),
    ("clothing", "attribute", "sneakers boots sandals loafers", "", True),
    ("object", "attribute", "cup mug glass bottle", "", True),
    ("object", "attribute", "dog cat", "", True),
    ("object", "attribute", "guitar violin", "", True),
    ("object", "attribute", "newspaper book magazine", "", True),
    ("object", "attribute", "sofa armchair bench", "", True),
    ("object", "attribute", "bicycle motorcycle", "", True),
    ("object", "attribute", "bread fruit flowers", "", True),
    ("object", "attribute", "lake river sea", "", True),
)

# kind, words and their opposites in pairs, what must follow
_PAIRS: tuple[tuple[str, str, str], ...] = (
    ("hair", "curly/straight wavy/straight tousled/sleek shoulder-length/waist-length", _HAIR),
    ("hair", "bearded/clean-shaven", ""),
    ("age", "elderly/young middle-aged/young young/elderly teenage/elderly older/younger", _PEOPLE),
    ("age", "youthful/aged wrinkled/smooth", "appearance face features skin hands complexion"),
    ("age", "twenties/sixties thirties/seventies forties/twenties fifties/twenties sixties/twenties", ""),
    ("light", "soft/harsh warm/cold diffused/hard", _LIGHT),
    ("light", "bright/dim natural/artificial", _LIGHT),
    ("light", "bright/dark", "room interior space background sky"),
    ("light", "overcast/clear cloudy/clear clear/cloudy", "sky day"),
    ("light", "daytime/night-time sunlit/moonlit", ""),
    ("framing", "close-up/wide-angle medium/wide wide/close full-length/close-up full-body/close-up", _SHOT),
    ("framing", "low/high high/low low-angle/high-angle high-angle/low-angle", "angle viewpoint"),
    ("framing", "vertical/horizontal horizontal/vertical", "orientation format frame composition"),
    ("framing", "blurred/sharp sharp/blurred blurry/sharp", "background foreground"),
    ("posture", "seated/standing kneeling/standing crouching/standing reclining/standing", ""),
    ("expression", "serious/smiling neutral/smiling calm/angry", "expression face look gaze"),
    ("expression", "smiling/serious", ""),
    ("place", "indoor/outdoor outdoor/indoor", ""),
    ("place", "crowded/empty empty/crowded busy/deserted", "street square room beach market platform café"),
    ("build", "slender/stocky stocky/slender", "build frame figure"),
)


def _swaps() -> Iterator[Swap]:
    for kind, type, words, follows, last in _GROUPS:
        for word in words.split():
            yield Swap(kind, type, word, tuple(other for other in words.split() if other != word), follows, last)
    for kind, pairs, follows in _PAIRS:
        for word, _, opposite in (pair.partition("/") for pair in pairs.split()):
            yield Swap(kind, "opposite", word, (opposite,), follows)


VOCABULARY = tuple(_swaps())


def load_pairs(file: str) -> tuple[Swap, ...]:
    """Read the user's own pairs: a mapping ``brunette: blonde``, or a list of pairs or ``{from, to, type}``.

    ``type`` is ``attribute`` (the default) or ``opposite``. Raises :class:`ConfigError` naming the line.
    """
    path = Path(file)
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise ConfigError(f"edit.edits: {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"edit.edits: {file}: not UTF-8 text") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"edit.edits: {file}{line}: not YAML: {getattr(error, 'problem', error)}") from None
    if isinstance(root, yaml.MappingNode):
        nodes = [({"from": one, "to": other}, one) for one, other in root.value]
    elif isinstance(root, yaml.SequenceNode):
        nodes = [(_fields(file, node), node) for node in root.value]
    else:
        raise ConfigError(f"edit.edits: {file}, line 1: write pairs: a mapping FROM: TO, or a list of [FROM, TO]")
    found: dict[tuple[str, str], Swap] = {}
    for fields, node in nodes:
        swap = _swap(file, fields, node)
        if found.setdefault((swap.type, swap.word.lower()), swap) is not swap:
            raise _wrong(file, node, f"{swap.word} is there twice")
    if not found:
        raise ConfigError(f"edit.edits: {file}: holds no pair")
    return tuple(found.values())


def _fields(file: str, node: yaml.Node) -> Mapping[str, yaml.Node]:
    if isinstance(node, yaml.SequenceNode) and len(node.value) == 2:
        return dict(zip(("from", "to"), node.value))
    if isinstance(node, yaml.MappingNode):
        fields = {str(key.value): value for key, value in node.value}
        if {"from", "to"} <= set(fields) <= {"from", "to", "type"} and len(fields) == len(node.value):
            return fields
    raise _wrong(file, node, "write [FROM, TO], or {from: FROM, to: TO, type: attribute}")


def _swap(file: str, fields: Mapping[str, yaml.Node], node: yaml.Node) -> Swap:
    words = {}
    for name, value in fields.items():
        if not isinstance(value, yaml.ScalarNode) or not value.value.strip():
            raise _wrong(file, value, f"`{name}` must be words")
        words[name] = " ".join(value.value.split())
    type = words.get("type", "attribute")
    if type not in TYPES:
        raise _wrong(file, fields["type"], f"unknown type {type}; known: {', '.join(TYPES)}")
    if words["from"].lower() == words["to"].lower():
        raise _wrong(file, node, f"{words['from']} is replaced by itself")
    return Swap("own pair", type, words["from"], (words["to"],))


def _wrong(file: str, node: yaml.Node, what: str) -> ConfigError:
    return ConfigError(f"edit.edits: {file}, line {node.start_mark.line + 1}: {what}")
