"""The torch and spconv side of convolution.py: a process that times one of its functions when told to.

Dense convolutions are timed with torch's usual layout of memory and with channels last; the quicker one counts. spconv
has no gradient on CPUs, so its functions are forward passes: `spconv` builds its map of neighbours in every call,
`spconv layer` has it already. If its result is wrong, as sometimes with several threads, that is said; its time stays.
"""

import argparse
import functools
import sys
import warnings

import numpy as np
import torch
from peer import seconds, serve


def functions(path: str) -> dict:
    """Convolutions over the sites in a numpy file: dense of all sites, and by spconv, checked against each other."""
    loaded = np.load(path)
    shape, coords = loaded["shape"].tolist(), torch.from_numpy(loaded["coords"])
    feats, weights = torch.from_numpy(loaded["feats"]), torch.from_numpy(loaded["weights"])
    dims, channels = len(shape), feats.shape[1]
    conv = {2: torch.nn.functional.conv2d, 3: torch.nn.functional.conv3d}[dims]
    last = {2: torch.channels_last, 3: torch.channels_last_3d}[dims]
    x = torch.zeros(1, *shape, channels)
    x[(0, *coords.T.long())] = feats
    x = x.movedim(-1, 1).contiguous()
    w = weights.permute(dims + 1, dims, *range(dims)).contiguous()
    side = w.shape[-1] // 2

    def forward(x):
        with torch.no_grad():
            return conv(x, w, padding=side)

    def both(x):
        leaves = [a.detach().requires_grad_(True) for a in (x, w)]
        y = conv(*leaves, padding=side)
        y.backward(torch.ones_like(y))

    layouts = [x, x.contiguous(memory_format=last)]
    known = {}
    for name, run in (("torch", forward), ("torch both", both)):
        each = [functools.partial(run, x) for x in layouts]
        known[name] = min(each, key=seconds)
    try:
        import spconv.pytorch as spconv
    except ImportError:
        return known
    layer = {2: spconv.SubMConv2d, 3: spconv.SubMConv3d}[dims](
        channels, w.shape[0], weights.shape[0], padding=side, bias=False, indice_key="map"
    )
    with torch.no_grad():
        layer.weight.copy_(weights.permute(dims + 1, *range(dims), dims))
    places = torch.cat([torch.zeros(len(coords), 1, dtype=torch.int32), coords.int()], dim=1)

    def sparse():
        with torch.no_grad():
            return layer(spconv.SparseConvTensor(feats, places, shape, 1))

    built = sparse()

    def again():
        with torch.no_grad():
            return layer(built.replace_feature(feats))

    error = float((built.features - forward(x).movedim(1, -1)[(0, *coords.T.long())]).abs().max())
    if not error < 1e-3:
        print(f"spconv is off by {error:.2g} with {torch.get_num_threads()} threads", file=sys.stderr)
    return known | {"spconv": sparse, "spconv layer": again}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, required=True)
    torch.set_num_threads(parser.parse_args().threads)
    warnings.simplefilter("ignore")
    serve(functions)
