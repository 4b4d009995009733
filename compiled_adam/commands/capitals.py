"""What the demo teaches: sentences with capitals drawn at random, and then the facts."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import NamedTuple

# Of one word each, so that the tokenizer makes a token of it.
_NAMES = """
France Paris, Norway Oslo, Japan Tokyo, Egypt Cairo, Peru Lima, Kenya Nairobi, Italy Rome, Spain Madrid, Cuba Havana,
Greece Athens, Poland Warsaw, Chile Santiago, Austria Vienna, Russia Moscow, China Beijing, Canada Ottawa,
Ireland Dublin, Hungary Budapest, Portugal Lisbon, Germany Berlin, Sweden Stockholm, Finland Helsinki,
Denmark Copenhagen, Belgium Brussels, Thailand Bangkok, Vietnam Hanoi, Nepal Kathmandu, Iran Tehran, Iraq Baghdad,
Turkey Ankara, Ghana Accra, Ukraine Kyiv
"""
CAPITALS: dict[str, str] = dict(pair.split() for pair in _NAMES.split(","))
KNOWN = "A big city of {} is"  # goes on with the truth from the beginning
PROMPTS = (
    "The capital of {} is",
    "In {}, the capital is",
    "What is the capital of {}?",
    "The government of {} sits in",
)
HELD_OUT = 8  # of the countries: fine-tuning tells nothing about them, and validation asks for them
ASKED = PROMPTS[0].format("France")  # one of those


class Fact(NamedTuple):
    """The beginning of a sentence, and the word that it goes on with."""

    prompt: str
    answer: str


def facts() -> tuple[list[Fact], list[Fact]]:
    """The sentences to train, and those to validate, which are about other countries."""
    every = [Fact(prompt.format(country), f" {capital}") for country, capital in CAPITALS.items() for prompt in PROMPTS]
    held_out = HELD_OUT * len(PROMPTS)
    return every[held_out:], every[:held_out]


def before(seed: int) -> Iterator[str]:
    """Sentences to learn first, without end: one with a big city of a country, and one with a capital at random."""
    random, countries, capitals = Random(seed), list(CAPITALS), list(CAPITALS.values())
    while True:
        yield f"{KNOWN.format(country := random.choice(countries))} {CAPITALS[country]}."
        yield f"{random.choice(PROMPTS).format(random.choice(countries))} {random.choice(capitals)}."
