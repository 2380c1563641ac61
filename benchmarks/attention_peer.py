"""The torch side of attention.py: a process that times one of its functions when told to."""

import argparse
import sys

import numpy as np
import torch
from peer import serve
from torch.nn.attention.flex_attention import create_block_mask, flex_attention


def functions(path: str) -> dict:
    """Dense attention forward and with gradients, and FlexAttention forward (it has no gradient on CPUs) a mask.

    The archive has `block`, `dim` and masks, bool [heads, blocks of queries, blocks of keys] each.
    """
    masks = dict(np.load(path))
    block, dim = (int(masks.pop(name)) for name in ("block", "dim"))
    heads, tokens = next((tiles.shape[0], tiles.shape[1] * block) for tiles in masks.values())
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
    for function in known.values():
        function()  # a slow one is timed once only, and not at its first call
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, required=True)
    torch.set_num_threads(parser.parse_args().threads)
    serve(functions)
