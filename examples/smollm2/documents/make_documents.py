"""Hides facts in town.txt: the documents of the retrieval questions.

    make_documents.py [--seed 1] [--out FOLDER] [NAME ...]    needs ./quickstart --setup

Writes NAME.txt and NAME.questions, by default the three retrieval-*. A fact stands between two
paragraphs, said twice over, as a model of this size needs it: a phone number, a ship's or a dog's
name, a train's number, drawn by the seed. The model does not find every such fact, whoever computes
its attention, so each document takes the first eight of the drawn that it answers rightly with
everything read: the document is filled in drawn order and asked, what is missed gives way to the
next, until nothing is missed. Only answers with everything read are looked at (--mass 1), never a
sparse one: what sparse attention loses is thus seen by bench/main_job.py.

A document is a run of town.txt's paragraphs that comes to about the tokens in its name. Each has its
own run of the seed, so one can be made alone. NAME quickstart draws eight such facts for the
quickstart's length; give it an --out of its own: quickstart.txt here is a demonstration, with eight
facts of eight kinds chosen by hand and known to be answered both ways.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
sys.path.insert(0, str(ROOT / "examples"))
from quickstart import BIN, Daemon  # noqa: E402

N_FACTS, N_ROUNDS_MAX = 8, 40
PARAGRAPHS = {  # first, count
    "quickstart": (0, 99),
    "retrieval-2000": (1, 11),
    "retrieval-4000": (10, 28),
    "retrieval-7000": (0, 99),
}
RETRIEVAL = [name for name in PARAGRAPHS if name != "quickstart"]
PLACES = (
    "airport|bakery|bank|barber|bicycle shop|book store|castle|cinema|circus|dentist|embassy|"
    "ferry office|fire station|florist|gallery|garage|hospital|hotel|insurance office|jeweler|"
    "laundry|library|museum|music school|newspaper|opera house|optician|pharmacy|plumber|"
    "police station|post office|radio station|restaurant|school|tailor|taxi company|theater|"
    "town hall|travel agency|university|veterinarian|weather station|youth hostel|zoo"
).split("|")
OWNERS = (
    "admiral|baker|baron|bishop|captain|carpenter|colonel|doctor|duke|farmer|fisherman|general|"
    "governor|innkeeper|judge|king|mayor|merchant|miller|minister|painter|poet|prince|professor|"
    "queen|sailor|shepherd|smith|teacher|widow"
).split("|")
SHIPS = (
    "Adventure|Aurora|Beatrice|Calypso|Constance|Discovery|Endeavour|Esperanza|Fortuna|Galatea|"
    "Hercules|Intrepid|Juno|Mayflower|Mercury|Nautilus|Neptune|Odyssey|Pegasus|Phoenix|Resolute|"
    "Saturn|Swallow|Titania|Victoria"
).split("|")
DOGS = (
    "Bella|Biscuit|Bruno|Buddy|Buster|Charlie|Daisy|Duke|Ginger|Hector|Jasper|Lucky|Luna|Max|"
    "Molly|Oscar|Pepper|Rex|Rocky|Ruby|Rusty|Sandy|Scout|Toby|Winston"
).split("|")
CITIES = (
    "Amsterdam|Athens|Berlin|Brussels|Budapest|Copenhagen|Dublin|Florence|Geneva|Hamburg|Lisbon|"
    "London|Madrid|Milan|Munich|Naples|Oslo|Paris|Prague|Rome|Stockholm|Venice|Vienna|Warsaw|Zurich"
).split("|")
Fact = tuple[str, str]  # "phone number of the hotel", "555-7931"


def pick(rng: random.Random, choices: Sequence[str]) -> str:
    return choices[int(rng.random() * len(choices))]


def digits(rng: random.Random) -> str:
    return str(1000 + int(rng.random() * 9000))


def facts_drawn(rng: random.Random) -> Iterator[Fact]:
    """Facts without end, the four kinds equally often."""
    while True:
        kind = pick(rng, ("phone", "ship", "dog", "train"))
        if kind == "phone":
            yield f"phone number of the {pick(rng, PLACES)}", f"555-{digits(rng)}"
        elif kind == "train":
            yield f"number of the train to {pick(rng, CITIES)}", digits(rng)
        else:
            owner = pick(rng, OWNERS)
            yield f"name of the {owner}'s {kind}", pick(rng, SHIPS if kind == "ship" else DOGS)


def fresh(facts: Iterator[Fact], text: str) -> Iterator[Fact]:
    """Those whose subject and value did not come before and are not in the text."""
    used: set[str] = set()
    for subject, value in facts:
        if subject not in used and value not in used and value not in text:
            used |= {subject, value}
            yield subject, value


def write(folder: Path, name: str, paragraphs: list[str], facts: list[Fact]) -> None:
    kept = list(paragraphs)
    for i, (subject, value) in reversed(list(enumerate(facts))):
        at = (2 * i + 1) * len(paragraphs) // (2 * len(facts)) + 1
        kept.insert(at, f"The {subject} is {value}. Remember it. {value} is the {subject}.")
    (folder / f"{name}.txt").write_text("\n\n".join(kept) + "\n")
    lines = [f"What is the {subject}?\t{value}\n" for subject, value in facts]
    (folder / f"{name}.questions").write_text("".join(lines))


def found(daemon: Daemon, folder: Path, name: str) -> list[bool]:
    """Which questions the model answers rightly with everything read."""
    lines = (folder / f"{name}.questions").read_text().splitlines()
    rows = [line.split("\t") for line in lines]
    command = [
        *(str(BIN / "smollm2"), "--socket", str(daemon.socket), "--mass", "1", "ask"),
        *("--model", str(ROOT / "build/quickstart/model.gguf"), "--progress", "none", "--json"),
        *("--document", str(folder / f"{name}.txt"), "--tokens", "24"),
    ]
    for question, _ in rows:
        command += ["--question", question]
    answers = json.loads(subprocess.check_output(command))["answers"]
    return [value in answer["text"] for (_, value), answer in zip(rows, answers, strict=True)]


def make(daemon: Daemon, folder: Path, name: str, seed: int) -> None:
    text, (first, count) = (HERE / "town.txt").read_text(), PARAGRAPHS[name]
    facts = fresh(facts_drawn(random.Random(f"{seed} {name}")), text)
    paragraphs = text.strip().split("\n\n")[first : first + count]
    kept = [next(facts) for _ in range(N_FACTS)]
    n_missed = 0
    for _ in range(N_ROUNDS_MAX):
        write(folder, name, paragraphs, kept)
        is_found = found(daemon, folder, name)
        if all(is_found):
            print(f"{name}: {N_FACTS} of {N_FACTS + n_missed} drawn facts", flush=True)
            return
        n_missed += is_found.count(False)
        kept = [fact if ok else next(facts) for fact, ok in zip(kept, is_found)]
    sys.exit(f"{name}: no eight facts that the model finds in {N_ROUNDS_MAX} rounds")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("names", nargs="*", metavar="NAME", default=RETRIEVAL)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="winnow-documents-") as cache:
        pool = ("--host-pool", "256MiB", "--index-memory", "64MiB", "--disk-cap", "1GiB")
        with Daemon(Path(cache), *pool) as daemon:
            for name in args.names:
                make(daemon, args.out, name, args.seed)


if __name__ == "__main__":
    main()
