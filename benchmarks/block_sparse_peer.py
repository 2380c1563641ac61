"""The torch and scipy side of block_sparse.py: a process that times one of its products when told to.

Torch, scipy and JAX slow each other down in one process, since their thread pools fight for the same cores. So this
process waits on its input while the other one works. Weights are stored transposed, as these libraries need them:
y^T = W^T x^T. None of them has a product that computes the gradient of stored blocks, so `both` is forward and dx only.
"""

import argparse
import sys
import time
import warnings

import numpy as np
import scipy.sparse
import torch


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


def main() -> None:
    """Obeys `load FILE` and `time NAME`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, required=True)
    torch.set_num_threads(parser.parse_args().threads)
    warnings.simplefilter("ignore")
    known: dict = {}
    print("ready now", flush=True)
    for line in sys.stdin:
        word, _, rest = line.strip().partition(" ")
        if word == "load":
            known = functions(rest)
            print("loaded " + ",".join(known), flush=True)
            continue
        timings = []
        begin = time.perf_counter()
        # The first of several calls wakes threads and caches; a long one does so itself.
        while len(timings) < 2 or (len(timings) < 6 and time.perf_counter() - begin < 0.1):
            start = time.perf_counter()
            known[rest]()
            timings.append(time.perf_counter() - start)
            if timings[0] > 0.25:
                break
        print(f"seconds {min(timings)}", flush=True)


if __name__ == "__main__":
    main()
