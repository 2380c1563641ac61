"""What is compiled of a product: itself, or itself with the gradients of its first two arguments."""

from collections.abc import Callable
from typing import Any

import jax


def product_programs(product: Callable[..., Any], arguments: tuple[Any, ...], dy: Any = None) -> dict[str, Any]:
    """Functions and abstract arguments to compile, by name.

    Args:
        product: of x, weights and what describes them.
        arguments: abstract ones.
        dy: the abstract cotangent of the result; None where no gradients are asked for.

    Returns:
        "forward" or "forward and backward": (function, arguments).
    """

    def train(dy, x, weights, *rest):
        y, pull = jax.vjp(lambda x, weights: product(x, weights, *rest), x, weights)
        return y, pull(dy)

    if dy is None:
        return {"forward": (product, arguments)}
    return {"forward and backward": (train, (dy, *arguments))}
