"""Whether an answer is in a language that the prompt asks for: by its script, and by its small words.

A few words in another script or language are none of the model's: they are read off the picture. Where the prompt's
language is not known nothing is said of languages that share its script.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from functools import lru_cache

HAN = ("CJK", "HIRAGANA", "KATAKANA", "BOPOMOFO", "IDEOGRAPHIC")
UNSPACED = ("HAN", "HANGUL", "THAI", "LAO", "KHMER", "MYANMAR")  # whose letters are counted, instead of words
LETTERS, ENDING_LETTERS, SENTENCE_LETTERS = 12, 6, 4  # of another script in a row that are a second language
WORDS, ENDING_WORDS = 6, 4
LONG_SENTENCE = 6  # words from which a sentence is looked at
SMALL_WORDS = 3  # of another language in a sentence, at least
FULL_STOPS = "。！？，、；"
SENTENCE = re.compile(r"[^.!?…\n]+")
LETTER_RUN = re.compile(r"[^\W\d_]+")

# Words that are frequent in any text. One that two languages share says the same of both.
_SMALL = {
    "en": "the of and with is are in to on at that his her from which while by an it its has as there into their",
    "de": "der die das und ist sind mit einem einer eine ein einen eines auf den dem von im nicht sich des zu zur aus "
    "trägt hat sein seine ihre durch über vor hinter unter links rechts wird",
    "fr": "le la les des et est sont avec une un dans du sur qui au aux pas il elle son sa ses ne à en par pour porte "
    "ce cette derrière devant à gauche droite",
    "es": "el la los las y es son con una un en del sobre que por su sus al se lo de lleva tiene está están hacia "
    "detrás",
    "it": "il lo la gli le e è sono con una un nel nella del della dei delle su sul sulla che per di si da al alla "
    "indossa ha dietro davanti",
    "pt": "o a os as e é são com uma um no na nos nas do da dos das em que por seu sua para ao à está estão veste tem",
    "nl": "de het een en is zijn met van op in dat die niet aan bij door naar voor achter draagt haar zijn onder links "
    "rechts wordt",
    "pl": "i w z na się jest są do nie ze po za od który która oraz ma przy pod nad jego jej",
    "cs": "a v na se je jsou s z do ne ve za od který která má při pod nad jeho její",
    "sv": "och är med en ett på i av som den det till har inte vid från bakom framför sin hans hennes",
    "da": "og er med en et på i af som den det til har ikke ved fra bag foran sin hans hendes",
    "tr": "ve bir bu ile için olan çok var gibi üzerinde içinde arkasında sağ sol da de",
    "id": "dan di yang dengan ini itu untuk dari pada ke seorang sebuah tidak adalah dalam oleh memakai",
    "vi": "và là của một có trong với người được đang không này cho ở trên các những màu",
    "ro": "și este sunt cu o un în din pe care la nu de al ale lui ei sa are",
    "hu": "és a az egy van nem hogy meg is egyik másik mögött előtt alatt",
    "fi": "ja on ei se hän että joka ovat sekä oli jossa takana edessä",
}
SMALL = {name: frozenset(words.split()) for name, words in _SMALL.items()}
# languages by what prompts call them, and their script
_NAMES = {
    "en": ("LATIN", "english englisch anglais inglés inglese inglês engels angielsk английск 英文 英语 英語 영어"),
    "de": ("LATIN", "german deutsch allemand alemán tedesco alemão duits niemieck немецк 德文 德语 ドイツ語 독일어"),
    "fr": (
        "LATIN",
        "french französisch français francés francese francês frans francusk французск 法文 法语 フランス語",
    ),
    "es": ("LATIN", "spanish spanisch espagnol español castellano spagnolo espanhol spaans испанск 西班牙 スペイン語"),
    "it": ("LATIN", "italian italienisch italien italiano italiaans итальянск 意大利 イタリア語"),
    "pt": ("LATIN", "portuguese portugiesisch portugais portugués portoghese português portugees португальск 葡萄牙"),
    "nl": ("LATIN", "dutch niederländisch holländisch néerlandais neerlandés olandese holandês nederlands нидерландск"),
    "pl": ("LATIN", "polish polnisch polonais polaco polacco polonês polsk польск"),
    "cs": ("LATIN", "czech tschechisch tchèque checo ceco česk"),
    "sv": ("LATIN", "swedish schwedisch suédois sueco svedese svenska"),
    "da": ("LATIN", "danish dänisch danois danés danese dansk norwegian norwegisch norsk"),
    "tr": ("LATIN", "turkish türkisch turc turco türkçe"),
    "id": ("LATIN", "indonesian indonesisch indonésien bahasa"),
    "vi": ("LATIN", "vietnamese vietnamesisch vietnamien tiếng"),
    "ro": ("LATIN", "romanian rumänisch roumain română"),
    "hu": ("LATIN", "hungarian ungarisch hongrois magyar"),
    "fi": ("LATIN", "finnish finnisch finnois suomi suomeksi"),
    "zh": (
        "HAN",
        "chinese mandarin chinesisch chinois chino cinese chinês китайск 中文 汉语 漢語 普通话 중국어 中国語",
    ),
    "ja": ("HAN", "japanese japanisch japonais japonés giapponese японск 日文 日语 日本語 일본어"),
    "ko": ("HANGUL", "korean koreanisch coréen coreano корейск 韩文 韩语 韓国語 한국어"),
    "ru": ("CYRILLIC", "russian russisch russe ruso russo русск 俄语 ロシア語"),
    "uk": ("CYRILLIC", "ukrainian ukrainisch українськ"),
    "ar": ("ARABIC", "arabic arabisch arabe árabe العربية"),
    "hi": ("DEVANAGARI", "hindi हिन्दी हिंदी"),
    "he": ("HEBREW", "hebrew hebräisch עברית"),
    "el": ("GREEK", "greek griechisch ελληνικ"),
    "th": ("THAI", "thai ไทย"),
}
NOT = re.compile(r"\b(?:not|never|no|without|avoid|nicht|kein\w*|pas|sin|non|не)\b[^.!?\n]{0,25}$", re.IGNORECASE)


@lru_cache(maxsize=8)
def expected(prompt: str) -> tuple[frozenset[str], frozenset[str]]:
    """Return the scripts and the languages that answers to a prompt may have: its own, and those that it names.

    No scripts where the prompt has no letters, no languages where its own is not known.
    """
    scripts = {dominant_script(prompt)} - {""}
    own = language_of(prompt) if scripts == {"LATIN"} else None
    named = set()
    lower = prompt.lower()
    for language, (script, names) in _NAMES.items():
        places = [lower.find(name) for name in names.split()]
        if any(place >= 0 and not NOT.search(prompt[:place]) for place in places):
            named.add(language)
            scripts.add(script)
    return frozenset(scripts), frozenset({own} | named) if own else frozenset()


def second_language(text: str, prompt: str) -> str:
    """Return the first words of a text that are in no language which the prompt asks for; "" where there are none.

    ``text`` is without what is quoted. Without a prompt only a second script is one.
    """
    scripts, languages = expected(prompt)
    scripts = scripts or frozenset({dominant_script(text)} - {""})
    if scripts and (found := _other_script(text, scripts)):
        return found
    if not languages or "LATIN" not in scripts:
        return ""
    for match in SENTENCE.finditer(text):
        words = LETTER_RUN.findall(match.group().lower())
        language = language_of(match.group())
        if len(words) >= LONG_SENTENCE and language and language not in languages:
            ours = max(sum(word in SMALL.get(name, ()) for word in words) for name in languages)
            if sum(word in SMALL[language] for word in words) > 2 * ours:
                return match.group().strip()
    return ""


def language_of(text: str) -> str | None:
    """Return the language in Latin script whose small words are most in a text; None where that is not clear."""
    words = LETTER_RUN.findall(text.lower())
    counts = Counter({name: sum(word in small for word in words) for name, small in SMALL.items()})
    (first, most), (_, second) = counts.most_common(2)
    distinct = len(SMALL[first].intersection(words))
    clear = distinct >= SMALL_WORDS and most > second and most >= 0.15 * len(words)
    return first if clear else None


def dominant_script(text: str) -> str:
    """Return the script that most letters of a text have; "" for a text without letters."""
    counts = Counter(script_of(letter) for letter in text if letter.isalpha())
    return max(sorted(counts), key=lambda name: counts[name], default="")


@lru_cache(maxsize=4096)
def script_of(letter: str) -> str:
    """Return the script of a letter, the first word of its name in Unicode; one name for those of China and Japan."""
    if letter < "\u0250":
        return "LATIN"
    name = unicodedata.name(letter, "").removeprefix("FULLWIDTH ").removeprefix("HALFWIDTH ").partition(" ")[0]
    return "HAN" if name.partition("-")[0] in HAN else name


def _other_script(text: str, scripts: frozenset[str]) -> str:
    """Return the first run of letters in other scripts that is longer than what is read off a picture."""
    start, end, script = -1, 0, ""
    for position, letter in enumerate(text + "\n"):
        inside = letter.isalpha() and script_of(letter) not in scripts
        if inside:
            start, script = (position, script_of(letter)) if start < 0 else (start, script)
            end = position + 1
        elif start >= 0 and (letter.isalpha() or letter == "\n"):
            if _is_language(text[start:position], script, ends=not any(map(str.isalpha, text[end:]))):
                return text[start:end]
            start = -1
    return ""


def _is_language(run: str, script: str, ends: bool) -> bool:
    if script in UNSPACED:
        count = sum(map(str.isalpha, run))
        limit = ENDING_LETTERS if ends else LETTERS
        return count >= limit or (count >= SENTENCE_LETTERS and any(stop in run for stop in FULL_STOPS))
    return len(LETTER_RUN.findall(run)) >= (ENDING_WORDS if ends else WORDS)
