"""``arithmetic``: generated word problems with worked answers, in the style of GSM8K.

A problem has N steps (its difficulty, `arithmetic@N`): each step is one operation on small
whole numbers, every result lies in 2..200, and the worked answer writes one equation per step and
ends in ``#### result``::

    Question: Noah buys 2 crates, and each of them holds 12 cups. Then he triples the number of
    cups. How many cups does Noah have now?
    Answer: 2 * 12 = 24
    24 * 3 = 72
    #### 72

Whether a problem belongs to ``train`` or ``test`` is decided by a hash of its computation (the
numbers and operations, whatever the story around them), so a computation met in training never
occurs in the test part, not even with other names.

With SmolLM2's tokenizer a completion has about 15, 25 and 36 tokens at 1, 2 and 3 steps (at most
17, 29 and 42 in 500 problems each), and a whole row at most 55, 77 and 97.
"""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass

from midblock.data.examples import Example, hold_out_part
from midblock.errors import SettingsError

__all__ = ["DEFAULT_STEPS", "MAX_STEPS", "POOL_SIZES", "arithmetic_examples", "generate_arithmetic"]

DEFAULT_STEPS = 2
MAX_STEPS = 6
POOL_SIZES = {"train": 8000, "test": 2000}
"""Problems per split; ``samples`` draws from these."""

_LARGEST = 200

_GIRLS = ("Mia", "Anna", "Sofia", "Ruth", "Leila", "Grace", "Nora", "Yuki", "Priya", "Clara", "Ines",
          "Zoe", "Amara", "Helen", "Tara", "Olga")
_BOYS = ("Tom", "Ben", "Omar", "Jack", "Luis", "Kofi", "Ivan", "Paul", "Ravi", "Sam", "Leo", "Hugo",
         "Amir", "Noah", "Carl", "Finn")
_THINGS = ("apples", "marbles", "stickers", "shells", "books", "pencils", "stamps", "cards", "coins",
           "buttons", "cookies", "balloons", "oranges", "beads", "stones", "tickets", "candles", "cups",
           "flowers", "pears", "ribbons", "toys", "eggs", "keys", "photos", "postcards", "plums", "nuts",
           "bottles", "seeds")
_HOLDERS = ("boxes", "bags", "baskets", "jars", "drawers", "trays", "packs", "crates")

_START = (
    "{name} has {n} {things}.",
    "{name} starts the day with {n} {things}.",
    "There are {n} {things} in {name}'s room.",
    "{name} collects {n} {things}.",
    "On Monday {name} counts {n} {things}.",
    "{name} brings {n} {things} to school.",
)
_START_PRODUCT = (
    "{name} has {m} {holders} with {n} {things} in each.",
    "{name} buys {m} {holders}, and each of them holds {n} {things}.",
    "{name} fills {m} {holders} with {n} {things} each.",
    "{name} gets {n} {things} a day for {m} days.",
)
_START_MORE = (
    "{friend} has {n} {things}. {name} has {m} more than {friend}.",
    "{friend} finds {n} {things}, and {name} finds {m} more than that.",
)
_START_FEWER = (
    "{friend} has {n} {things}. {name} has {m} fewer than {friend}.",
    "{friend} finds {n} {things}, and {name} finds {m} fewer than that.",
)
_ADD = (
    "{He} buys {n} more.",
    "{friend} gives {him} {n} more {things}.",
    "{He} finds another {n} {things}.",
    "Then {he} gets {n} more for {his} birthday.",
    "{His} teacher adds {n} {things} to them.",
    "Later {he} picks up {n} more.",
)
_SUBTRACT = (
    "{He} gives {n} {things} to {friend}.",
    "{He} loses {n} of them.",
    "{He} sells {n} {things}.",
    "Then {friend} borrows {n} of them.",
    "{He} uses {n} {things} for a project.",
    "{n} of them break.",
)
_TIMES = {
    2: ("Then {he} doubles the number of {things}.", "By Friday {he} has twice as many."),
    3: ("Then {he} triples the number of {things}.", "By Friday {he} has three times as many."),
    4: ("By the end of the month {he} has four times as many.",
        "Then the number of {things} grows to four times as many."),
}
_ASK = (
    "How many {things} does {name} have now?",
    "How many {things} does {name} have in the end?",
    "How many {things} does {he} have then?",
)
_ASK_PRICE = (
    "{He} sells all of them for {n} dollars each. How many dollars does {name} get?",
    "Each of them costs {n} dollars. How many dollars do they cost together?",
)
_ASK_SHARE = (
    "{He} shares them equally among {n} friends. How many {things} does each friend get?",
    "{He} puts them equally into {n} {holders}. How many {things} are in each?",
)


@dataclass(frozen=True, slots=True)
class _Problem:
    question: str
    equations: tuple[str, ...]
    result: int

    @property
    def computation(self) -> str:
        return "; ".join(self.equations)


