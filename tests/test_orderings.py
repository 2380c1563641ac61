"""Which methods beat which: a 64-256-256-10 network on the digits at 98 % sparsity, ten seeds, compared in pairs.

Only orderings that hold by far more than the noise of ten seeds are asserted. Compute is not matched, and one untuned
learning rate serves all methods: this says that the methods work, not how they would rank when tuned.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparsejax
from experiments.data import load_digits

pytestmark = pytest.mark.slow

SEEDS = range(10)
STEPS, BATCH, SPARSITY = 1200, 128, 0.98
WIDTHS = (64, 256, 256, 10)


@functools.cache
def digits():
    split = load_digits()
    flat = {name: jnp.asarray(part.images).reshape(len(part), -1) for name, part in split._asdict().items()}
    labels = {name: jnp.asarray(part.labels) for name, part in split._asdict().items()}
    return flat["train"], labels["train"], flat["heldout"], labels["heldout"]


def initial(seed):
    keys = jax.random.split(jax.random.key(seed), len(WIDTHS) - 1)
    return [
        {"kernel": jax.random.normal(key, (rows, columns)) * np.sqrt(2 / rows), "bias": jnp.zeros(columns)}
        for key, rows, columns in zip(keys, WIDTHS[:-1], WIDTHS[1:], strict=True)
    ]


def apply(params, x):
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x @ params[-1]["kernel"] + params[-1]["bias"]


def loss(params, batch):
    images, labels = batch
    return optax.softmax_cross_entropy_with_integer_labels(apply(params, images), labels).mean()


@functools.partial(jax.jit, static_argnames=("algorithm", "steps"))
def train(params, seed, masks=None, *, algorithm=None, steps=STEPS):
    """Trains under `algorithm(seed)`, or under given masks, or dense."""
    images, labels, _, _ = digits()
    decay = optax.add_decayed_weights(1e-4, lambda tree: [{"kernel": True, "bias": False} for _ in tree])
    optimizer = optax.chain(decay, optax.sgd(optax.cosine_decay_schedule(0.1, steps), momentum=0.9))
    if algorithm is not None:
        optimizer = sparsejax.sparsify(optimizer, algorithm(seed))
    elif masks is not None:
        optimizer = sparsejax.sparsify(optimizer, sparsejax.from_masks(masks))
    state = optimizer.init(params)
    if algorithm is not None or masks is not None:
        params = sparsejax.mask_params(params, state)

    def step(carry, key):
        params, state = carry
        rows = jax.random.randint(key, (BATCH,), 0, len(labels))
        grads = jax.grad(loss)(params, (images[rows], labels[rows]))
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.fold_in(jax.random.key(1000), seed), steps)
    return jax.lax.scan(step, (params, state), keys)[0][0]


@jax.jit
def accuracy(params):
    _, _, images, labels = digits()
    return 100 * jnp.mean(jnp.argmax(apply(params, images), axis=1) == labels)


def score(**options):
    masks = options.pop("masks", None)
    return np.array(
        [
            float(accuracy(train(initial(seed), seed, None if masks is None else masks[seed], **options)))
            for seed in SEEDS
        ]
    )


def uniform_static(seed):
    return sparsejax.static(SPARSITY, distribution=sparsejax.uniform, seed=seed)


def erk_static(seed):
    return sparsejax.static(SPARSITY, seed=seed)


def rigl(seed):
    return sparsejax.rigl(SPARSITY, update_every=30, stop=900, seed=seed)


def set_(seed):
    return sparsejax.set_(SPARSITY, update_every=30, stop=900, seed=seed)


def gradual(seed):
    return sparsejax.gradual(SPARSITY, begin=0, end=720, update_every=50, distribution=sparsejax.global_)


@functools.cache
def accuracies() -> dict[str, np.ndarray]:
    images, labels, _, _ = digits()
    batch = (images[:512], labels[:512])
    snip = [sparsejax.snip(loss, initial(seed), [batch], SPARSITY) for seed in SEEDS]
    one_shot = []
    for seed in SEEDS:
        dense = train(initial(seed), seed)
        masks = sparsejax.sparsify(optax.identity(), sparsejax.global_magnitude(SPARSITY))
        _, state = masks.update(jax.tree.map(jnp.zeros_like, dense), masks.init(dense), dense)
        tuned = train(dense, seed, sparsejax.masks_of(state), steps=STEPS // 2)
        one_shot.append(float(accuracy(tuned)))
    found = {
        "uniform": score(algorithm=uniform_static),
        "static": score(algorithm=erk_static),
        "snip": score(masks=snip),
        "snip, shuffled": score(masks=[sparsejax.shuffle_masks(masks, seed) for seed, masks in enumerate(snip)]),
        "set": score(algorithm=set_),
        "rigl": score(algorithm=rigl),
        "gradual": score(algorithm=gradual),
        "one-shot": np.array(one_shot),
    }
    for name, values in found.items():
        print(f"{name:16} {values.mean():6.2f} ± {values.std(ddof=1):.2f}")
    return found


@functools.cache
def tickets() -> list[sparsejax.Ticket]:
    last = []
    for seed in SEEDS:

        def run(params, masks, number, seed=seed):
            return train(params, seed, masks)

        last.append(list(sparsejax.lottery_ticket(run, initial(seed), rounds=18))[-1])
    return last


def clearly_better(better: np.ndarray, worse: np.ndarray, margin: float) -> None:
    """The mean paired difference exceeds `margin` points by more than three standard errors."""
    difference = better - worse
    error = difference.std(ddof=1) / np.sqrt(len(difference))
    assert difference.mean() - 3 * error > margin, f"{difference.mean():+.2f} ± {error:.2f} points"


@pytest.mark.parametrize(
    ("better", "worse", "margin"),
    [
        ("static", "uniform", 10.0),
        ("snip", "snip, shuffled", 1.0),
        ("rigl", "static", 2.0),
        ("set", "static", 1.0),
        ("rigl", "set", 0.0),
        ("gradual", "rigl", 0.0),
        ("gradual", "one-shot", 2.0),
    ],
)
def test_orderings_of_methods(better, worse, margin):
    found = accuracies()
    clearly_better(found[better], found[worse], margin)


def test_a_ticket_beats_its_mask_on_new_weights_and_that_beats_a_shuffled_mask():
    found = tickets()
    ticket = np.array([float(accuracy(ticket.trained)) for ticket in found])
    again = score_on([ticket.masks for ticket in found], offset=500)
    shuffled = score_on([sparsejax.shuffle_masks(ticket.masks, seed) for seed, ticket in enumerate(found)], offset=0)
    print(f"ticket {ticket.mean():.2f}, new weights {again.mean():.2f}, shuffled {shuffled.mean():.2f}")
    clearly_better(ticket, again, 0.0)
    clearly_better(again, shuffled, 3.0)


def score_on(masks, offset) -> np.ndarray:
    return np.array([float(accuracy(train(initial(seed + offset), seed, masks[seed]))) for seed in SEEDS])


def test_synflow_in_one_round_collapses_to_chance():
    for seed in SEEDS:
        masks = sparsejax.synflow(apply, initial(seed), jnp.ones((1, 64)), SPARSITY, rounds=1)
        assert sparsejax.collapsed_layers(masks)
        assert float(accuracy(train(initial(seed), seed, masks))) < 15
