"""The main job measured: SmolLM2 through winnowd, ratios in one run. Needs ./quickstart --setup.

  python3 bench/main_job.py speed      sparse against everything read, from memory and from disk;
                                       llama.cpp beside it where `llama_cpp` can be imported
  python3 bench/main_job.py policies   the quickstart's document under every policy
  python3 bench/main_job.py masses     the quickstart's document for P from .5 to 1
  python3 bench/main_job.py retrieval  24 questions in documents of 2,000, 4,000, 7,000 tokens;
                                       --documents FOLDER: other ones of make_documents.py

Prints markdown with the machine, the commit and the command; --json the numbers.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
from quickstart import BIN, DOCUMENTS, Daemon  # noqa: E402

MODEL = ROOT / "build/quickstart/model.gguf"
SMALL = ["--host-pool", "32MiB", "--index-memory", "32MiB", "--disk-cap", "512MiB"]
ALL_64 = ["--host-pool", "36MiB", "--index-memory", "28MiB", "--disk-cap", "512MiB"]
LARGE = ["--host-pool", "256MiB", "--index-memory", "64MiB", "--disk-cap", "1GiB"]
MIB = 1 << 20


def machine() -> str:
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((s.split(":", 1)[1].strip() for s in cpuinfo if s.startswith("model name")), "?")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    date = time.strftime("%Y-%m-%d", time.gmtime())
    return f"{date}, {os.cpu_count()} cores of {cpu}, Linux {platform.release()}, commit {commit}"


def compare(
    daemon: Daemon, name: str, *options: str, documents: Path = DOCUMENTS
) -> dict[str, Any]:
    """The document read once, every question answered sparse and exact on forks."""
    command = [
        *(str(BIN / "smollm2"), "--socket", str(daemon.socket), "--model", str(MODEL), "compare"),
        *("--document", str(documents / f"{name}.txt")),
        *("--questions", str(documents / f"{name}.questions")),
        *("--progress", "none", "--json", *options),
    ]
    result: dict[str, Any] = json.loads(subprocess.check_output(command))
    return result


def right(side: dict[str, Any]) -> int:
    return sum(answer["correct"] for answer in side["answers"])


def lost(run: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The answers, sparse and exact, that are right with everything read alone."""
    pairs = zip(run["sparse"]["answers"], run["exact"]["answers"], strict=True)
    return [(one, other) for one, other in pairs if other["correct"] and not one["correct"]]