def _operand(op: str, value: int, rng: random.Random) -> int | None:
    """A number that keeps the result of ``value op number`` a whole number in 2..200."""
    if op == "+":
        return rng.randint(2, 20) if value + 20 <= _LARGEST else None
    if op == "-":
        return rng.randint(2, min(20, value - 2)) if value > 3 else None
    if op == "*":
        factors = [n for n in (2, 3, 4) if value * n <= _LARGEST]
    else:
        factors = [n for n in (2, 3, 4, 5, 6) if value % n == 0 and value // n > 1]
    return rng.choice(factors) if factors else None


def _apply(op: str, a: int, b: int) -> int:
    return {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[op]


def _sentences(op: str, operand: int, final: bool) -> tuple[str, ...]:
    if final:
        return _ASK_PRICE if op == "*" else _ASK_SHARE
    if op == "*":
        return _TIMES[operand]
    return _ADD if op == "+" else _SUBTRACT


def _draw(steps: int, rng: random.Random) -> _Problem | None:
    """One problem, or None where the numbers drawn leave no way to go on."""
    girl = rng.random() < 0.5
    name, friend = rng.choice(_GIRLS if girl else _BOYS), rng.choice(_BOYS if girl else _GIRLS)
    he, him, his = ("she", "her", "her") if girl else ("he", "him", "his")
    words = {"name": name, "friend": friend, "he": he, "him": him, "his": his, "He": he.title(),
             "His": his.title(), "things": rng.choice(_THINGS), "holders": rng.choice(_HOLDERS)}
    sentences: list[str] = []
    equations: list[str] = []

    def step(op: str, value: int, operand: int) -> int:
        result = _apply(op, value, operand)
        equations.append(f"{value} {op} {operand} = {result}")
        return result

    opening = rng.choices(("plain", "product", "more", "fewer"), (6, 2, 1, 1))[0]
    if opening == "product":
        m, n = rng.randint(2, 9), rng.randint(2, 12)
        sentences.append(rng.choice(_START_PRODUCT).format(m=m, n=n, **words))
        value = step("*", m, n)
    elif opening == "plain":
        value = rng.randint(2, 20)
        sentences.append(rng.choice(_START).format(n=value, **words))
    else:
        op, openings = ("+", _START_MORE) if opening == "more" else ("-", _START_FEWER)
        n = rng.randint(4, 20)
        m = rng.randint(2, 20 if opening == "more" else n - 2)
        sentences.append(rng.choice(openings).format(m=m, n=n, **words))
        value = step(op, n, m)
    ending = rng.choices(("", "*", "/"), (6, 1, 1))[0]
    while len(equations) < steps:
        final = bool(ending) and len(equations) == steps - 1
        op = ending if final else rng.choices("+-*", (4, 4, 2))[0]
        operand = _operand(op, value, rng)
        if operand is None:
            return None
        sentence = rng.choice(_sentences(op, operand, final)).format(n=operand, **words)
        if sentence in sentences:
            return None
        sentences.append(sentence)
        value = step(op, value, operand)
    if not sentences[-1].endswith("?"):
        sentences.append(rng.choice(_ASK).format(**words))
    return _Problem(" ".join(sentences), tuple(equations), value)


def generate_arithmetic(steps: int, split: str, count: int, seed: int = 0) -> list[Example]:
    """``count`` different problems of one split.

    Args:
        steps: Operations per problem, 1 to 6.
        split: ``train`` or ``test``; the two share no computation.
        count: Number of problems.
        seed: Of the generator; the same arguments give the same problems in the same order.

    Raises:
        SettingsError: ``steps`` or ``split`` is none of these.

    Example:
        >>> example = generate_arithmetic(2, "test", 1)[0]
        >>> example.prompt.startswith("Question: "), example.prompt.endswith("Answer:")
        (True, True)
        >>> example.completion.endswith(f"#### {example.row['answer_number']}")
        True
    """
    if not 1 <= steps <= MAX_STEPS:
        raise SettingsError(f"arithmetic problems of {steps} steps were asked for; use 1 to {MAX_STEPS}, "
                            "such as arithmetic@3.")
    if split not in POOL_SIZES:
        raise SettingsError(f"arithmetic has no split {split!r}; use train or test.")
    rng = random.Random(f"midblock arithmetic {steps} {split} {seed}")
    found: dict[str, _Problem] = {}
    while len(found) < count:
        problem = _draw(steps, rng)
        if problem is not None and hold_out_part(problem.computation) == split:
            found.setdefault(problem.question, problem)
    return [_example(problem, steps, f"arithmetic@{steps}:{split}:{number}")
            for number, problem in enumerate(found.values(), start=1)]


def _example(problem: _Problem, steps: int, where: str) -> Example:
    answer = "\n".join((*problem.equations, f"#### {problem.result}"))
    prompt = f"Question: {problem.question}\nAnswer:"
    return Example(text=f"{prompt} {answer}", prompt=prompt, completion=f" {answer}", where=where,
                   row={"question": problem.question, "answer": answer, "answer_number": problem.result,
                        "steps": steps, "computation": problem.computation})


@functools.lru_cache(maxsize=4)
def _pool(steps: int, split: str) -> tuple[Example, ...]:
    return tuple(generate_arithmetic(steps, split, POOL_SIZES.get(split, 0)))


def arithmetic_examples(split: str, steps: int = DEFAULT_STEPS) -> list[Example]:
    """The fixed pool of one split (see `POOL_SIZES`); its beginning does not depend on its size.

    Raises:
        SettingsError: ``steps`` or ``split`` is not one of those offered.
    """
    return list(_pool(steps, split))
