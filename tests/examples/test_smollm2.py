"""smollm2 through a real winnowd, held against numbers that other implementations made.

    test_smollm2.py BIN_DIR [FILTER]

BIN_DIR holds smollm2 and winnowd. The model: WINNOW_MODEL, else build/quickstart/model.gguf; without
one everything is skipped (exit 77). tests/golden/smollm2/make_golden.py made the numbers.
"""

import json
import math
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests/golden/smollm2"
DOCUMENTS = ROOT / "examples/smollm2/documents"
MODEL = os.environ.get("WINNOW_MODEL", str(ROOT / "build/quickstart/model.gguf"))
ANSWER_KEYS = {"text", "token_ids", "share_read", "mass_reached", "verdicts"}


class Fixture:
    """A winnowd with a small pool, and a folder for files."""

    def __init__(self, bin_dir: Path, folder: Path, host_pool: str = "48MiB") -> None:
        self.bin_dir, self.folder, self.socket = bin_dir, folder, folder / "winnow.sock"
        self.data = folder / "data"
        self.data.mkdir(parents=True)
        options = ["--host-pool", host_pool, "--disk-cap", "512MiB"]
        command = [bin_dir / "winnowd", "--socket", self.socket, "--data-dir", self.data]
        self.log = (folder / "winnowd.log").open("w+")
        self.daemon = subprocess.Popen([*command, *options], stderr=self.log, stdout=self.log)
        deadline = time.monotonic() + 20
        ended = os.pidfd_open(self.daemon.pid)
        while not self.socket.exists():
            if select.select([ended], [], [], 0.02)[0] or time.monotonic() > deadline:
                self.log.seek(0)
                raise RuntimeError(f"winnowd did not start:\n{self.log.read()}")
        os.close(ended)

    def stop(self) -> int:
        self.daemon.send_signal(signal.SIGTERM)
        return self.daemon.wait(20)

    def run(self, *arguments: Any, socket: Path | None = None) -> subprocess.CompletedProcess[str]:
        command = [self.bin_dir / "smollm2", "--socket", socket or self.socket]
        command += ["--model", MODEL, "--progress", "none", *arguments]
        return subprocess.run([str(part) for part in command], capture_output=True, text=True)

    def json(self, *arguments: Any) -> dict[str, Any]:
        done = self.run(*arguments, "--json")
        assert done.returncode == 0, f"{arguments}: exit {done.returncode}: {done.stderr}"
        result: dict[str, Any] = json.loads(done.stdout)
        return result

    def file(self, name: str, content: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content)
        return path


