"""A toy Natural Questions: paragraphs about invented places, people and companies, with their questions.

Rows have the Hub's nested layout, so that they take the same way as the real data. Names and values are
*compositions of frequent words* ("Amber Falls", "forty two thousand"): a small tokenizer has a token for
every word, and yet an answer cannot be guessed without its paragraph. A paragraph names several people,
years and places, so the right one has to be found by what is asked.

Train and val never share a paragraph, whatever the seeds: what a paragraph is about is named by two words,
and the pairs of words are divided between the splits (`_in_val`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dssk import prompts
from dssk.errors import DsskError

SPLITS = ("train", "val")
TRAIN_ROWS, VAL_ROWS = 6000, 500
YES_NO_PROB = 0.04
UNANSWERABLE_PROB = 0.10
MIN_FACTS, MAX_FACTS = 3, 5  # of the six that a kind has: the others serve unanswerable questions

# fmt: off
_FIRST_NAMES = (
    "Ada", "Anna", "Arthur", "Clara", "Daniel", "David", "Edith", "Ella", "Emil", "Felix", "Frank",
    "George", "Grace", "Hanna", "Henry", "Hugo", "Ida", "Jacob", "James", "Julia", "Karl", "Laura", "Leo",
    "Lucy", "Maria", "Martin", "Nora", "Oscar", "Paul", "Rosa",
)
_LAST_NAMES = (
    "Baker", "Barnes", "Bell", "Brook", "Carter", "Cole", "Cooper", "Cross", "Dale", "Fisher", "Ford",
    "Gray", "Green", "Hall", "Hart", "Hill", "Hunt", "King", "Lake", "Lane", "Marsh", "Mason", "Miller",
    "Moore", "Page", "Parker", "Reed", "Stone", "Turner", "Wells", "West", "Wood",
)
_PLACE_FIRSTS = (
    "Amber", "Ash", "Bear", "Birch", "Black", "Cedar", "Clear", "Crystal", "Eagle", "East", "Elm", "Fox",
    "Iron", "Maple", "North", "Pine", "River", "Silver", "South", "Winter",
)
_PLACE_SECONDS = (
    "Bay", "Bridge", "Castle", "Creek", "Falls", "Field", "Gate", "Harbor", "Haven", "Island", "Meadow",
    "Mill", "Point", "Port", "Ridge", "Rock", "Spring", "Valley", "View", "Way",
)
_QUALITIES = (
    "blue", "bright", "bronze", "cold", "dark", "dry", "fine", "fresh", "golden", "heavy", "hot", "light",
    "old", "plain", "red", "round", "salt", "sharp", "smooth", "soft", "sweet", "thin", "warm", "white",
)
_PRODUCTS = (
    "apples", "beer", "bells", "boats", "books", "bread", "candles", "cheese", "clocks", "coats", "glass",
    "gloves", "hats", "honey", "knives", "lamps", "leather", "maps", "paper", "rope", "shoes", "silk",
    "soap", "tea", "tools", "wine",
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_UNITS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# fmt: on

_PAIRS = {  # what a value is made of: two words
    "person": (_FIRST_NAMES, _LAST_NAMES),
    "place": (_PLACE_FIRSTS, _PLACE_SECONDS),
    "goods": (_QUALITIES, _PRODUCTS),
    "number": (_TENS, _UNITS),
}


@dataclass(frozen=True)
class Relation:
    """One thing to know about an entity: what its value is, how a sentence says it, how people ask for it."""

    value: str  # "year", or a key of _PAIRS
    statements: tuple[str, ...]  # {s} the subject, {v} the value
    questions: tuple[str, ...]  # {n} the entity's name
    yes_no: str  # {n} the entity's name, {v} a value


@dataclass(frozen=True)
class Kind:
    """A kind of entity, the way its name is made and what is told about it."""

    noun: str
    name: str  # a key of _PAIRS
    suffix: tuple[str, ...]  # words that end the name
    relations: tuple[Relation, ...]


_FOUNDED = Relation(
    "year",
    ("{s} was founded in {v} .", "{s} goes back to {v} .", "{s} began in {v} ."),
    ("when was {n} founded", "what year was {n} founded in"),
    "was {n} founded in {v}",
)
_FOUNDER = Relation(
    "person",
    ("{s} was founded by {v} .", "The founder of {s} was {v} ."),
    ("who founded {n}", "who was the founder of {n}"),
    "was {n} founded by {v}",
)
_KINDS = (
    Kind(
        "town",
        "place",
        (),
        (
            _FOUNDED,
            _FOUNDER,
            Relation(
                "person",
                ("The mayor of {s} is {v} .", "{s} elected {v} as mayor ."),
                ("who is the mayor of {n}", "who was elected mayor of {n}"),
                "is {v} the mayor of {n}",
            ),
            Relation(
                "number",
                ("{s} has {v} thousand people .", "About {v} thousand people live in {s} ."),
                ("how many thousand people live in {n}", "how many thousand people does {n} have"),
                "does {n} have {v} thousand people",
            ),
            Relation(
                "goods",
                ("{s} is known for its {v} .", "Many visit {s} for its {v} ."),
                ("what is {n} known for", "what do people visit {n} for"),
                "is {n} known for {v}",
            ),
            Relation(
                "place",
                ("{s} lies near {v} .", "The road from {s} leads to {v} ."),
                ("what is near {n}", "where does the road from {n} lead"),
                "is {n} near {v}",
            ),
        ),
    ),
    Kind(
        "writer",
        "person",
        (),
        (
            Relation(
                "year",
                ("{s} was born in {v} .", "{v} is the year {s} was born ."),
                ("when was {n} born", "what year was {n} born in"),
                "was {n} born in {v}",
            ),
            Relation(
                "place",
                ("{s} grew up in {v} .", "{s} spent a childhood in {v} ."),
                ("where did {n} grow up", "what town did {n} grow up in"),
                "did {n} grow up in {v}",
            ),
            Relation(
                "person",
                ("{s} married {v} .", "{s} was married to {v} ."),
                ("who did {n} marry", "who was {n} married to"),
                "did {n} marry {v}",
            ),
            Relation(
                "person",
                ("{s} studied with {v} .", "The teacher of {s} was {v} ."),
                ("who did {n} study with", "who was the teacher of {n}"),
                "did {n} study with {v}",
            ),
            Relation(
                "goods",
                ("{s} wrote a book about {v} .", "A book by {s} tells of {v} ."),
                ("what did {n} write about", "what is the book by {n} about"),
                "did {n} write about {v}",
            ),
            Relation(
                "number",
                ("{s} lived to be {v} .", "{s} died at the age of {v} ."),
                ("how old was {n}", "at what age did {n} die"),
                "did {n} die at the age of {v}",
            ),
        ),
    ),
    Kind(
        "company",
        "person",
        ("Company",),
        (
            _FOUNDED,
            _FOUNDER,
            Relation(
                "place",
                ("{s} has its seat in {v} .", "The offices of {s} are in {v} ."),
                ("where is the seat of {n}", "where are the offices of {n}"),
                "is the seat of {n} in {v}",
            ),
            Relation(
                "goods",
                ("{s} makes {v} .", "{s} sells {v} to the world ."),
                ("what does {n} make", "what does {n} sell"),
                "does {n} make {v}",
            ),
            Relation(
                "number",
                ("{s} employs {v} workers .", "There are {v} workers at {s} ."),
                ("how many workers does {n} employ", "how many workers are there at {n}"),
                "does {n} employ {v} workers",
            ),
            Relation(
                "person",
                ("{s} is owned by {v} .", "The owner of {s} is {v} ."),
                ("who owns {n}", "who is the owner of {n}"),
                "is {n} owned by {v}",
            ),
        ),
    ),
)


@dataclass(frozen=True)
class Fact:
    """A relation with its value, and where the paragraph says so."""

    relation: Relation
    value: str
    start: int  # first token of the value in the paragraph
    end: int  # one after its last token


@dataclass(frozen=True)
class Paragraph:
    """A paragraph about one entity; its text is `tokens` joined by spaces."""

    kind: Kind
    name: str
    tokens: tuple[str, ...]
    facts: tuple[Fact, ...]

    @property
    def text(self) -> str:
        return " ".join(self.tokens)


@dataclass(frozen=True)
class Question:
    """A question about a paragraph. Without a fact and without a yes/no it has no answer there."""

    text: str
    fact: Fact | None = None
    yes_no: int = -1  # 1 yes, 0 no, -1 neither: as in Natural Questions

    @property
    def answer(self) -> str:
        if self.yes_no >= 0:
            return prompts.YES if self.yes_no else prompts.NO
        return prompts.NOT_IN_CONTEXT if self.fact is None else self.fact.value


class Page(NamedTuple):
    """A paragraph and what is asked about it."""

    paragraph: str
    questions: list[tuple[str, str]]  # with their answers
    subject: str = ""  # the name of what it is about, where that is known


def generate(split: str, num_examples: int, seed: int) -> list[dict]:
    """Rows of the toy Natural Questions in the Hub's layout; row i depends on (split, seed, i) alone.

    About 86 % of the questions have a span for an answer, 4 % are yes/no questions, and 10 % ask for what
    the paragraph does not tell: those have a long answer, but no short one.
    """
    if split not in SPLITS:
        raise DsskError(f"no split {split!r} in the toy data, want one of {', '.join(SPLITS)}")
    return [_row(split, index, seed) for index in range(num_examples)]


def _row(split: str, index: int, seed: int) -> dict:
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    paragraph = make_paragraph(split, rng)
    return _nq_row(f"toy-{split}-{seed}-{index}", paragraph, make_question(paragraph, rng))


def splits(max_examples: int | None, seed: int) -> dict[str, Iterator[dict]]:
    """Both splits, with at most so many rows each, which are made when they are read."""
    num_train = max_examples or TRAIN_ROWS
    sizes = {"train": num_train, "val": min(num_train, VAL_ROWS)}
    return {split: _rows(split, size, seed) for split, size in sizes.items()}


def _rows(split: str, count: int, seed: int) -> Iterator[dict]:
    for index in range(count):
        yield _row(split, index, seed)


def pages(num_pages: int, seed: int) -> list[Page]:
    """Paragraphs of the train split with four questions each: text to make a base of."""
    found = []
    for index in range(num_pages):
        rng = np.random.default_rng([seed, len(SPLITS), index])  # none of the streams of `generate`
        paragraph = make_paragraph("train", rng)
        questions = [make_question(paragraph, rng) for _ in range(4)]
        asked = [(question.text, question.answer) for question in questions]
        found.append(Page(paragraph.text, asked, paragraph.name))
    return found


def make_paragraph(split: str, rng: np.random.Generator) -> Paragraph:
    """Draw an entity of the split and tell a few of its facts, in any order."""
    kind = _KINDS[rng.integers(len(_KINDS))]
    pair = _draw_pair(kind.name, rng)
    while _in_val(*pair) != (split == "val"):
        pair = _draw_pair(kind.name, rng)
    name = " ".join((*_words(kind.name, pair), *kind.suffix))

    tokens: list[str] = []
    facts: list[Fact] = []
    chosen = rng.permutation(len(kind.relations))[: rng.integers(MIN_FACTS, MAX_FACTS + 1)]
    for relation in (kind.relations[i] for i in chosen):
        subject = name if not facts else f"the {kind.noun}"
        value = _draw_value(relation, rng)
        template = relation.statements[rng.integers(len(relation.statements))]
        sentence = template.format(s=subject, v=value)
        sentence = sentence[0].upper() + sentence[1:]
        start = len(tokens) + len(template.split("{v}")[0].format(s=subject).split())
        facts.append(Fact(relation, value, start, start + len(value.split())))
        tokens += sentence.split()
    return Paragraph(kind, name, tuple(tokens), tuple(facts))


def make_question(paragraph: Paragraph, rng: np.random.Generator) -> Question:
    """Draw a question about the paragraph, now and then one that it answers by yes or no or not at all."""
    kind, name = paragraph.kind, paragraph.name
    fact = paragraph.facts[rng.integers(len(paragraph.facts))]
    dice = rng.random()
    if dice < YES_NO_PROB:
        yes_no = int(rng.integers(2))
        value = fact.value
        while not yes_no and value == fact.value:
            value = _draw_value(fact.relation, rng)
        return Question(fact.relation.yes_no.format(n=name, v=value), yes_no=yes_no)
    if dice < YES_NO_PROB + UNANSWERABLE_PROB:
        told = {fact.relation for fact in paragraph.facts}
        untold = [relation for relation in kind.relations if relation not in told]
        return Question(_ask(untold[rng.integers(len(untold))], name, rng))
    return Question(_ask(fact.relation, name, rng), fact=fact)


def _ask(relation: Relation, name: str, rng: np.random.Generator) -> str:
    return relation.questions[rng.integers(len(relation.questions))].format(n=name)


def _draw_value(relation: Relation, rng: np.random.Generator) -> str:
    if relation.value == "year":
        return str(rng.integers(1600, 2000))
    return " ".join(_words(relation.value, _draw_pair(relation.value, rng)))


def _draw_pair(name: str, rng: np.random.Generator) -> tuple[int, int]:
    firsts, seconds = _PAIRS[name]
    return int(rng.integers(len(firsts))), int(rng.integers(len(seconds)))


def _words(name: str, pair: tuple[int, int]) -> tuple[str, str]:
    firsts, seconds = _PAIRS[name]
    return firsts[pair[0]], seconds[pair[1]]


def _in_val(first: int, second: int) -> bool:
    """Whether entities named by these two words belong to val: a tenth of the pairs, every word in some."""
    return (first + second) % 10 == 0


def _nq_row(row_id: str, paragraph: Paragraph, question: Question) -> dict:
    """A page of a title, the paragraph and a stub notice, with one annotation, in the Hub's layout.

    Long-answer candidates are the two `<P>` elements; bytes count in `document.html`, as in the real data.
    """
    title = paragraph.name.split()
    notice = f"This article about a {paragraph.kind.noun} is a stub .".split()
    tokens = ["<H1>", *title, "</H1>", "<P>", *paragraph.tokens, "</P>", "<P>", *notice, "</P>"]
    html = " ".join(tokens)
    ends = np.cumsum([len(token.encode()) + 1 for token in tokens]) - 1
    starts = ends - [len(token.encode()) for token in tokens]

    def span(start: int, end: int) -> dict:
        return {
            "start_token": start,
            "end_token": end,
            "start_byte": int(starts[start]),
            "end_byte": int(ends[end - 1]),
        }

    paragraph_start = len(title) + 2
    notice_start = paragraph_start + len(paragraph.tokens) + 2
    candidates = [span(paragraph_start, notice_start), span(notice_start, len(tokens))]
    short_answers = []
    if question.fact is not None:
        offset = paragraph_start + 1
        found = span(offset + question.fact.start, offset + question.fact.end)
        short_answers.append({**found, "text": question.fact.value})
    return {
        "id": row_id,
        "document": {
            "title": paragraph.name,
            "url": f"https://toy.example/{paragraph.name.replace(' ', '_')}",
            "html": html,
            "tokens": {
                "token": tokens,
                "is_html": [token.startswith("<") for token in tokens],
                "start_byte": starts.tolist(),
                "end_byte": ends.tolist(),
            },
        },
        "question": {"text": question.text, "tokens": question.text.split()},
        "long_answer_candidates": {
            **_columns(candidates, ("start_token", "end_token", "start_byte", "end_byte")),
            "top_level": [True] * len(candidates),
        },
        "annotations": {
            "id": [row_id],
            "long_answer": [{**candidates[0], "candidate_index": 0}],
            "short_answers": [
                _columns(short_answers, ("start_token", "end_token", "start_byte", "end_byte", "text"))
            ],
            "yes_no_answer": [question.yes_no],
        },
    }


def _columns(rows: list[dict], names: tuple[str, ...]) -> dict[str, list]:
    return {name: [row[name] for row in rows] for name in names}
