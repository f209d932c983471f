"""Steps 4 to 6 of ./quickstart: winnowd with a small pool, the example engine, table and report.

Starts build/release/bin/winnowd, lets smollm2 read the document once and answer every question
twice on forks (at the default P, and with everything read), prints the table and writes
build/quickstart/report.json (schema winnow.report/1: docs/report.md).
"""

import argparse
import datetime
import json
import os
import platform
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BIN = ROOT / "build/release/bin"
DOCUMENTS = ROOT / "examples/smollm2/documents"
HOST_POOL_MIB, INDEX_MIB, DISK_MIB, SEGMENT_TOKENS = 32, 32, 512, 512
MIB = 1 << 20


def say(step: int, text: str) -> None:
    print(f"[{step}/6] {text}", file=sys.stderr, flush=True)


class Daemon:
    """winnowd for the length of a with statement."""

    def __init__(self, cache: Path, *options: str) -> None:
        self.run_dir = Path(tempfile.mkdtemp(prefix="winnow-"))
        self.socket = self.run_dir / "winnow.sock"
        self.log = ROOT / "build/quickstart/winnowd.log"
        cache.mkdir(parents=True, exist_ok=True)
        self.command = [
            *(str(BIN / "winnowd"), "--socket", str(self.socket), "--data-dir", str(cache / "data")),
            *options,
        ]

    def __enter__(self) -> "Daemon":
        with self.log.open("w") as log:
            self.process = subprocess.Popen(self.command, stderr=log, stdout=log)
        deadline = time.monotonic() + 20
        exited = os.pidfd_open(self.process.pid)
        while not self.socket.exists():
            if select.select([exited], [], [], 0.02)[0] or time.monotonic() > deadline:
                sys.exit(f"quickstart: winnowd did not start:\n{self.log.read_text()}")
        os.close(exited)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
        shutil.rmtree(self.run_dir, ignore_errors=True)

    def rss_peak_bytes(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(s.split()[1]) * 1024 for s in status.splitlines() if s.startswith("VmHWM"))

    def status(self) -> dict[str, Any]:
        command = [str(BIN / "winnow"), "status", "--json", "--socket", str(self.socket)]
        result: dict[str, Any] = json.loads(subprocess.check_output(command))
        return result


def machine(status: dict[str, Any]) -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((s.split(":", 1)[1].strip() for s in cpuinfo if s.startswith("model name")), "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu,
        "isa": status.get("kernels"),
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "kernel": platform.release(),
        "io_method": status.get("io_method"),
        "gpu": None,
    }


def report_make(run: dict[str, Any], daemon: Daemon, started: float) -> dict[str, Any]:
    status = daemon.status()
    created = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    version = subprocess.check_output([str(BIN / "winnow"), "version"], text=True).split()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    memory = {**run["memory"], "rss_peak_bytes": daemon.rss_peak_bytes()}
    return {
        "schema": "winnow.report/1",
        "created_utc": created,
        "exit": 0,
        "duration_s": round(time.monotonic() - started, 3),
        "machine": machine(status),
        "build": {"version": version[1].rstrip(","), "commit": commit or None},
        "model": run["model"],
        "context": run["context"],
        "config": {
            "policy": status.get("policy", "codes"),
            "mass": run["sparse"]["mass_asked"],
            "sinks": 16,
            "segment_tokens": SEGMENT_TOKENS,
            "threads": status.get("threads"),
            "host_pool_bytes": HOST_POOL_MIB * MIB,
            "disk_cap_bytes": DISK_MIB * MIB,
        },
        "memory": memory,
        "phases": run["phases"],
        "sparse": run["sparse"],
        "exact": run["exact"],
        "compare": run["compare"],
        "warnings": [],
    }


def bar(share: float, width: int = 10) -> str:
    return "|" + ("#" * round(share * width)).ljust(width) + "|"


def answer_text(answer: dict[str, Any]) -> str:
    """What was asked for where it was found, else how the answer ends."""
    text = answer["expected"] if answer["correct"] else answer["text"].strip()[-16:]
    return text.replace("\n", " ") + (" ok" if answer["correct"] else " WRONG")