def golden(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((GOLDEN / name).read_text())
    return result


def beginning(numbers: dict[str, Any], n_bytes: int) -> bytes:
    return (DOCUMENTS / numbers["document"]).read_bytes()[:n_bytes]


def test_tokens_are_llama_cpps(fixture: Fixture) -> None:
    """Digits, accents, emoji, code, white space, special tokens: the ids that llama.cpp makes."""
    numbers = golden("tokens.json")
    for row in numbers["texts"]:
        path = fixture.file("text", row["text"].encode())
        special = ["--special"] if row["special"] else []
        assert fixture.json("tokenize", path, *special) == {"tokens": row["tokens"]}, row["text"]
    document = fixture.json("tokenize", DOCUMENTS / numbers["document"])
    assert document["tokens"] == numbers["document_tokens"]


def test_usage_errors_and_no_daemon(fixture: Fixture) -> None:
    """What is wrong with a command line is 64, no daemon 69, a missing file 1; stdout stays empty."""
    text = fixture.file("text", b"one two")
    cases: list[tuple[int, list[Any]]] = [
        (64, []),
        (64, ["sing"]),
        (64, ["tokenize"]),
        (64, ["tokenize", text, text]),
        (64, ["logits", text, "--mass", "1.5"]),
        (64, ["logits", text, "--policy", "best"]),
        (64, ["logits", text, "--tops", "3"]),
        (64, ["complete", "--prompt", text]),
        (64, ["ask", "--question", "what?"]),
        (1, ["logits", fixture.folder / "missing"]),
    ]
    for status, arguments in cases:
        done = fixture.run(*arguments)
        assert (done.returncode, done.stdout) == (status, ""), (arguments, done)
        assert done.stderr.startswith("smollm2: "), done.stderr
    long = fixture.file("long", b"a b c d " * 3000)
    done = fixture.run("ask", "--document", long, "--question", "What?")
    assert done.returncode == 1 and "context is 8192" in done.stderr, done
    done = fixture.run("logits", text, socket=fixture.folder / "nobody.sock")
    assert (done.returncode, done.stdout) == (69, ""), done


def test_logits_are_an_fp32_forwards(fixture: Fixture) -> None:
    """With fp32 at rest the top 20 logits are within 2e-2 (rms), and the greedy tokens the same up to
    the first choice whose margin is under .1."""
    numbers = golden("logits.json")
    for prompt in numbers["prompts"]:
        path = fixture.file("prompt", beginning(numbers, prompt["n_bytes"]))
        result = fixture.json(
            *("logits", path, "--top", "60", "--generate", len(prompt["generated"])),
            *("--mass", "1", "--kv-dtype", "fp32"),
        )
        assert len(result["tokens"]) == prompt["n_tokens"]
        logits = dict(map(tuple, result["top"]))
        assert [id for id, _ in result["top"]][:1] == [prompt["top"][0][0]]
        square = sum((logits[id] - logit) ** 2 for id, logit in prompt["top"])
        rms = math.sqrt(square / len(prompt["top"]))
        assert rms < 2e-2, (prompt["n_tokens"], rms)
        for place, margin in enumerate(prompt["margins"]):
            if result["generated"][place] != prompt["generated"][place]:
                assert margin <= 0.1, (prompt["n_tokens"], place, margin)
                break


def test_perplexity_with_fp16_at_rest(fixture: Fixture) -> None:
    """Over the first 1,500 tokens perplexity is within .3 %, and no token's probability is far off."""
    numbers = golden("logits.json")
    path = fixture.file("text", beginning(numbers, numbers["perplexity_bytes"][0]))
    result = fixture.json("perplexity", path)
    assert result["n_tokens"] == 1500 and result["logprob"][0] is None
    assert abs(result["ppl"] / numbers["ppl"]["1500"] - 1) < 3e-3, result["ppl"]
    worst = max(abs(a - b) for a, b in zip(result["logprob"][1:], numbers["logprob"], strict=True))
    assert worst < 0.1, worst


def test_completions_do_not_depend_on_each_other(fixture: Fixture) -> None:
    """Suffixes on forks of one prompt are answered as each alone, and with everything read."""
    prompt = fixture.file("prompt", (DOCUMENTS / "town.txt").read_bytes()[:4000])
    ends = (b"\n\nThe harbour", b"\n\nIn the evening <|im_end|>", b" ")
    suffixes = [fixture.file(f"suffix{i}", text) for i, text in enumerate(ends)]
    options = ["complete", "--prompt", prompt, "--tokens", "8", "--mass", "1"]
    joint = [part for path in suffixes for part in ("--suffix", path)]
    together = fixture.json(*options, *joint)["completions"]
    assert len(together) == len(ends)
    for one, path in zip(together, suffixes):
        assert ANSWER_KEYS <= set(one) and len(one["token_ids"]) <= 8, one
        assert one["share_read"] == 1 and set(one["verdicts"]) == {"EXACT"}, one
        alone = fixture.json(*options, "--suffix", path)["completions"][0]
        assert alone["token_ids"] == one["token_ids"], (one, alone)


def test_sparse_answers_are_right_where_dense_ones_are(fixture: Fixture) -> None:
    """Facts hidden in 2,000 tokens are found at the default P wherever they are found at P = 1, and
    sparse steps read less than all."""
    lines = (DOCUMENTS / "retrieval-2000.questions").read_text().splitlines()
    rows = [line.split("\t") for line in lines]
    options: list[Any] = ["ask", "--document", DOCUMENTS / "retrieval-2000.txt", "--tokens", "20"]
    for question, _ in rows:
        options += ["--question", question]
    sparse, exact = (fixture.json(*options, *mass)["answers"] for mass in ([], ["--mass", "1"]))
    right = [[expected in a["text"] for a, (_, expected) in zip(side, rows)] for side in (sparse, exact)]
    assert sum(right[1]) >= 6, exact
    assert all(s or not e for s, e in zip(*right)), (sparse, exact)
    for (question, _), answer in zip(rows, sparse):
        assert ANSWER_KEYS | {"question"} <= set(answer) and answer["question"] == question
        assert answer["share_read"] < 1 and answer["mass_reached"] > 0.9, answer
        assert set(answer["verdicts"]) <= {"MET", "SHORT"}, answer


def test_compare_reports_both_sides(fixture: Fixture) -> None:
    """compare has what report.json needs; its two sides part no further than their divergence says."""
    questions = fixture.file("questions", b"What is the name of the baker's cat?\tPepper\n")
    options = ["--document", DOCUMENTS / "retrieval-2000.txt", "--questions", questions]
    result = fixture.json("compare", *options, "--tokens", "12")
    assert set(result) >= {"model", "context", "memory", "phases", "sparse", "exact", "compare"}
    assert result["context"]["kv_bytes"] == result["context"]["tokens"] * 23040, result["context"]
    assert result["exact"]["share_read"] == 1 and result["sparse"]["share_read"] < 1
    assert len(result["sparse"]["share_read_layer"]) == result["model"]["layers"] == 30
    assert 0 <= result["compare"]["kl_mean_nats"] <= result["compare"]["kl_max_nats"] < 1
    assert result["exact"]["answers"][0]["correct"], result["exact"]["answers"]


SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def test_chat_keeps_its_turns(fixture: Fixture) -> None:
    """Each line of standard input gets the answer that the transcript so far gets as a prompt, also
    where the answer before was cut short."""
    lines, n_tokens = ("Name a colour.", "Name another."), 6
    command = [fixture.bin_dir / "smollm2", "--socket", fixture.socket, "--model", MODEL, "chat"]
    done = subprocess.run(
        [*command, "--mass", "1", "--tokens", str(n_tokens)],
        input="\n".join(lines),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done
    answers = [part.rsplit("]\n", 1)[-1] for part in done.stdout.split("\n[")[:-1]]
    assert len(answers) == len(lines), done.stdout
    transcript = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
    for line, answer in zip(lines, answers):
        turn = f"<|im_start|>user\n{line}<|im_end|>\n<|im_start|>assistant\n"
        paths = fixture.file("prompt", transcript.encode()), fixture.file("suffix", turn.encode())
        options = ["--prompt", paths[0], "--suffix", paths[1], "--tokens", n_tokens, "--mass", "1"]
        alone = fixture.json("complete", *options)["completions"][0]
        assert alone["text"] == answer, (alone, done.stdout)
        transcript += turn + answer + "<|im_end|>\n"


def damage(folder: Path) -> int:
    """Changes a byte of every page of the data files; how many pages."""
    n_pages = 0
    for path in folder.rglob("*"):
        if not path.is_file() or path.stat().st_size < 1 << 20:
            continue
        with path.open("r+b", buffering=0) as data:
            for offset in range(0, path.stat().st_size, 4096):
                byte = os.pread(data.fileno(), 1, offset)
                os.pwrite(data.fileno(), bytes([byte[0] ^ 0x55]), offset)
                n_pages += 1
            os.fsync(data.fileno())
    return n_pages


def two_turns(fixture: Fixture, between: Callable[[], None]) -> list[str]:
    """A chat whose first turn is a text of 1,900 tokens: its two answers."""
    command = [fixture.bin_dir / "smollm2", "--socket", fixture.socket, "--model", MODEL, "chat"]
    text = (DOCUMENTS / "retrieval-2000.txt").read_text().replace("\n", " ")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    chat = subprocess.Popen([*command, "--mass", "1", "--tokens", "12"], text=True, **pipes)
    assert chat.stdin and chat.stdout
    answers = []
    for line in (text + " What is the name of the baker's cat?", "And what is its colour?"):
        chat.stdin.write(line + "\n")
        chat.stdin.flush()
        part = ""
        while "share read" not in part:
            assert (more := chat.stdout.readline()), part
            part += more
        answers.append(part.split("\n[")[0])
        between()
    chat.stdin.close()
    assert chat.wait(60) == 0
    return answers


def test_lost_blocks_are_sent_again(fixture: Fixture) -> None:
    """With every page of the disk damaged between two turns the answers are those of a run
    undisturbed: what is lost is cut away and its tokens are sent again."""
    small = Fixture(fixture.bin_dir, fixture.folder / "small", host_pool="24MiB")
    pages: list[int] = []
    try:
        undisturbed = two_turns(small, lambda: None)
        damaged = two_turns(small, lambda: pages.append(damage(small.data)))
        status = json.loads(
            subprocess.check_output(
                [small.bin_dir / "winnow", "status", "--json", "--socket", small.socket]
            )
        )
    finally:
        small.stop()
    assert pages[0] > 1000, pages
    assert any(row["reason"] == "ENODATA" and row["n"] > 0 for row in status["errors"]), status
    assert damaged == undisturbed, (damaged, undisturbed)


def peak_rss_bytes(fixture: Fixture, n_bytes: int) -> int:
    path = fixture.file("text", (DOCUMENTS / "gpl-3.txt").read_bytes()[:n_bytes])
    command = [fixture.bin_dir / "smollm2", "--socket", fixture.socket, "--model", MODEL]
    child = subprocess.Popen([*command, "logits", path], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    assert status == 0
    return usage.ru_maxrss * 1024


def test_memory_does_not_grow_with_the_context(fixture: Fixture) -> None:
    """The engine keeps no KV: its peak is the same at 700 and at 2,700 tokens (45 MiB of KV apart)."""
    short, long = peak_rss_bytes(fixture, 3000), peak_rss_bytes(fixture, 12300)
    assert abs(long - short) < 8 << 20, (short, long)


TESTS: list[Callable[[Fixture], None]] = [
    value for name, value in list(globals().items()) if name.startswith("test_")
]


def main() -> int:
    if not Path(MODEL).exists():
        print(f"SKIP: no model at {MODEL} (WINNOW_MODEL, or ./quickstart --setup)")
        return 77
    only = sys.argv[2] if len(sys.argv) > 2 else ""
    with tempfile.TemporaryDirectory(prefix="winnow-test-") as folder:
        fixture = Fixture(Path(sys.argv[1]), Path(folder))
        try:
            for test in TESTS:
                if only in test.__name__:
                    start = time.monotonic()
                    test(fixture)
                    print(f"ok {test.__name__} {time.monotonic() - start:.1f} s", flush=True)
        finally:
            status = fixture.stop()
        assert status == 0, f"winnowd ended with {status}"
    return 0


if __name__ == "__main__":
    sys.exit(main())
