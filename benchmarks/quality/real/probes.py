"""Short questions that have one answer: whether a base still does what it could.

Three lines of a kind are shown, and the fourth is to be gone on with, as a plain text: what any
base does, with a chat template or without. None of it is arithmetic.
"""

from __future__ import annotations

import random

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Egypt": "Cairo",
    "Russia": "Moscow", "China": "Beijing", "Greece": "Athens", "Cuba": "Havana", "Iran": "Tehran",
    "Germany": "Berlin", "Austria": "Vienna", "Ireland": "Dublin", "Norway": "Oslo",
    "Poland": "Warsaw", "Peru": "Lima", "Kenya": "Nairobi", "Portugal": "Lisbon",
    "Canada": "Ottawa", "Thailand": "Bangkok",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "up": "down", "big": "small", "day": "night", "left": "right", "old": "new",
    "open": "closed", "fast": "slow", "happy": "sad", "early": "late", "full": "empty",
    "first": "last", "black": "white", "rich": "poor", "strong": "weak", "good": "bad",
    "long": "short", "light": "dark", "in": "out", "hard": "soft",
}  # fmt: skip
PAST = {
    "go": "went", "see": "saw", "take": "took", "give": "gave", "run": "ran", "eat": "ate",
    "come": "came", "make": "made", "write": "wrote", "know": "knew", "find": "found",
    "think": "thought", "buy": "bought", "speak": "spoke", "begin": "began", "fall": "fell",
    "sing": "sang", "keep": "kept", "lose": "lost", "build": "built",
}  # fmt: skip
PLURALS = {
    "mouse": "mice", "child": "children", "foot": "feet", "man": "men", "woman": "women",
    "goose": "geese", "leaf": "leaves", "city": "cities", "box": "boxes", "knife": "knives",
    "baby": "babies", "wolf": "wolves", "story": "stories", "bus": "buses", "tooth": "teeth",
    "shelf": "shelves", "hero": "heroes", "party": "parties", "wife": "wives", "dish": "dishes",
}  # fmt: skip
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = [
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
]  # fmt: skip
KINDS = {
    "capital": CAPITALS,
    "opposite": OPPOSITES,
    "past": PAST,
    "plural": PLURALS,
    "next": {day: follows for week in (DAYS, MONTHS)
             for day, follows in zip(week, [*week[1:], week[0]], strict=True)},
    "same": {word: word for word in (*OPPOSITES, *PAST)},
}  # fmt: skip
SHOWN = 3


def probes(each: int, seed: int = 0) -> list[tuple[str, str]]:
    """Prompt and answer, `each` of every kind: three facts, a word; its fact."""
    made, chance = [], random.Random(seed)
    for facts in KINDS.values():
        asked = chance.sample(sorted(facts), min(each, len(facts)))
        for word in asked:
            others = [other for other in sorted(facts) if other != word]
            shown = "".join(f"{w}: {facts[w]}\n" for w in chance.sample(others, SHOWN))
            made.append((f"{shown}{word}:", f" {facts[word]}"))
    return made