def llama() -> dict[str, float] | None:
    """llama.cpp with the whole cache in memory, the same document, tokens per second."""
    try:
        import llama_cpp
    except ImportError:
        return None
    text = (DOCUMENTS / "quickstart.txt").read_bytes()
    model = llama_cpp.Llama(
        str(MODEL), n_ctx=8192, n_threads=os.cpu_count(), n_threads_batch=os.cpu_count(),
        n_batch=512, verbose=False,
    )
    tokens = model.tokenize(text, add_bos=False)
    start = time.monotonic()
    model.eval(tokens)
    prefill = len(tokens) / (time.monotonic() - start)
    steps = []
    for token in tokens[:48]:  # which token it is does not matter to the time
        start = time.monotonic()
        model.eval([token])
        steps.append(time.monotonic() - start)
    return {"prefill": prefill, "decode": 1 / sorted(steps)[len(steps) // 2]}


def row(name: str, side: dict[str, Any]) -> str:
    """Median token; means of the parts: in winnowd, on the way there, in the engine."""
    read, parts = side["read_bytes_per_token"], side["token_s"]
    part_ms = " | ".join(f"{parts[p] * 1e3:.1f}" for p in ("daemon", "way", "engine"))
    return (
        f"| {name} | {1 / side['step_s']['p50']:.1f} | {side['step_s']['p50'] * 1e3:.1f} | "
        f"{part_ms} | {side['share_read']:.1%} | "
        f"{read['host'] / MIB:.1f} | {read['disk'] / MIB:.1f} |"
    )


def speed(cache: Path) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, options in (("memory", LARGE), ("disk", SMALL), ("disk, 64 MiB in all", ALL_64)):
        with Daemon(cache, *options) as daemon:
            result[name] = compare(daemon, "quickstart")
    result["llama"] = llama()
    print("| run | tokens/s | token ms | daemon | way | engine | blocks read | memory MiB | disk MiB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in ("memory", "disk"):
        print(row(f"{name}, P 0.9", result[name]["sparse"]))
        print(row(f"{name}, everything", result[name]["exact"]))
    print(row("disk, 64 MiB in all, P 0.9", result["disk, 64 MiB in all"]["sparse"]))
    if result["llama"]:
        decode = result["llama"]["decode"]
        print(f"| llama.cpp, all in memory | {decode:.1f} | {1e3 / decode:.1f} | | | | 100 % | | |")
    prefill = [result[n]["sparse"]["prefill_tokens_per_s"] for n in ("memory", "disk")]
    print(f"\nPrefill: {prefill[0]:.0f} tokens/s (256 MiB pool), {prefill[1]:.0f} (32 MiB)", end="")
    print(f", llama.cpp {result['llama']['prefill']:.0f}" if result["llama"] else "", end=".\n")
    disk = [result["disk"][k]["token_s"]["daemon"] for k in ("sparse", "exact")]
    print(f"From disk, winnowd's part: everything / sparse = {disk[1] / disk[0]:.1f}.")
    if result["llama"]:
        whole = {
            "memory, P 0.9": result["memory"]["sparse"],
            "memory, everything": result["memory"]["exact"],
            "disk, P 0.9": result["disk"]["sparse"],
            "disk, 64 MiB in all, P 0.9": result["disk, 64 MiB in all"]["sparse"],
        }
        ratios = ", ".join(f"{n} {1 / side['step_s']['p50'] / decode:.2f}" for n, side in whole.items())
        print(f"Whole tokens against llama.cpp: {ratios}; prefill {prefill[0] / result['llama']['prefill']:.2f}.")
    return result


def policies(cache: Path, documents: Path) -> dict[str, Any]:
    result: dict[str, Any] = {}
    print("| policy | blocks read | answers right | of those P = 1 has right | KL mean | tokens/s |")
    print("| --- | --- | --- | --- | --- | --- |")
    with Daemon(cache, *LARGE) as daemon:
        for policy in ("codes", "tactic", "moment", "exact"):
            run = result[policy] = compare(
                daemon, "quickstart", "--policy", policy, documents=documents
            )
            side, exact = run["sparse"], run["exact"]
            kept = right(exact) - len(lost(run))
            print(
                f"| `{policy}` | {side['share_read']:.1%} | {right(side)} of {len(side['answers'])} | "
                f"{kept} of {right(exact)} | {run['compare']['kl_mean_nats']:.4f} | "
                f"{1 / side['step_s']['p50']:.1f} |"
            )
    return result


def masses(cache: Path, documents: Path) -> dict[str, Any]:
    options = [part for mass in (0.5, 0.7, 0.8, 0.9, 0.95, 1) for part in ("--mass", str(mass))]
    with Daemon(cache, *LARGE) as daemon:
        result = compare(daemon, "quickstart", *options, documents=documents)
    print("| P | blocks read | mass reached | KL mean, nats | KL largest | same tokens |")
    print("| --- | --- | --- | --- | --- | --- |")
    for one in result["masses"]:
        print(
            f"| {one['mass_asked']:.2f} | {one['share_read']:.1%} | {one['mass_reached']:.3f} | "
            f"{one['kl_mean_nats']:.5f} | {one['kl_max_nats']:.4f} | "
            f"{one['tokens_equal']} of {one['tokens_total']} |"
        )
    return result


def retrieval(cache: Path, documents: Path) -> dict[str, Any]:
    names = ("retrieval-2000", "retrieval-4000", "retrieval-7000")
    result: dict[str, Any] = {}
    table: list[list[int]] = []
    with Daemon(cache, *LARGE) as daemon:
        for policy in ("codes", "tactic", "moment"):
            result[policy] = {
                name: compare(daemon, name, "--policy", policy, documents=documents)
                for name in names
            }
    print("| document | right at P = 1 | of these by `codes` | by `tactic` | by `moment` |")
    print("| --- | --- | --- | --- | --- |")
    for name in names:
        n_right = right(result["codes"][name]["exact"])
        table.append([n_right, *(n_right - len(lost(runs[name])) for runs in result.values())])
        print(f"| {name} | {' | '.join(map(str, table[-1]))} |")
    print(f"| all 24 | {' | '.join(str(sum(column)) for column in zip(*table))} |")
    for name in names:
        for one, other in lost(result["codes"][name]):
            print(f"\nLost by `codes`, {name}: {one['question']} {other['expected']}")
            print(f"sparse: {one['text'].strip()!r}; everything: {other['text'].strip()!r}")
    return result


QUALITY = {"policies": policies, "masses": masses, "retrieval": retrieval}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["speed", *QUALITY])
    parser.add_argument("--documents", type=Path, default=DOCUMENTS)
    parser.add_argument("--json", action="store_true", help="numbers on stdout, the table on stderr")
    args = parser.parse_args()
    stdout = sys.stdout
    if args.json:
        sys.stdout = sys.stderr
    print(f"`python3 bench/main_job.py {args.what}`: {machine()}\n")
    with tempfile.TemporaryDirectory(dir=ROOT / "build", prefix="bench-") as folder:
        cache = Path(folder)
        result = (
            speed(cache) if args.what == "speed" else QUALITY[args.what](cache, args.documents)
        )
    if args.json:
        json.dump(result, stdout)


if __name__ == "__main__":
    main()
