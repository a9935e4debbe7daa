"""A seeded generator of short children's stories: the training text of the small model that ships in the package.

A story follows one of the plots of `story_words`. A plot is a template with several cases; a case holds the facts that
belong together (what is lost, who has it, why, and how it comes back), so that a story stays logical however it is
worded.

The template language:

* ``[a|b|c]`` picks one alternative, which may be empty and may hold further choices;
* ``{slot}`` is a fact of the story, worded once and then the same everywhere; ``{He}`` is ``{he}`` in upper case;
* ``{~pool}`` is a fresh wording from `story_words.POOLS`;
* a blank line ends a paragraph. "a" before a vowel becomes "an", and a sentence start gets its capital, at the end.

Only `random.Random.random` is drawn from, whose stream is the same on every machine and Python version.
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from llamajax.box import story_words as words

T = TypeVar("T")


def _parse_cases(text: str) -> tuple[dict[str, str], ...]:
    """Reads blocks of ``key: value`` lines; an indented line continues the value before it."""
    cases = []
    for block in text.strip().split("\n\n"):
        joined = re.sub(r"\n\s+", " ", block)
        cases.append(dict(line.split(": ", 1) for line in joined.split("\n")))
    return tuple(cases)


@dataclass(frozen=True)
class Arc:
    """One plot: its template, its cases, and whether the hero is one of the odd beings named in the cases."""

    name: str
    template: str
    cases: tuple[dict[str, str], ...]
    odd: bool = False


ARCS = (
    Arc("lost", words.LOST, _parse_cases(words.LOST_CASES)),
    Arc("quarrel", words.QUARREL, _parse_cases(words.QUARREL_CASES)),
    Arc("fear", words.FEAR, _parse_cases(words.FEAR_CASES)),
    Arc("build", words.BUILD, _parse_cases(words.BUILD_CASES)),
    Arc("stranger", words.STRANGER, _parse_cases(words.STRANGER_CASES)),
    Arc("race", words.RACE, _parse_cases(words.RACE_CASES)),
    Arc("promise", words.PROMISE, _parse_cases(words.PROMISE_CASES)),
    Arc("surprise", words.SURPRISE, _parse_cases(words.SURPRISE_CASES)),
    Arc("storm", words.STORM, _parse_cases(words.STORM_CASES)),
    Arc("gift", words.GIFT, _parse_cases(words.GIFT_CASES)),
    Arc("skill", words.SKILL, _parse_cases(words.SKILL_CASES)),
    Arc("seed", words.SEED, _parse_cases(words.SEED_CASES)),
    Arc("mystery", words.MYSTERY, _parse_cases(words.MYSTERY_CASES)),
    Arc("wish", words.WISH, _parse_cases(words.WISH_CASES), odd=True),
    Arc("useful", words.USEFUL, _parse_cases(words.USEFUL_CASES), odd=True),
)


def _pick(rng: random.Random, items: Sequence[T]) -> T:
    """One of the items, from one draw (`Random.choice` may change its use of the stream between versions)."""
    return items[int(rng.random() * len(items))]


def _choose(rng: random.Random, text: str) -> str:
    """Replaces the innermost ``[a|b]`` groups until none is left."""
    while "[" in text:
        text = re.sub(r"\[([^\[\]]*)\]", lambda match: _pick(rng, match.group(1).split("|")), text)
    return text


def _capital(text: str) -> str:
    """The text with its first character in upper case."""
    return text[:1].upper() + text[1:]


def _expand(rng: random.Random, text: str, facts: dict[str, str]) -> str:
    """Fills a template. A fact is worded at its first use and kept, so that it reads the same everywhere."""

    def slot(match: re.Match[str]) -> str:
        key = match.group(1)
        if key.startswith("~"):
            return _expand(rng, words.POOLS[key[1:]], facts)
        capital = key not in facts
        if capital:
            key = key[0].lower() + key[1:]
        facts[key] = _expand(rng, facts[key], facts)
        return _capital(facts[key]) if capital else facts[key]

    return re.sub(r"\{([^{}]+)\}", slot, _choose(rng, text))


def _pronoun_facts(prefix: str, pronouns: words.Pronouns) -> dict[str, str]:
    """The slots of one character's pronouns; the hero's have no prefix."""
    return {prefix + form: getattr(pronouns, form) for form in ("he", "him", "his", "self")}


def _animal_cast(rng: random.Random, hero_he: bool, without: str) -> dict[str, str]:
    """A hero and a friend of different species and different pronouns, somewhere in the wild."""
    kinds = [kind for kind in words.KINDS if kind.name != without]
    hero = _pick(rng, kinds)
    friend = _pick(rng, [kind for kind in kinds if kind != hero])
    names = (words.ANIMAL_HE, words.ANIMAL_SHE) if hero_he else (words.ANIMAL_SHE, words.ANIMAL_HE)
    intro = "{f} the " + friend.name
    facts = {
        "kind": hero.name,
        "home": hero.home,
        "food": hero.food,
        "quirk": hero.quirk,
        "hand": "paw",
        "h.as": "{h} the {kind}",
    }
    facts |= {"h": _pick(rng, names[0]), "f": _pick(rng, names[1])}
    return facts | {"f.as": intro, "f.intro": intro, "e": _pick(rng, words.WOOD_ELDERS)}


def _child_cast(rng: random.Random, hero_he: bool, place: words.Place) -> dict[str, str]:
    """A girl with a boy for a friend, or the other way round."""
    names = (words.CHILD_HE, words.CHILD_SHE) if hero_he else (words.CHILD_SHE, words.CHILD_HE)
    other = "girl" if hero_he else "boy"
    facts = {"kind": "boy" if hero_he else "girl", "home": _pick(rng, place.homes), "hand": "hand", "h.as": "{h}"}
    facts |= {"h": _pick(rng, names[0]), "f": _pick(rng, names[1]), "e": _pick(rng, words.TOWN_ELDERS)}
    facts |= {"food": _pick(rng, words.CHILD_FOODS), "quirk": _pick(rng, words.CHILD_QUIRKS)}
    facts |= {"f.as": f"[{{f}} from next door|a {other} named {{f}}]"}
    return facts | {"f.intro": "[{his} friend {f}|{f} from next door]"}


def _season_facts(rng: random.Random, season: str | None) -> dict[str, str]:
    """A season, drawn unless the case needs a certain one, and weather that fits it."""
    name, weather = _pick(rng, [entry for entry in words.SEASONS if season in (None, entry[0])])
    return {"season": name, "weather": _pick(rng, weather)}


def _place_facts(place: words.Place) -> dict[str, str]:
    """The slots of a place and its landmarks."""
    landmarks = ("water", "hill", "path", "spot", "tree", "folk", "sight", "night")
    facts = {key: getattr(place, key) for key in landmarks}
    return facts | {"place": place.name, "by_spot": "by " + place.spot}


def _odd_facts(rng: random.Random, case: dict[str, str]) -> dict[str, str]:
    """The hero of a case that brings its own hero: a thing with a name and a pronoun."""
    pronouns = {"he": words.HE, "she": words.SHE, "it": words.IT}[case["pro"]]
    trait = _pick(rng, words.ODD_TRAITS)
    return {"h": case["name"], "trait": trait, "f.as": "{f}"} | _pronoun_facts("", pronouns)


def _facts(rng: random.Random, arc: Arc, case: dict[str, str]) -> dict[str, str]:
    """Every slot of a story: the season, the place, the cast, and the case, which overrides the others."""
    facts = _season_facts(rng, case.get("season"))
    if arc.odd:
        return facts | _odd_facts(rng, case) | case
    hero_he = rng.random() < 0.5
    wild = case.get("world", _pick(rng, ("wood", "child"))) == "wood"
    place = _pick(rng, words.WOODS if wild else words.TOWNS)
    facts |= _place_facts(place)
    facts |= _animal_cast(rng, hero_he, case.get("without", "")) if wild else _child_cast(rng, hero_he, place)
    facts["trait"], facts["traitline"] = _pick(rng, words.TRAITS)
    hero, friend = (words.HE, words.SHE) if hero_he else (words.SHE, words.HE)
    return facts | _pronoun_facts("", hero) | _pronoun_facts("f.", friend) | case


def _polish(text: str) -> str:
    """Joins wrapped lines, sets "an" before vowels and capitals at sentence starts."""
    paragraphs = [" ".join(part.split()) for part in text.strip().split("\n\n")]
    text = "\n".join(paragraphs)
    text = re.sub(r" ([,.!?])", r"\1", text)
    text = re.sub(r"\b([Aa]) (?=[aeiouAEIOU](?!ne\b|se))", r"\1n ", text)
    return re.sub(r"(^|\n|[.!?] |\.\" |[.!?] \"|\n\")(\"?)([a-z])", _sentence_start, text)


def _sentence_start(match: re.Match[str]) -> str:
    """Capitalises a sentence start, but not the rest of a quotation that a speaker's name interrupted."""
    return match.group(0)[:-1] + match.group(3).upper()


def story(seed: int) -> str:
    """Returns one story.

    Args:
        seed: The same seed gives the same text on every machine and Python version.

    Returns:
        Four to eight paragraphs, separated by single newlines.
    """
    rng = random.Random(seed)
    arc = _pick(rng, ARCS)
    case = _pick(rng, arc.cases)
    return _polish(_expand(rng, arc.template, _facts(rng, arc, case)))


def corpus(first_seed: int, count: int) -> Iterator[str]:
    """Yields the stories of ``count`` consecutive seeds."""
    for seed in range(first_seed, first_seed + count):
        yield story(seed)
