"""The torch and scipy side of block_sparse.py: a process that times one of its products when told to.

Weights are stored transposed, as these libraries need them: y^T = W^T x^T. None of them has a product that computes the
gradient of stored blocks, so `both` is forward and dx only.
"""

import argparse
import warnings

import numpy as np
import scipy.sparse
import torch
from peer import serve


def functions(path: str) -> dict:
    """Products of every library with the matrix in a numpy file, checked against the dense product."""
    loaded = np.load(path)
    w, block, rows = loaded["w"], int(loaded["block"]), int(loaded["rows"])
    r = np.random.default_rng(0)
    xt, dyt = (r.standard_normal((n, rows), dtype=np.float32) for n in w.shape)
    sparse = {
        "scipy CSR": lambda a: scipy.sparse.csr_matrix(a),
        "scipy BSR": lambda a: scipy.sparse.bsr_matrix(a, blocksize=(block, block)),
        "torch CSR": lambda a: torch.from_numpy(a).to_sparse_csr(),
        "torch BSR": lambda a: torch.from_numpy(a).to_sparse_bsr((block, block)),
    }
    want = w.T[:, :50] @ xt[:50]
    found = {}
    for name, make in sparse.items():
        forward, back = make(np.ascontiguousarray(w.T)), make(np.ascontiguousarray(w))
        x, dy = (torch.from_numpy(xt), torch.from_numpy(dyt)) if "torch" in name else (xt, dyt)
        head = np.array(w)
        head[50:] = 0
        error = np.abs(np.asarray(make(np.ascontiguousarray(head.T)) @ x) - want).max()
        if not error < 1e-3:
            raise RuntimeError(f"{name} is off by {error}")
        found[name] = lambda a=forward, x=x: a @ x
        found[name + " both"] = lambda a=forward, b=back, x=x, dy=dy: (a @ x, b @ dy)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, required=True)
    torch.set_num_threads(parser.parse_args().threads)
    warnings.simplefilter("ignore")
    serve(functions)
