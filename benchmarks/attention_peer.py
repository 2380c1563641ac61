"""The torch side of attention.py: a process that times one of its functions when told to. Needs torch and numpy only.

Torch and JAX slow each other down in one process, since their thread pools fight for the same cores. So this process
waits on its input while the other one works.
"""

import argparse
import statistics
import sys
import time

import numpy as np
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention


def functions(tokens: int, block: int, heads: int, dim: int, masks: dict[str, np.ndarray]) -> dict:
    """Dense attention forward and with gradients, and FlexAttention forward (it has no gradient on CPUs) a mask."""
    r = np.random.default_rng(0)
    q, k, v, g = (torch.from_numpy(r.standard_normal((1, heads, tokens, dim), dtype=np.float32)) for _ in range(4))
    dense = torch.nn.functional.scaled_dot_product_attention

    def forward():
        with torch.no_grad():
            return dense(q, k, v)

    def both():
        leaves = [x.detach().requires_grad_(True) for x in (q, k, v)]
        (dense(*leaves) * g).sum().backward()

    known = {"forward": forward, "both": both}
    for name, tiles in masks.items():
        kept = torch.from_numpy(tiles)
        mask = create_block_mask(
            lambda b, h, i, j, kept=kept: kept[h, i // block, j // block],
            1,
            heads,
            tokens,
            tokens,
            device="cpu",
            BLOCK_SIZE=block,
        )
        torch._dynamo.reset()
        compiled = torch.compile(flex_attention, dynamic=False)

        def flex(compiled=compiled, mask=mask):
            with torch.no_grad():
                return compiled(q, k, v, block_mask=mask)

        try:
            got = flex()
        except Exception as reason:
            print(f"FlexAttention does not run here: {str(reason).splitlines()[0]}", file=sys.stderr)
            return known
        want = dense(q, k, v, attn_mask=kept.repeat_interleave(block, 1).repeat_interleave(block, 2)[None])
        error = float((got - want).abs().max())
        if error > 1e-4:
            raise RuntimeError(f"FlexAttention is off by {error} at {name}")
        known[f"flex {name}"] = flex
    return known


def main() -> None:
    """Answers each line, a function's name, with its median seconds."""
    parser = argparse.ArgumentParser()
    for name in ("tokens", "block", "heads", "dim", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--tiles", required=True, help="numpy archive, a bool [heads, nq, nk] for each mask")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    masks = dict(np.load(options.tiles))
    known = functions(options.tokens, options.block, options.heads, options.dim, masks)
    print("ready " + ",".join(known), flush=True)
    for line in sys.stdin:
        function = known[line.strip()]
        function()  # wakes threads and caches, untimed
        timings = []
        begin = time.perf_counter()
        while len(timings) < 3 or (time.perf_counter() - begin < 0.1 and len(timings) < 20):
            start = time.perf_counter()
            function()
            timings.append(time.perf_counter() - start)
        print(f"seconds {statistics.median(timings)}", flush=True)


if __name__ == "__main__":
    main()