def table_print(report: dict[str, Any]) -> None:
    sparse, exact, compare = report["sparse"], report["exact"], report["compare"]
    print(f"{'question':<48}{'sparse P ' + format(report['config']['mass'], '.2g'):<23}everything")
    for one, other in zip(sparse["answers"], exact["answers"]):
        print(f"{one['question'][:46]:<48}{answer_text(one):<23}{answer_text(other)}")
    parted = f", parted at {compare['first_difference']}" if compare["first_difference"] else ""
    print(f"same tokens {compare['tokens_equal']} of {compare['tokens_total']}{parted};", end=" ")
    print(f"KL mean {compare['kl_mean_nats']:.4f} max {compare['kl_max_nats']:.4f} nats")
    read = [side["read_bytes_per_token"] for side in (sparse, exact)]
    total = [sum(v for v in r.values() if v) / MIB for r in read]
    print(f"tokens/s      {sparse['tokens_per_s']:>9.1f} {exact['tokens_per_s']:>9.1f}", end="    ")
    print(f"KV         {report['context']['kv_bytes'] / MIB:8.1f} MiB")
    print(f"read a token  {total[0]:>5.1f} MiB {total[1]:>5.1f} MiB    ", end="")
    print(f"host pool  {report['config']['host_pool_bytes'] / MIB:8.1f}")
    host_disk = [f"{r['host'] / MIB:.1f} | {r['disk'] / MIB:.1f}" for r in read]
    print(f"host | disk {host_disk[0]:>11} {host_disk[1]:>9}    ", end="")
    print(f"index      {report['memory']['index_bytes'] / MIB:8.1f}")
    print(f"{'':<38}KV on disk {report['memory']['kv_disk_bytes'] / MIB:8.1f}")
    print(f"{'':<38}RSS peak   {report['memory']['rss_peak_bytes'] / MIB:8.1f}")
    print(f"mass asked {sparse['mass_asked']:.2f} reached {sparse['mass_reached']:.3f}", end=" ")
    print(f"(estimate) worst {sparse['mass_worst']:.3f}   ", end="")
    print(f"written {sparse['written_bytes'] / MIB:.0f} MiB")
    rows = [
        f"{layer:>3} {bar(share)} {share:4.0%}"
        for layer, share in enumerate(sparse["share_read_layer"])
    ]
    print(f"share read {sparse['share_read']:.1%}, by layer:")
    for first in range(0, len(rows), 4):
        print("  ".join(rows[first : first + 4]))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--progress", default="auto")
    parser.add_argument("--cache", type=Path, required=True)
    args = parser.parse_args()
    started = time.monotonic()
    options = [
        *("--host-pool", f"{HOST_POOL_MIB}MiB", "--index-memory", f"{INDEX_MIB}MiB"),
        *("--disk-cap", f"{DISK_MIB}MiB", "--segment-tokens", str(SEGMENT_TOKENS)),
    ]
    with Daemon(args.cache, *options) as daemon:
        say(4, f"winnowd ok pool {HOST_POOL_MIB} MiB, index {INDEX_MIB} MiB, disk {DISK_MIB} MiB")
        say(5, "the model reads the document, then answers from disk, sparse and with everything read")
        command = [
            *(str(BIN / "smollm2"), "--socket", str(daemon.socket)),
            *("--model", str(ROOT / "build/quickstart/model.gguf"), "compare"),
            *("--document", str(DOCUMENTS / "quickstart.txt")),
            *("--questions", str(DOCUMENTS / "quickstart.questions")),
            *("--progress", args.progress, "--json"),
        ]
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        except KeyboardInterrupt:
            return 130
        if done.returncode:
            print(daemon.log.read_text()[-2000:], file=sys.stderr)
            return 1
        report = report_make(json.loads(done.stdout), daemon, started)
    sparse, exact = report["sparse"], report["exact"]
    right = [a["correct"] for a in sparse["answers"]]
    kept = all(a["correct"] or not b["correct"] for a, b in zip(sparse["answers"], exact["answers"]))
    report["exit"] = 0 if kept and any(right) and sparse["mass_reached"] >= sparse["mass_asked"] else 2
    path = ROOT / "build/quickstart/report.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    say(6, "report ok")
    table_print(report)
    if report["exit"]:
        print("quickstart: a promise was missed: see WRONG, or mass reached", file=sys.stderr)
    print(f"{path.relative_to(ROOT)}  next: winnow status")
    return int(report["exit"])


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    sys.exit(main())
