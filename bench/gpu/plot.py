"""Draws time over context length out of a CSV of bench/gpu/run, beside it as PNG.

python3 bench/gpu/plot.py gpu_layer.csv      needs matplotlib; without it says so
"""

import csv
import sys
from pathlib import Path

KV_BYTES = 4096  # of a token and layer


def main() -> int:
    path = Path(sys.argv[1])
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no plot: matplotlib is not there")
        return 0
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    rows = list(csv.DictReader(lines))
    card = next(r["note"].split(";")[0] for r in rows if r["what"] == "card")
    copy_rate = next(float(r["gbs"]) for r in rows if r["what"] == "copy")
    batches = sorted({int(r["batch"]) for r in rows if r["what"] == "layer"})
    figure, axes = plt.subplots(1, len(batches), figsize=(4 * len(batches), 4), sharey=True)
    for axis, batch in zip(axes, batches):
        of = [r for r in rows if int(r["batch"]) == batch]
        tokens = sorted({int(r["tokens"]) for r in of if r["what"] == "layer"})
        dense: dict[int, float] = {}
        for r in of:
            if r["what"] in ("dense", "peer") and int(r["tokens"]) in tokens:
                n = int(r["tokens"])
                dense[n] = min(dense.get(n, float("inf")), float(r["us"]))
        streamed = [n * batch * KV_BYTES / copy_rate / 1e3 for n in tokens]
        axis.plot(tokens, streamed, "k:s", label="streamed from host memory")
        axis.plot(list(dense), list(dense.values()), "k-o", label="dense in device memory, fastest")
        for hits, style in ((0.9, "-"), (1.0, "--")):
            points = {
                int(r["tokens"]): float(r["us"])
                for r in of
                if r["what"] == "layer" and float(r["share"]) == 0.02 and float(r["hits"]) == hits
            }
            axis.plot(
                list(points),
                list(points.values()),
                f"C0{style}^",
                label=f"Winnow, 2 %, h {hits:g}",
            )
        axis.set(xscale="log", yscale="log", title=f"batch {batch}", xlabel="tokens a session")
        axis.set_xticks(tokens, [f"{n >> 10}K" for n in tokens])
        axis.minorticks_off()
        axis.grid(True, which="major", alpha=0.3)
    axes[0].set_ylabel("us a layer")
    axes[0].legend(fontsize=8)
    figure.suptitle(f"One layer of a decode step, Llama-3.1-8B's shape, {card}")
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=110)
    print(f"plot: {path.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
