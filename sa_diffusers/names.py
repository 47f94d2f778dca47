"""When a text names something: in any script, normal form and case, however its words are joined, plurals included."""

import re
import unicodedata
from functools import lru_cache

ARTICLES = ("a", "an", "the")
# Written between the words of a name: spaces, underscores, hyphens, full stops, the dots and bars of names in other
# scripts. All dashes have become hyphens, and all middle dots one.
_JOINTS = r"[\s_\-.·=]"
_MIDDLE_DOTS = dict.fromkeys(map(ord, "·‧•∙⋅・･ꞏ᛫"), "·")
_APOSTROPHES = dict.fromkeys(map(ord, "’‘ʼ`´＇‛"), "'")
# Scripts without spaces between words: Han, Kana, Bopomofo, Yi; Thai, Lao, Tibetan, Myanmar, Khmer.
_UNSPACED = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3041-\u30fa\u30fc-\u31bf"
    "\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\ua000-\ua4cf\uf900-\ufaff\U00020000-\U0003ffff]"
)
_HANGUL = re.compile("[\u1100-\u11ff\u3131-\u318e\uac00-\ud7a3]")
# Marks that Arabic and Hebrew may leave out, and Arabic's lengthening of words.
_OPTIONAL_MARKS = re.compile("[\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u0640\u064b-\u065f\u0670]")
# A hyphenated word is one word, but what is "Picasso-style" names Picasso.
_SUFFIXES = ("style", "styled", "like", "inspired", "themed", "esque", "shaped", "type")
_IRREGULAR = {
    "person": "people", "child": "children", "foot": "feet", "tooth": "teeth", "goose": "geese", "mouse": "mice",
    "ox": "oxen", "knife": "knives", "wife": "wives", "life": "lives", "leaf": "leaves", "wolf": "wolves",
    "shelf": "shelves", "half": "halves", "calf": "calves", "loaf": "loaves", "scarf": "scarves", "thief": "thieves",
    "elf": "elves",
}  # fmt: skip
_SINGULAR = {plural: singular for singular, plural in _IRREGULAR.items()}
# They look like plurals of other words.
_NO_PLURALS = {"news", "glasses", "shorts", "jeans", "pants", "arms", "goods", "mars", "series", "species", "lens"}


def normalised(text: str) -> str:
    """A text as names are compared: compatible forms and case are one, what cannot be seen is gone."""
    text = unicodedata.normalize("NFKC", text.translate(_APOSTROPHES | _MIDDLE_DOTS)).casefold()
    text = unicodedata.normalize("NFKC", text).translate(_APOSTROPHES | _MIDDLE_DOTS)
    kept = []
    for letter in _OPTIONAL_MARKS.sub("", text):
        category = unicodedata.category(letter)
        if category == "Pd" or letter == "\u2212":
            kept.append("-")
        elif category not in ("Cf", "Cc", "Cs") and not "\ufe00" <= letter <= "\ufe0f" or letter.isspace():
            kept.append(letter)
    return "".join(kept)


def says_something(text: str) -> bool:
    """Whether a text holds a letter, a digit or a picture, and not punctuation and blanks alone."""
    return any(unicodedata.category(letter)[0] in "LN" or unicodedata.category(letter) == "So" for letter in text)


def bare_name(text: str) -> str:
    """A phrase in small letters and without its article: what two names have in common that mean the same."""
    words = normalised(text).split()
    return " ".join(words[1:] if len(words) > 1 and words[0] in ARTICLES else words)


def name_key(text: str) -> str:
    """What all spellings of a phrase have in common, however its words are joined."""
    return re.sub(_JOINTS, "", bare_name(text)) or bare_name(text)


def names_concept(prompt: str, concept: str) -> bool:
    """Whether a prompt names the concept as whole words, possessive and plural included.

    Case, normal form and width of the letters do not matter, nor whether the concept's words are joined by blanks,
    `_`, `-`, a middle dot or nothing; accents do. Scripts without spaces have no whole words: there the name may stand
    inside a run of characters. A hyphenated word is one word: "t-shirt" does not name "shirt".
    """
    text = normalised(prompt)
    pattern, several = _pattern(concept)
    if pattern is None:
        return False
    start = 0
    while match := pattern.search(text, start):
        if _is_whole(text, match.start(), match.end(), several):
            return True
        start = match.start() + 1
    return False


def _unspaced(letter: str) -> bool:
    return _UNSPACED.match(letter) is not None


def _part_of_word(letter: str) -> bool:
    return (letter.isalnum() or unicodedata.category(letter)[0] == "M") and not _unspaced(letter)


def _is_whole(text: str, start: int, end: int, several: bool) -> bool:
    """Whether what was found at `[start, end)` is no part of a longer word."""
    before, after = text[start - 1 : start], text[end : end + 1]
    if before and not _unspaced(text[start]) and (_part_of_word(before) or before == "-" and not several
                                                  and _part_of_word(text[max(start - 2, 0)])):  # fmt: skip
        return False
    last = text[end - 1]
    # Korean particles follow without a space.
    if not after or _unspaced(last) or (_HANGUL.match(last) and _HANGUL.match(after)):
        return True
    if _part_of_word(after):
        return False
    if after != "-" or several or not _part_of_word(text[end + 1 : end + 2] or " "):
        return True
    return re.match(rf"-(?:{'|'.join(_SUFFIXES)})(?!\w)", text[end:]) is not None


@lru_cache(maxsize=4096)
def _pattern(concept: str) -> tuple[re.Pattern | None, bool]:
    """What finds a concept in a normalised text, and whether it is several words."""
    name = bare_name(concept)
    words = [word for word in re.split(rf"{_JOINTS}+", name) if word]
    if not words:
        return (re.compile(re.escape(name)) if says_something(name) else None), False
    *first, last = words
    endings = "|".join(re.escape(form) for form in sorted(word_forms(last), key=len, reverse=True))
    if any(_unspaced(letter) or _HANGUL.match(letter) for letter in last):
        endings = _spread(last)
    parts = [*(_spread(word) for word in first), rf"(?:{endings})(?:'s)?"]
    return re.compile(rf"{_JOINTS}*".join(parts)), len(words) > 1


def _spread(word: str) -> str:
    """Where words are not divided by spaces, the parts of a name may be, anywhere."""
    pattern = ""
    for before, letter in zip(" " + word, word, strict=False):
        free = all(_unspaced(each) or _HANGUL.match(each) for each in (before, letter))
        pattern += (rf"{_JOINTS}*" if free else "") + re.escape(letter)
    return pattern


def word_forms(word: str) -> set[str]:
    """A word, its plural, and what it may be the plural of."""
    forms = {word, f"{word}s", f"{word}es"}
    if word in _IRREGULAR:
        forms.add(_IRREGULAR[word])
    if word in _SINGULAR:
        forms.add(_SINGULAR[word])
    if word.endswith("man") and word not in ("human", "german", "roman"):
        forms.add(f"{word[:-3]}men")
    if word.endswith("men") and word not in ("specimen", "abdomen", "omen", "semen"):
        forms.add(f"{word[:-3]}man")
    if len(word) > 2 and word[-1] == "y" and word[-2] not in "aeiou":
        forms.add(f"{word[:-1]}ies")
    if word in _NO_PLURALS or len(word) < 4 or not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return forms
    forms.add(word[:-1])
    if word.endswith("ies"):
        forms.add(f"{word[:-3]}y")
    if word.endswith(("xes", "ches", "shes", "sses", "zes", "oes")):
        forms.add(word[:-2])
    return forms
