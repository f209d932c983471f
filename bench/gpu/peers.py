"""Dense attention of PyTorch and FlashInfer in the cells of bench-gpu-layer, as rows of its CSV.

  python3 bench/gpu/peers.py [--quick]

One decode step (one query a sequence) of 32 query and 8 KV heads, d 128, bf16, over all KV in
device memory: CUDA graphs over up to four layers' KV in turn, L2 flushed before, medians. SDPA with
each backend, the four query heads of a KV head as heads (`gqa`) and as four queries (`folded`);
FlashInfer with tensor cores where it can be imported. What does not run is a comment, and so are
SDPA's times of bench-gpu-window's cells: a window of a prompt over its past, unmasked.
"""

import sys
import warnings
from collections.abc import Callable, Iterator

try:
    import torch
except ImportError as missing:
    print(f"# no peers: {missing}")
    sys.exit(0)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

Q_HEADS, KV_HEADS, WIDTH, LAYERS_MAX, PAGE_TOKENS = 32, 8, 128, 4, 16
CELLS = [(t << 10, b) for t in (32, 128, 512) for b in (1, 8, 32)]
QUICK = [(32 << 10, 1), (128 << 10, 1), (128 << 10, 8), (512 << 10, 1)]
BACKENDS = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
]
RESERVE_BYTES = 4 << 30  # for workspaces and the flush
BUDGET_MS = 20.0  # of a graph's replays
FLUSH_BYTES = 256 << 20

WINDOWS = [(8 << 10, 2048), (32 << 10, 2048), (128 << 10, 512), (128 << 10, 2048), (128 << 10, 64)]

Attend = Callable[[torch.Tensor], torch.Tensor]


def median_us(attend: Attend, layers: list[torch.Tensor]) -> tuple[float, float]:
    """Median and largest time of a layer, from replays of a graph over all of them."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for layer in layers:
            attend(layer)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = [attend(layer) for layer in layers]
    times: list[float] = []
    n = 5
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for i in range(40):
        flush.fill_(i)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / len(layers))
        if i == 2:
            n = max(n, int(BUDGET_MS * 1000 / (times[-1] * len(layers))))
            times.clear()
        if i > 2 and len(times) >= n:
            break
    del out, graph
    times.sort()
    return times[len(times) // 2], times[-1]


def sdpa(tokens: int, batch: int) -> Iterator[tuple[str, Attend, tuple[int, ...]]]:
    """A layer is [K, V][batch][head][token][width]."""
    shape = (2, batch, KV_HEADS, tokens, WIDTH)
    q = torch.randn(batch, Q_HEADS, 1, WIDTH, dtype=torch.bfloat16, device="cuda")
    folded = q.view(batch, KV_HEADS, Q_HEADS // KV_HEADS, WIDTH)

    for backend in BACKENDS:

        def gqa(kv: torch.Tensor, backend: SDPBackend = backend) -> torch.Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, kv[0], kv[1], enable_gqa=True)

        def fold(kv: torch.Tensor, backend: SDPBackend = backend) -> torch.Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(folded, kv[0], kv[1])

        name = backend.name.removesuffix("_ATTENTION").lower()
        if backend != SDPBackend.EFFICIENT_ATTENTION:  # takes as many KV heads as query heads
            yield f"SDPA {name} gqa", gqa, shape
        yield f"SDPA {name} folded", fold, shape


def flashinfer(tokens: int, batch: int) -> Iterator[tuple[str, Attend, tuple[int, ...]]]:
    """A layer is [page][K, V][token][head][width]."""
    import flashinfer as library

    n_pages = tokens // PAGE_TOKENS
    q = torch.randn(batch, Q_HEADS, WIDTH, dtype=torch.bfloat16, device="cuda")
    workspace = torch.empty(512 << 20, dtype=torch.uint8, device="cuda")
    wrapper = library.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    ints = {"dtype": torch.int32, "device": "cuda"}
    wrapper.plan(
        torch.arange(batch + 1, **ints) * n_pages,
        torch.arange(batch * n_pages, **ints),
        torch.full((batch,), PAGE_TOKENS, **ints),
        Q_HEADS,
        KV_HEADS,
        WIDTH,
        PAGE_TOKENS,
        q_data_type=torch.bfloat16,
        kv_data_type=torch.bfloat16,
    )
    shape = (batch * n_pages, 2, PAGE_TOKENS, KV_HEADS, WIDTH)
    yield "FlashInfer paged", lambda kv: wrapper.run(q, kv), shape


def cell(tokens: int, batch: int) -> None:
    layer_bytes = tokens * batch * KV_HEADS * 2 * WIDTH * 2
    n_layers = min(LAYERS_MAX, (torch.cuda.mem_get_info()[0] - RESERVE_BYTES) // layer_bytes)
    if n_layers == 0:
        print(f"# {tokens} x {batch}: a layer's KV does not fit beside what PyTorch needs")
        return
    memory = torch.empty(n_layers * layer_bytes // 2, dtype=torch.bfloat16, device="cuda")
    memory.normal_()
    for family in (sdpa, flashinfer):
        try:
            for name, attend, shape in family(tokens, batch):
                layers = [layer.view(shape) for layer in memory.chunk(n_layers)]
                try:
                    us, us_max = median_us(attend, layers)
                except (RuntimeError, ValueError) as error:
                    reason = str(error).splitlines()[0]
                    print(f"# {tokens} x {batch}, {name}: {reason}")
                    continue
                rate = layer_bytes / us / 1e3
                print(
                    f"peer,{tokens},{batch},0,0,{n_layers},{us:.2f},{us_max:.2f},{rate:.1f},{name}"
                )
        except ImportError as error:
            print(f"# {family.__name__}: {error}")
    sys.stdout.flush()
    del memory, layers
    torch.cuda.empty_cache()


def window(tokens: int, positions: int) -> None:
    q = torch.randn(1, Q_HEADS, positions, WIDTH, dtype=torch.bfloat16, device="cuda")
    kv = torch.randn(2, 1, KV_HEADS, tokens, WIDTH, dtype=torch.bfloat16, device="cuda")
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):

        def attend(kv: torch.Tensor, backend: SDPBackend = backend) -> torch.Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, kv[0], kv[1], enable_gqa=True)

        name = f"window {tokens} past, {positions} positions, SDPA {backend.name.lower()}"
        try:
            us, _ = median_us(attend, [kv])
            rate = 4 * positions * Q_HEADS * WIDTH * tokens / us / 1e6
            print(f"# {name}: {us:.1f} us {rate:.1f} TFLOP/s")
        except RuntimeError as error:
            print(f"# {name}: {str(error).splitlines()[0]}")


def main() -> None:
    warnings.simplefilter("ignore")  # of backends that refuse a shape
    print(f"# PyTorch {torch.__version__}, {torch.cuda.get_device_name()}")
    for tokens, batch in QUICK if "--quick" in sys.argv[1:] else CELLS:
        cell(tokens, batch)
    for tokens, positions in WINDOWS[-2:-1] if "--quick" in sys.argv[1:] else WINDOWS:
        window(tokens, positions)


if __name__ == "__main__":
    main()
