"""SeerAttention: a gate learns from the block statistics of a frozen model which blocks its attention will look at.

PAPER:    Gao et al., "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs", arXiv 2410.13276
COMMAND:  python -m experiments run seer_attention
CLAIM:    the gate, trained by distillation alone, chooses nearly as well as one that knows the attention weights, so
          that a fraction of the blocks gives nearly the dense result; time follows the number of blocks
RESULT:   bits per byte, seed 0, at 12, 23, 34 and 48 % of the causal blocks: 2.863, 2.761, 2.743, 2.735 by the gate;
          2.874, 2.765, 2.741, 2.731 by the true maxima; 2.886, 2.767, 2.743, 2.733 by pooled queries and keys; 2.939,
          2.771, 2.747, 2.736 by the newest blocks; dense 2.725. So small a model looks back so little that choosing
          well pays below a quarter of the blocks only
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from experiments.experiment import Study, UsageError
from experiments.papers.byte_model import Training, quality, train_dense
from experiments.papers.reporting import keep, milliseconds, show
from sparsejax.attention import (
    Causal,
    Context,
    Forced,
    SeerGate,
    TopK,
    causal_blocks,
    compile_mask,
    from_scores,
    pooled_scores,
    seer_loss,
    seer_target,
    sparse_attention,
    stats_grid,
)


@dataclasses.dataclass(frozen=True)
class Config(Training):
    """Trains a byte-level transformer densely, then gates that choose the blocks of its attention."""

    # tokens in a block (64 in the paper)
    block: int = 16
    # dimension in which pooled queries and keys meet (128 in the paper)
    gate_dim: int = 32
    # optimizer steps of the gates
    gate_steps: int = 150
    # peak of the learning rate of the gates, reached after a tenth of the steps
    gate_learning_rate: float = 1e-2
    # shares of the causal blocks that are visited
    densities: tuple[float, ...] = (0.15, 0.25, 0.35, 0.5)
    # tokens of the sequence of which time is measured, in blocks of 64; 0 leaves times out
    timed_length: int = 4096
    # shares of the causal blocks that are visited there
    timed_densities: tuple[float, ...] = (0.05, 0.1, 0.25, 0.5)


def run(config: Config, *, progress: bool = True) -> dict[str, list[dict]]:
    """Trains the model and its gates, measures, prints the tables and keeps them.

    Args:
        config: the configuration.
        progress: show progress bars.

    Returns:
        The tables `quality` and `time`.
    """
    if config.length % config.block:
        raise UsageError(f"block is {config.block}, which does not divide the length of {config.length}")
    for name in ("densities", "timed_densities"):
        if not all(0 < density <= 1 for density in getattr(config, name)):
            raise UsageError(f"{name} are {getattr(config, name)}; each must be above 0 and at most 1")
    model, windows, batches = train_dense(config, progress=progress)
    gates = train_gates(model, batches(config.seed + 1), config, progress=progress)
    tables = {"quality": compare(model, gates, windows, config, progress=progress)}
    show(f"{len(windows)} windows of {config.length} bytes, blocks of {config.block}", tables["quality"])
    if config.timed_length:
        tables["time"] = time_all(config)
        show(f"{config.timed_length} tokens, 4 heads of 64, blocks of 64, choice included", tables["time"])
    keep("seer_attention", config, tables)
    return tables


def forward(model, tokens: jax.Array, choose):
    """The model with attention as chosen.

    Args:
        model: the byte-level transformer.
        tokens: int [B, S].
        choose: `choose(block, q, k, v)` gives the BlockMask of a block's attention.

    Returns:
        Logits [B, S, 256], and the (q, k, v) of each block.
    """
    x = model.token_embedding(tokens) + model.position_embedding(jnp.arange(tokens.shape[1]))
    seen = []
    for index, block in enumerate(model.blocks):
        y = block.attention_norm(x)
        q, k, v = (project(y) for project in (block.attention.query, block.attention.key, block.attention.value))
        out = sparse_attention(q, k, v, choose(index, q, k, v))
        seen.append((q, k, v))
        x = x + block.attention.out(out)
        x = x + block.down(nnx.gelu(block.up(block.mlp_norm(x))))
    return model.head(model.norm(x)), seen


def statistics(q, k, v, mask, kind: str) -> jax.Array:
    """Block statistics of attention under a mask as a grid [B, H, nq, nk]."""
    return stats_grid(mask, sparse_attention(q, k, v, mask, block_stats=kind)[1].block_stats)


def train_gates(model, batches, config: Config, *, progress: bool) -> nnx.List:
    """Distils a gate for every block of the frozen model, from the largest attention weight in each block."""
    everything = compile_mask(Causal(), config.length, config.length, bq=config.block, bk=config.block)
    dim = config.width // config.heads
    rngs = nnx.Rngs(config.seed + 1)
    sizes = {"block": config.block, "gate_dim": config.gate_dim, "budget": TopK(1), "rngs": rngs}
    gates = nnx.List([SeerGate(config.heads, config.heads, dim, **sizes) for _ in range(config.depth)])
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.gate_learning_rate, config.gate_steps // 10, config.gate_steps
    )
    optimizer = nnx.Optimizer(gates, optax.adam(schedule), wrt=nnx.Param)

    @nnx.jit
    def step(gates, optimizer, model, tokens):
        _, seen = forward(model, tokens, lambda *_: everything)
        targets = []
        for q, k, v in seen:
            _, aux = sparse_attention(q, k, v, everything, block_stats="max")
            targets.append(seer_target(everything, aux.block_stats))

        def loss(gates):
            parts = zip(gates, seen, targets, strict=True)
            return sum(seer_loss(gate.scores(q, k), target, everything) for gate, (q, k, _), target in parts)

        value, grads = nnx.value_and_grad(loss)(gates)
        optimizer.update(gates, grads)
        return value / len(seen)

    with tqdm(range(1, config.gate_steps + 1), desc="training the gates", disable=not progress) as bar:
        for number, batch in zip(bar, batches, strict=False):
            loss = step(gates, optimizer, model, jnp.asarray(batch["tokens"][:, :-1]))
            if number % 20 == 0 or number == config.gate_steps:
                bar.set_postfix_str(f"divergence {float(loss):.3f}")
    return gates


def compare(model, gates, windows: np.ndarray, config: Config, *, progress: bool) -> list[dict]:
    """Quality and share of attention that is found, for each way to choose blocks and each density."""
    tokens, targets = jnp.asarray(windows[:, :-1]), jnp.asarray(windows[:, 1:])
    sizes = {"q_len": config.length, "kv_len": config.length, "bq": config.block, "bk": config.block}
    everything = compile_mask(Causal(), **sizes)
    blocks = everything.lists.nk
    ways = {
        "gate": lambda gate, q, k, v: gate.scores(q, k),
        "pooled queries and keys": lambda gate, q, k, v: pooled_scores(config.block, config.block)(q, k, Context()),
        "newest blocks": lambda gate, q, k, v: jnp.broadcast_to(
            jnp.arange(1.0 * blocks), (len(q), config.heads, blocks, blocks)
        ),
        "true maxima (not known)": lambda gate, q, k, v: statistics(q, k, v, everything, "max"),
    }

    @functools.partial(nnx.jit, static_argnames="way")
    def evaluate(model, gates, k, way):
        seen = []

        def choose(index, *qkv):
            scores = ways[way](gates[index], *qkv)
            # As many lists as there are blocks, and k as data: one compilation serves all densities.
            budget = TopK(k, max_blocks=blocks)
            mask = from_scores(scores, budget, Causal(), **sizes, forced=Forced(diagonal=True))
            kept = jnp.broadcast_to(mask.kinds() > 0, scores.shape)
            parts = [statistics(*qkv, everything, kind) for kind in ("max", "sum")]
            shares = [jnp.sum(part * kept) / jnp.sum(part) for part in parts]
            seen.append(jnp.stack([jnp.mean(kept) / jnp.mean(everything.kinds() > 0), *shares]))
            return mask

        logits, _ = forward(model, tokens, choose)
        return logits, jnp.mean(jnp.stack(seen), axis=0)

    dense, _ = nnx.jit(lambda model: forward(model, tokens, lambda *_: everything))(model)
    bits, _ = quality(dense, targets, dense)
    head = ("blocks by", "density", "maxima found", "attention found", "bits per byte", "agrees with dense")
    rows = [dict(zip(head, ("dense", 1.0, 1.0, 1.0, bits, 1.0), strict=True))]
    for way in tqdm(ways, desc="comparing", disable=not progress):
        for density in config.densities:
            # The diagonal comes on top of what is chosen.
            count = jnp.int32(max(0, causal_blocks(blocks, density) - 1))
            logits, shares = evaluate(model, gates, count, way=way)
            row = (way, *map(float, shares), *quality(logits, targets, dense))
            rows.append(dict(zip(head, row, strict=True)))
    return rows


def time_all(config: Config) -> list[dict]:
    """Times gate, choice and attention at random queries and keys, beside dense causal attention."""
    length, heads, dim, block = config.timed_length, 4, 64, 64
    q, k, v = (jax.random.normal(key, (1, length, heads, dim)) for key in jax.random.split(jax.random.key(0), 3))
    causal = compile_mask(Causal(), length, length, bq=block, bk=block)
    plain = milliseconds(jax.jit(functools.partial(jax.nn.dot_product_attention, is_causal=True)), q, k, v)
    whole = milliseconds(jax.jit(lambda q, k, v: sparse_attention(q, k, v, causal)), q, k, v)
    rows = [
        {"attention": "jax.nn", "density": 1.0, "ms": plain, "of it choice": 0.0},
        {"attention": "all causal blocks", "density": 1.0, "ms": whole, "of it choice": 0.0},
    ]
    for density in config.timed_densities:
        budget = TopK(max(0, causal_blocks(causal.lists.nk, density) - 1))
        gate = SeerGate(heads, heads, dim, block=block, gate_dim=64, budget=budget, rngs=nnx.Rngs(0))
        select = nnx.jit(lambda gate, q, k: gate(q, k, base=Causal())[0])
        attend = nnx.jit(lambda gate, q, k, v: sparse_attention(q, k, v, gate(q, k, base=Causal())[0]))
        mask = select(gate, q, k)
        share = float(mask.density() / causal.density())
        took, choice = milliseconds(attend, gate, q, k, v), milliseconds(select, gate, q, k)
        rows.append({"attention": "gate", "density": share, "ms": took, "of it choice": choice})
    return rows


STUDY = Study(
    name="seer_attention",
    summary="SeerAttention on a byte-level transformer: a distilled gate chooses the blocks",
    config=Config(),
    run=run,
)
