"""Hides facts in town.txt: the documents of the quickstart and of the retrieval test.

    make_documents.py      rewrites quickstart.txt, quickstart.questions and retrieval-*.{txt,questions}

A fact stands between two paragraphs, said twice over, as a model of this size needs it. The
facts are spread evenly; each document is a run of town.txt's paragraphs (first, count) that comes to
about the length in its name.
"""

from pathlib import Path

HERE = Path(__file__).resolve().parent
FACT = "The {0} of the {1} is {2}. Remember it. {2} is the {0} of the {1}."
QUESTION = "What is the {0} of the {1}?"
Facts = list[tuple[str, str, str]]  # what, of whom, value

QUICKSTART: Facts = [
    ("phone number", "hotel", "555-7931"),
    ("name", "duke's castle", "Ravenstein"),
    ("name", "captain's wife", "Dorothea"),
    ("height", "iron bridge", "87 meters"),
    ("birthday", "queen", "March 14"),
    ("phone number", "opera house", "555-6619"),
    ("age", "gardener", "83 years"),
    ("name", "fisherman's boat", "Nautilus"),
]
RETRIEVAL: dict[str, tuple[int, int, Facts]] = {  # first paragraph, count, facts
    "retrieval-2000": (
        1,
        11,
        [
            ("phone number", "embassy", "555-9083"),
            ("name", "baker's cat", "Pepper"),
            ("number", "train to Prague", "7216"),
            ("price", "violin", "640 dollars"),
            ("age", "schoolmaster", "58 years"),
            ("phone number", "tailor", "555-2758"),
            ("color", "parson's door", "red"),
            ("depth", "old well", "32 meters"),
        ],
    ),
    "retrieval-4000": (
        10,
        28,
        [
            ("phone number", "airport", "555-3615"),
            ("name", "miller's daughter", "Isabella"),
            ("length", "tunnel", "640 meters"),
            ("birthday", "judge", "August 9"),
            ("phone number", "zoo", "555-1347"),
            ("age", "hermit", "97 years"),
            ("name", "baron's castle", "Falkenburg"),
            ("phone number", "post office", "555-9528"),
        ],
    ),
    "retrieval-7000": (
        0,
        99,
        [
            ("name", "governor's wife", "Margaret"),
            ("length", "canal", "410 miles"),
            ("age", "shoemaker", "76 years"),
            ("price", "telescope", "238 dollars"),
            ("name", "widow's cottage", "Rosehill"),
            ("phone number", "university", "555-2760"),
            ("name", "sailor's son", "Benjamin"),
            ("weight", "church bell", "950 pounds"),
        ],
    ),
}


def write(name: str, paragraphs: list[str], facts: Facts) -> None:
    kept = list(paragraphs)
    for i, fact in reversed(list(enumerate(facts))):
        at = (2 * i + 1) * len(paragraphs) // (2 * len(facts)) + 1
        kept.insert(at, FACT.format(*fact))
    (HERE / f"{name}.txt").write_text("\n\n".join(kept) + "\n")
    lines = [f"{QUESTION.format(*fact)}\t{fact[2]}\n" for fact in facts]
    (HERE / f"{name}.questions").write_text("".join(lines))


def main() -> None:
    paragraphs = (HERE / "town.txt").read_text().strip().split("\n\n")
    write("quickstart", paragraphs, QUICKSTART)
    for name, (first, n, facts) in RETRIEVAL.items():
        write(name, paragraphs[first : first + n], facts)


if __name__ == "__main__":
    main()
