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
    ("phone number", "bakery", "555-2486"),
    ("phone number", "museum", "555-6052"),
    ("name", "captain's ship", "Aurora"),
    ("phone number", "dentist", "555-9174"),
    ("phone number", "bicycle shop", "555-3308"),
    ("name", "mayor's dog", "Biscuit"),
    ("phone number", "theater", "555-8465"),
]
RETRIEVAL: dict[str, tuple[int, int, Facts]] = {  # first paragraph, count, facts
    "retrieval-2000": (
        1,
        11,
        [
            ("phone number", "hospital", "555-4129"),
            ("phone number", "florist", "555-8730"),
            ("name", "baker's cat", "Pepper"),
            ("phone number", "cinema", "555-1967"),
            ("phone number", "garage", "555-6341"),
            ("phone number", "tailor", "555-2758"),
            ("name", "admiral's ship", "Phoenix"),
            ("phone number", "embassy", "555-9083"),
        ],
    ),
    "retrieval-4000": (
        10,
        28,
        [
            ("phone number", "airport", "555-3615"),
            ("phone number", "butcher", "555-7492"),
            ("phone number", "swimming pool", "555-5820"),
            ("name", "doctor's horse", "Thunder"),
            ("phone number", "zoo", "555-1347"),
            ("phone number", "pharmacy", "555-8916"),
            ("name", "teacher's dog", "Max"),
            ("phone number", "police station", "555-4073"),
        ],
    ),
    "retrieval-7000": (
        0,
        99,
        [
            ("phone number", "restaurant", "555-6284"),
            ("phone number", "stadium", "555-9531"),
            ("phone number", "university", "555-2760"),
            ("name", "merchant's ship", "Victoria"),
            ("phone number", "hairdresser", "555-7158"),
            ("phone number", "plumber", "555-4496"),
            ("phone number", "casino", "555-8302"),
            ("name", "farmer's dog", "Rex"),
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
