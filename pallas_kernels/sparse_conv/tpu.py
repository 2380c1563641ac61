"""Convolution over rows on TPU: there is no kernel of its own."""


def supports(*call) -> str:
    """Why this path refuses every call."""
    del call
    return "TPUs gather rows slowly unless they are long; XLA's gathers are as good as any, tiles are better"
