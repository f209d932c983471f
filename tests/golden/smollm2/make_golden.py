"""Golden numbers for examples/smollm2, made by two other implementations.

    make_golden.py tokens MODEL.gguf      tokens.json: llama.cpp (pip install llama-cpp-python)
    make_golden.py logits MODEL.gguf      logits.json: the fp32 forward below over the weights as
                                          the GGUF dequantises them (pip install gguf numpy)

llama.cpp is no judge of logits: it rounds activations to 8 bits and differs by .1 to .5.
The texts are committed beside this file and in examples/smollm2/documents.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
HERE = Path(__file__).resolve().parent
TEXT = HERE.parents[2] / "examples/smollm2/documents/gpl-3.txt"
PROMPT_TOKENS, PERPLEXITY_TOKENS, TOP, CONTINUED = (5, 50, 500, 2000), (1500, 7000), 20, 16


class Model:
    """The network in numpy: fp32, no KV cache; every call reads its whole prompt."""

    def __init__(self, path: str) -> None:
        from gguf import GGUFReader
        from gguf.quants import dequantize

        reader = GGUFReader(path)

        def value(key: str) -> Any:
            return reader.fields["llama." + key].contents()

        self.weights: dict[str, Array] = {
            t.name: dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors
        }
        self.n_layers, self.n_heads = value("block_count"), value("attention.head_count")
        self.n_kv_heads = value("attention.head_count_kv")
        self.epsilon = np.float32(value("attention.layer_norm_rms_epsilon"))
        self.rope_base = float(value("rope.freq_base"))
        self.width = value("embedding_length") // self.n_heads

    def norm(self, x: Array, name: str) -> Array:
        scale = np.sqrt(np.mean(x * x, axis=1, keepdims=True) + self.epsilon)
        return x / scale * self.weights[name + ".weight"]

    def rotate(self, x: Array) -> Array:
        """x [n][heads][width]: pairs (2 i, 2 i + 1) turn by position * base^(-2 i / width)."""
        speed = self.rope_base ** (-np.arange(0, self.width, 2) / self.width)
        angle = np.arange(len(x))[:, None] * speed
        cosine, sine = (f(angle).astype(np.float32)[:, None] for f in (np.cos, np.sin))
        even, odd = x[..., 0::2], x[..., 1::2]
        turned = np.stack([even * cosine - odd * sine, even * sine + odd * cosine], axis=-1)
        return turned.reshape(x.shape)

    def attend(self, q: Array, k: Array, v: Array) -> Array:
        n, group = len(q), self.n_heads // self.n_kv_heads
        out = np.empty_like(q)
        for first in range(0, n, 512):
            end = min(first + 512, n)
            hidden = np.arange(end) > np.arange(first, end)[:, None]
            for h in range(self.n_heads):
                scores = q[first:end, h] @ k[:end, h // group].T / np.float32(np.sqrt(self.width))
                scores[hidden] = -np.inf
                scores = np.exp(scores - scores.max(axis=1, keepdims=True))
                scores /= scores.sum(axis=1, keepdims=True)
                out[first:end, h] = scores @ v[:end, h // group]
        return out

    def hidden(self, ids: list[int]) -> Array:
        """The normed last layer of every position."""
        w, n = self.weights, len(ids)
        x = w["token_embd.weight"][ids]
        for layer in range(self.n_layers):
            b = f"blk.{layer}."
            a = self.norm(x, b + "attn_norm")
            q, k, v = (a @ w[b + f"attn_{part}.weight"].T for part in "qkv")
            heads = self.attend(
                self.rotate(q.reshape(n, self.n_heads, self.width)),
                self.rotate(k.reshape(n, self.n_kv_heads, self.width)),
                v.reshape(n, self.n_kv_heads, self.width),
            )
            x = x + heads.reshape(n, -1) @ w[b + "attn_output.weight"].T
            a = self.norm(x, b + "ffn_norm")
            gate = a @ w[b + "ffn_gate.weight"].T
            up = a @ w[b + "ffn_up.weight"].T
            x = x + (gate / (1 + np.exp(-gate)) * up) @ w[b + "ffn_down.weight"].T
        return self.norm(x, "output_norm")

    def logits(self, hidden: Array) -> Array:
        output: Array = hidden @ self.weights["token_embd.weight"].T
        return output


def prompt_golden(model: Model, ids: list[int], n_bytes: int) -> dict[str, Any]:
    """The top logits after a prompt, and its greedy continuation with the margin of each choice."""
    read, generated, margins, top = list(ids), [], [], []
    for step in range(CONTINUED):
        logits = model.logits(model.hidden(read)[-1:])[0]
        order = np.argsort(-logits, kind="stable")[:TOP]
        if step == 0:
            top = [[int(i), round(float(logits[i]), 5)] for i in order]
        generated.append(int(order[0]))
        margins.append(round(float(logits[order[0]] - logits[order[1]]), 4))
        read.append(int(order[0]))
    return {"n_tokens": len(ids), "n_bytes": n_bytes, "top": top, "generated": generated} | {
        "margins": margins
    }


def perplexity_golden(model: Model, ids: list[int]) -> dict[str, Any]:
    hidden = model.hidden(ids)
    logprobs: list[float] = []
    for first in range(0, len(ids) - 1, 256):
        logits = model.logits(hidden[first : first + 256]).astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
        following = ids[first + 1 : first + 257]
        logprobs += [float(row[i]) for row, i in zip(logits, following)]
    return {
        "logprob": [round(p, 4) for p in logprobs[: PERPLEXITY_TOKENS[0] - 1]],
        "ppl": {str(n): float(np.exp(-np.mean(logprobs[: n - 1]))) for n in PERPLEXITY_TOKENS},
    }


def text_tokens(path: str, counts: tuple[int, ...] = ()) -> tuple[list[int], list[int]]:
    """The text's ids, and for each count the bytes of the text's beginning that are so many ids."""
    from llama_cpp import Llama

    llama = Llama(path, vocab_only=True, verbose=False)
    text = TEXT.read_bytes()
    ids: list[int] = llama.tokenize(text, add_bos=False, special=False)
    sizes = [len(llama.detokenize(ids[:n])) for n in counts]
    for n, n_bytes in zip(counts, sizes):
        assert llama.tokenize(text[:n_bytes], add_bos=False, special=False) == ids[:n]
    return ids, sizes


def make_tokens(path: str) -> dict[str, Any]:
    from llama_cpp import Llama

    llama = Llama(path, vocab_only=True, verbose=False)
    texts: list[str] = json.loads((HERE / "texts.json").read_text())
    rows = []
    for text in texts:
        for special in (False, True):
            if special and "<|" not in text:
                continue
            ids = llama.tokenize(text.encode(), add_bos=False, special=special)
            rows.append({"text": text, "special": special, "tokens": ids})
    document, _ = text_tokens(path)
    return {"texts": rows, "document": TEXT.name, "document_tokens": document}


def make_logits(path: str) -> dict[str, Any]:
    model = Model(path)
    ids, sizes = text_tokens(path, PROMPT_TOKENS + PERPLEXITY_TOKENS)
    prompts = [prompt_golden(model, ids[:n], size) for n, size in zip(PROMPT_TOKENS, sizes)]
    read = {"perplexity_bytes": sizes[len(PROMPT_TOKENS) :]}
    return {"document": TEXT.name, "prompts": prompts} | read | perplexity_golden(model, ids[:7000])


def main() -> None:
    what, path = sys.argv[1:]
    golden = {"tokens": make_tokens, "logits": make_logits}[what](path)
    (HERE / f"{what}.json").write_text(json.dumps(golden, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
