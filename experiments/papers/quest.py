"""Quest: decoding that reads only the pages of the cache whose keys could matter.

PAPER:    Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", ICML 2024,
          arXiv 2406.10774
COMMAND:  python -m experiments run quest
CLAIM:    a few pages, chosen anew for every query by an upper bound of its logits, give nearly the dense result, and
          better ones than the newest pages; time follows the number of pages
RESULT:   bits per byte, seed 0, from 2, 4 and 8 pages: 2.873, 2.774, 2.745; from the first and newest 3.032, 2.797,
          2.743; from all 2.726. At 8 pages, 28 % of this short cache, choosing gains nothing any more
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from experiments.experiment import Study, UsageError
from experiments.papers.byte_model import (
    Training,
    causal_attention,
    logits_at,
    quality,
    train_dense,
    with_attention,
)
from experiments.papers.reporting import keep, milliseconds, show
from sparsejax.attention import (
    Local,
    PageBounds,
    Quest,
    Sink,
    TopK,
    explain_attention,
    quest_mask,
    sparse_attention,
)


@dataclasses.dataclass(frozen=True)
class Config(Training):
    """Trains a byte-level transformer densely, then decodes held-out bytes from chosen pages of the cache."""

    # bytes that are read densely before decoding begins
    prompt: int = 384
    # keys in a page
    page_size: int = 16
    # pages that each query reads, the newest counted
    pages: tuple[int, ...] = (2, 4, 8, 16)
    # first blocks of the transformer that stay dense (2 in the paper, of 32)
    dense_layers: int = 0
    # keys in the cache of which time is measured; 0 leaves times out
    timed_length: int = 32768
    # pages that each query reads there
    timed_pages: tuple[int, ...] = (64, 128, 256, 512, 1024)


def run(config: Config, *, progress: bool = True) -> dict[str, list[dict]]:
    """Trains, decodes, measures, prints the tables and keeps them.

    Args:
        config: the configuration.
        progress: show progress bars.

    Returns:
        The tables `quality` and `time`.
    """
    if not 0 < config.prompt < config.length or min(config.pages, default=0) < 2:
        raise UsageError(
            f"prompt={config.prompt} must be above 0 and below length={config.length}, and pages={config.pages} at "
            "least 2: the newest and one to choose"
        )
    model, windows, _ = train_dense(config, progress=progress)
    tables = {"quality": decode_all(model, windows, config, progress=progress)}
    show(f"decoding {config.length - config.prompt} bytes after {config.prompt}, page by page", tables["quality"])
    if config.timed_length:
        tables["time"] = time_all(config)
        show(f"one query against a cache of {config.timed_length} keys, 8 heads of 64", tables["time"])
    keep("quest", config, tables)
    return tables


def decode_all(model, windows: np.ndarray, config: Config, *, progress: bool) -> list[dict]:
    """Decodes the held-out windows, fed with the true bytes, under every number of pages."""
    tokens, targets = jnp.asarray(windows[:, :-1]), jnp.asarray(windows[:, config.prompt + 1 :])
    prompt, rest = tokens[:, : config.prompt], tokens[:, config.prompt :]
    shape = (*tokens.shape, config.width)
    filled = with_attention(model, lambda _: _attention(shape, config))
    nnx.jit(logits_at)(filled, prompt, jnp.arange(config.prompt))

    def decode(selector=None, pattern=None):
        def make(index):
            sparse = index >= config.dense_layers
            attention = _attention(
                shape, config, pattern=pattern if sparse else None, selector=selector if sparse else None
            )
            source = filled.blocks[index].attention
            nnx.update(attention, nnx.state(source, nnx.Cache))
            if attention.selector_state is not None:
                lengths = jnp.full(len(tokens), config.prompt)
                bounds = PageBounds.of_cache(source.cached_key[...], lengths, config.page_size)
                attention.selector_state = nnx.data(jax.tree.map(nnx.Cache, bounds))
            return attention

        return decode_bytes(with_attention(model, make), rest, config.prompt)

    dense = decode()
    bits, _ = quality(dense, targets, dense)
    rows = [{"method": "dense", "pages": "all", "density": 1.0, "bits per byte": bits, "agrees with dense": 1.0}]
    in_use = np.ceil(np.arange(config.prompt + 1, config.length + 1) / config.page_size)
    for pages in tqdm(config.pages, desc="decoding", disable=not progress):
        methods = {
            "Quest": {"selector": Quest(TopK(pages - 1), config.page_size)},
            "first and newest": {"pattern": Sink(config.page_size) | Local((pages - 1) * config.page_size - 1)},
        }
        for name, how in methods.items():
            bits, agreement = quality(decode(**how), targets, dense)
            share = float(np.mean(np.minimum(pages, in_use) / in_use))
            rows.append(
                {
                    "method": name,
                    "pages": str(pages),
                    "density": share,
                    "bits per byte": bits,
                    "agrees with dense": agreement,
                }
            )
    return rows


@nnx.jit
def decode_bytes(model, tokens: jax.Array, first: int) -> jax.Array:
    """Logits of tokens [B, T] fed one after the other from position `first` on; the caches advance in a copy."""
    graph, state = nnx.split(model)

    def step(state, at):
        model = nnx.merge(graph, state)
        logits = logits_at(model, jax.lax.dynamic_slice_in_dim(tokens, at, 1, 1), (first + at)[None])
        return nnx.state(model), logits[:, 0]

    _, logits = jax.lax.scan(step, state, jnp.arange(tokens.shape[1]))
    return jnp.swapaxes(logits, 0, 1)


def time_all(config: Config) -> list[dict]:
    """Times the attention of one query, choice of pages included, against a long cache of random keys."""
    length, heads, dim = config.timed_length, 8, 64
    keys = jax.random.split(jax.random.key(config.seed), 3)
    q = jax.random.normal(keys[0], (1, 1, heads, dim))
    k, v = (jax.random.normal(key, (1, length, heads, dim)) for key in keys[1:])
    bounds = PageBounds.of_cache(k, jnp.array([length]), config.page_size)
    plain = milliseconds(jax.jit(jax.nn.dot_product_attention), q, k, v)
    rows = [{"pages": "all", "density": 1.0, "ms, choice": 0.0, "ms": plain, "times faster": 1.0, "path": "plain"}]

    @functools.partial(jax.jit, static_argnames="budget")
    def choose(q, bounds, budget):
        return quest_mask(q, bounds, budget, kv_len=length)[0]

    @functools.partial(jax.jit, static_argnames="budget")
    def attend(q, k, v, bounds, budget):
        return sparse_attention(q, k, v, quest_mask(q, bounds, budget, kv_len=length)[0])

    for pages in config.timed_pages:
        budget = TopK(pages - 1)
        took = milliseconds(functools.partial(attend, budget=budget), q, k, v, bounds)
        rows.append(
            {
                "pages": str(pages),
                "density": pages * config.page_size / length,
                "ms, choice": milliseconds(functools.partial(choose, budget=budget), q, bounds),
                "ms": took,
                "times faster": plain / took,
                "path": explain_attention(q, k, v, choose(q, bounds, budget)).name,
            }
        )
    return rows


def _attention(shape, config: Config, **options):
    attention = causal_attention(config, decode=True, bk=config.page_size, **options)
    attention.init_cache(shape)
    return attention


STUDY = Study(
    name="quest",
    summary="Quest on a byte-level transformer: decoding from chosen pages of the cache",
    config=Config(),
    run=run,
)
