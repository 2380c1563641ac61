"""FLOPs of a whole run, step by step: what the zeros would save where kernels skip them."""

import dataclasses

import numpy as np

from sparsejax import Algorithm, scores
from sparsejax.analysis import ForwardFlops, training_flops


@dataclasses.dataclass
class FlopsCounter:
    """Adds up the training FLOPs of a run from the number of weights kept at each step.

    A step costs 3 f_S where only kept weights get a gradient and 2 f_S + f_D where all weights do, with f_S and f_D
    the forward FLOPs of the sparse and the dense network (Evci et al. 2020, appendix H).

    Args:
        forward: dense forward FLOPs of one example, by layer.
        sizes: `{path: weights}` of the sparse layers, in the order of the counts that `add` gets.
        algorithm: what decides which weights need a gradient; None for a dense run.
        batch_size: examples of a step.
        total: FLOPs so far.
    """

    forward: ForwardFlops
    sizes: dict[str, int]
    algorithm: Algorithm | None
    batch_size: int
    total: int = 0

    def inference(self, nnz) -> int:
        """Forward FLOPs of one example when each sparse layer keeps `nnz` weights."""
        kept = dict(zip(self.sizes, nnz, strict=True))
        layers = self.forward.layers.items()
        return self.forward.other + sum(
            round(flops * int(kept[path]) / self.sizes[path]) if path in kept else flops for path, flops in layers
        )

    def add(self, first_step: int, nnz: np.ndarray, trainable: np.ndarray | None = None) -> None:
        """Adds steps.

        Args:
            first_step: number of the first of them.
            nnz: int (steps, layers), the weights kept in the forward pass of each step.
            trainable: int (layers,), the weights that get a gradient where an algorithm trains more than it uses.
        """
        costs = {}
        for step, row in enumerate(nnz, first_step):
            soft = self._is_soft(step)
            key = (tuple(row.tolist()), soft, self._needs_dense_gradient(step))
            if key not in costs:
                forward = self.forward.total if soft else self.inference(row)
                backward = forward
                if key[2]:
                    backward = self.forward.total if trainable is None else self.inference(trainable)
                costs[key] = training_flops(forward, weight_gradient=backward)
            self.total += self.batch_size * costs[key]

    def dense(self, steps: int) -> int:
        """What the dense network costs over as many steps."""
        return self.batch_size * steps * training_flops(self.forward.total)

    def _is_soft(self, step: int) -> bool:
        softness = None if self.algorithm is None else self.algorithm.softness
        return softness is not None and float(softness(step)) > 0

    def _needs_dense_gradient(self, step: int) -> bool:
        algorithm = self.algorithm
        if algorithm is None:
            return False
        if algorithm.gradient is not None or algorithm.memory is not None:
            return True
        grows = algorithm.grow not in (None, scores.random) and algorithm.drop_fraction_at(step) != 0
        return bool(grows and algorithm.steps.due(step))
