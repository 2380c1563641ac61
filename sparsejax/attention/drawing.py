"""Pictures of compiled masks, as text and by matplotlib."""

import numpy as np

from sparsejax.attention.mask import is_traced

# By share of visited tiles, if a sign stands for several.
_SHADES = "·░▒▓█"


def draw_text(mask, *, batch: int = 0, head: int = 0, size: int = 64) -> str:
    """Draws the tiles of a mask as text: rows are blocks of queries.

    Args:
        mask: a BlockMask.
        batch: which example, if the mask differs between them.
        head: which head, likewise.
        size: most signs in a row or column; larger masks are drawn with several tiles to a sign, shaded by the share of
            them that is visited.

    Returns:
        The drawing: `█` a tile that is visited whole, `▒` one with a rule inside, `·` one that is skipped.

    Example:
        >>> from sparsejax.attention import Causal, Local, compile_mask
        >>> print(draw_text(compile_mask(Causal() & Local(7), 16, 16, bq=4, bk=4)))
        Causal() & Local(7): density 0.562
        ▒···
        █▒··
        ▒█▒·
        ·▒█▒
    """
    if size < 1:
        raise ValueError(f"size={size}; a drawing needs 1 sign in a row at least")
    kinds = _kinds(mask, batch, head)
    share = (kinds > 0).mean()
    step = -(-max(kinds.shape) // size)
    if step == 1:
        rows = ["".join("·▒█"[kind] for kind in row) for row in kinds]
    else:
        rows = ["".join(_SHADES[int(np.ceil(part * 4))] for part in row) for row in _pooled(kinds > 0, step)]
    note = "" if step == 1 else f", {step} x {step} tiles a sign"
    return "\n".join([f"{mask.text}: density {share:.3g}{note}", *rows])


def draw_picture(mask, *, batch: int = 0, head: int = 0, ax=None):
    """Draws the tiles of a mask with matplotlib: dark visited whole, light with a rule inside, white skipped.

    Args:
        mask: a BlockMask.
        batch: which example, if the mask differs between them.
        head: which head, likewise.
        ax: axes to draw on; None makes a figure.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is missing; it is in the extra `sparsejax[experiments]`.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    kinds = _kinds(mask, batch, head)
    if ax is None:
        ax = Figure(figsize=(4, 4), layout="constrained").add_subplot()
    extent = (0, mask.kv_len, mask.q_len, 0)
    # The last tiles may be cut off by the end of the sequence.
    full = (0, kinds.shape[1] * mask.lists.bk, kinds.shape[0] * mask.lists.bq, 0)
    colors = ListedColormap(["white", "#9ecae1", "#08519c"])
    ax.imshow(kinds, cmap=colors, vmin=0, vmax=2, extent=full, interpolation="nearest", aspect="auto")
    ax.set(xlim=extent[:2], ylim=extent[2:], xlabel="key", ylabel="query")
    ax.set_title(f"{mask.text}: density {(kinds > 0).mean():.3g}", fontsize=9)
    return ax.figure


def _kinds(mask, batch: int, head: int) -> np.ndarray:
    shape = mask.lists.idx.shape
    for name, at, there in (("batch", batch, shape[0]), ("head", head, shape[1])):
        # One for all stands for any number of them.
        if at < 0 or 1 < there <= at:
            raise ValueError(f"{name}={at}; this mask has {there}, counted from 0")
    if is_traced(mask.lists):
        raise ValueError(f"{mask.text} is traced: only lists that are known can be drawn")
    lists, b, h = mask.lists, batch if shape[0] > 1 else 0, head if shape[1] > 1 else 0
    kinds = np.zeros((lists.nq, lists.nk), np.int8)
    slot = np.arange(shape[-1])
    idx, part, total = (np.asarray(a)[b, h] for a in (lists.idx, lists.n_part, lists.n_tot))
    row = np.broadcast_to(np.arange(lists.nq)[:, None], idx.shape)
    for kind, kept in ((1, slot < part[:, None]), (2, (slot >= part[:, None]) & (slot < total[:, None]))):
        kinds[row[kept], idx[kept]] = kind
    return kinds


def _pooled(flags: np.ndarray, step: int) -> np.ndarray:
    """Mean over squares of `step` tiles, of which those at the edges may be smaller."""
    rows, columns = (np.arange(0, n, step) for n in flags.shape)
    count = np.add.reduceat(np.add.reduceat(np.ones(flags.shape), rows, 0), columns, 1)
    return np.add.reduceat(np.add.reduceat(flags.astype(float), rows, 0), columns, 1) / count
