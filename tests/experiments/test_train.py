"""The training loop: what it writes and counts, that it compiles once, and that it trains as a plain loop does."""

import dataclasses
import json
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
from flax import nnx

import sparsejax
from experiments.accounting import FlopsCounter
from experiments.algorithms import BEFORE_TRAINING, Name, make_algorithm
from experiments.configs import EXPERIMENTS
from experiments.configs.digits_dst import EXPERIMENT
from experiments.experiment import UsageError, inputs_and_targets, measure, score
from experiments.metrics import MetricsLog, read_records
from experiments.runs import run_experiment
from experiments.train import train
from sparsejax.analysis import ForwardFlops, rigl_training_flops, training_flops

NAMES = [name for name in Name.__args__ if name != "dense"]


# A whole run


@pytest.fixture(scope="module")
def rigl_run(tmp_path_factory):
    """Two seeds of RigL, under a guard against a second trace."""
    variant = small.variant("rigl")
    variant.run_step = jax.jit(chex.assert_max_traces(variant.step, n=1), donate_argnums=0)
    folders = [tmp_path_factory.mktemp(f"seed{seed}") for seed in (0, 1)]
    finals = [train(variant, folder, seed, resume=False, progress=False) for seed, folder in enumerate(folders)]
    return variant, folders, finals


def test_one_trace_serves_the_whole_schedule_and_all_seeds(rigl_run):
    variant, _, finals = rigl_run
    with pytest.raises(AssertionError, match="traced > 1 times"):  # the guard is there: another batch size trips it
        variant.run_step(variant.first_state(0), next(iter(small.variant("rigl", batch_size=8).task.batches(0))), 0)
    assert finals[0]["loss"] != finals[1]["loss"]


def test_records_say_what_happened(rigl_run):
    variant, folders, finals = rigl_run
    records = read_records(folders[0] / "metrics.jsonl")
    stops = [15, 20, 30, 40, 45, 60, 70]
    assert [r["step"] for r in records if r["kind"] == "train"] == stops
    assert [r["step"] for r in records if r["kind"] == "masks"] == [0, *stops]
    assert [r["step"] for r in records if r["kind"] == "eval"] == [0, 20, 40, 60, 70]
    assert records[-1] == finals[0]
    assert all(np.isfinite(r["loss"]) and r["seconds"] >= 0 for r in records if r["kind"] == "train")

    size, nnz = 64 * 24 + 24 * 10, 178
    masks = [record for record in records if record["kind"] == "masks"]
    for record in masks:
        assert (record["nnz"], record["size"]) == (nnz, size)
        assert {path: layer["size"] for path, layer in record["layers"].items()} == variant.sizes
        assert sum(layer["nnz"] for layer in record["layers"].values()) == nnz
    dropped = {r["step"]: sum(layer["dropped"] for layer in r["layers"].values()) for r in masks}
    # Moves at steps 10, 20, 30 and 40; at 50 the cosine leaves less than one weight to swap.
    assert [step for step, count in dropped.items() if count] == [15, 30, 40, 45]
    explored = [r["exploration"] for r in masks]
    assert explored == sorted(explored)
    assert explored[0] == nnz / size < explored[-1]


def test_the_closing_record_counts_flops(rigl_run):
    final = rigl_run[2][0]
    assert (final["kind"], final["step"], final["execution"]) == ("final", 70, "simulated")
    assert final["sparsity"] == 1 - 178 / 1776
    dense, sparse = 2 * 1776, 2 * 178  # a multiply and an add for each weight
    assert (final["dense_inference_flops"], final["inference_flops"]) == (dense, sparse)
    assert final["dense_training_flops"] == 70 * 32 * 3 * dense
    moves = 5
    assert final["training_flops"] == 32 * (70 * 3 * sparse + moves * (dense - sparse))
    assert 0 <= final["accuracy"] <= 1


def test_two_runs_of_the_same_seed_are_the_same(rigl_run, tmp_path):
    variant, folders, _ = rigl_run
    train(variant, tmp_path, 0, resume=False, progress=False)
    again, before = (small.without_seconds(read_records(path / "metrics.jsonl")) for path in (tmp_path, folders[0]))
    assert again == before


def test_trains_as_a_plain_loop_with_an_nnx_optimizer():
    variant = small.variant("rigl")
    model = EXPERIMENT.model(small.CONFIG, nnx.Rngs(jax.random.key(jnp.uint32(3))))
    optimizer = nnx.Optimizer(model, variant.optimizer(3), wrt=nnx.Param)
    nnx.update(model, sparsejax.mask_params(nnx.state(model, nnx.Param), optimizer))

    @nnx.jit
    def step(model, optimizer, inputs, targets):
        def loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(inputs), targets).mean()

        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    data = iter(variant.task.batches(3))
    batches = [next(data) for _ in range(25)]
    losses = [float(step(model, optimizer, *inputs_and_targets(batch))) for batch in batches]
    state, compiled = variant.first_state(3), []
    for batch in batches:
        state, (value, kept) = variant.run_step(state, batch, jnp.uint32(3))
        compiled.append(float(value))
        assert int(kept.sum()) == 178
    np.testing.assert_allclose(compiled, losses, rtol=1e-4)
    chex.assert_trees_all_equal(sparsejax.masks_of(state.opt_state), nnx.as_pure(sparsejax.masks_of(optimizer)))


def test_the_demo_moves_masks_to_better_places(tmp_path):
    """On the demo's network, at fewer steps: SET and RigL beat static masks by far more than seeds differ."""
    config = dataclasses.replace(
        EXPERIMENT.config, algorithms=("static", "set", "rigl"), steps=1000, output=str(tmp_path / "runs")
    )
    folder = run_experiment(EXPERIMENT, config, progress=False)
    results = json.loads((folder / "results.json").read_text())
    accuracy = {row["method"]: row["mean"] for row in results["methods"]}
    assert accuracy["static"] + 0.05 < accuracy["set"] < accuracy["rigl"] + 0.02
    assert accuracy["rigl"] > 0.9
    assert all(row["nnz"] == 1004 and row["seeds"] == 3 for row in results["methods"])
    assert (folder / "report.html").exists()
    for run in folder.glob("*/seed*"):
        assert json.loads((run / "config.json").read_text())["variant"] == run.parent.name
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["1000", "500"]
    with pytest.raises(UsageError, match=r"exists already; continue it with --resume, or choose another --output"):
        run_experiment(EXPERIMENT, config, progress=False)


# Algorithms by name


@pytest.fixture(scope="module")
def demo():
    return small.variant("dense", hidden=(32, 16), n_of_m=(1, 4))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in BEFORE_TRAINING])
def test_every_name_makes_an_algorithm_that_fits(demo, name):
    params = demo.first_state(0).params
    algorithm = make_algorithm(name, demo.config, seed=jnp.uint32(1))
    state = jax.eval_shape(sparsejax.sparsify(optax.sgd(0.1), algorithm).init, params)
    assert len(jax.tree.leaves(state.masks)) == 3
    end = demo.config.steps - 1
    target = 0.75 if name in ("nm", "sr_ste", "mdgf", "sdgf") else demo.config.sparsity
    assert float(algorithm.sparsity_at(end)) == pytest.approx(target, abs=1e-6)


@pytest.mark.parametrize("name", ["snip", pytest.param("grasp", marks=pytest.mark.slow)])
def test_masks_found_before_training_stay(tmp_path, name):
    final = train(small.variant(name), tmp_path, 0, resume=False, progress=False)
    assert final["nnz"] == 178
    changes = [r for r in read_records(tmp_path / "metrics.jsonl") if r["kind"] == "masks"]
    assert all(layer["added"] == layer["dropped"] == 0 for r in changes for layer in r["layers"].values())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_algorithm_trains(tmp_path, name):
    variant = small.variant(name, hidden=(32, 16), n_of_m=(1, 4), steps=100, masks_until=0.7)
    final = train(variant, tmp_path, 0, resume=False, progress=False)
    target = 0.75 if name in ("nm", "sr_ste", "mdgf", "sdgf") else 0.9
    assert final["sparsity"] == pytest.approx(target, abs=0.002)
    assert final["inference_flops"] < final["training_flops"] <= final["dense_training_flops"]
    assert np.isfinite(final["loss"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits_conv", "digits_vit", "bytes_lm"])
def test_the_other_experiments_train(tmp_path, name):
    changes = {"bytes_lm": {"width": 32, "depth": 2, "max_bytes": 500_000, "heldout_windows": 32}}.get(name, {})
    experiment = EXPERIMENTS[name]
    config = dataclasses.replace(
        experiment.config, algorithms=("dense", "rigl"), steps=100, output=str(tmp_path / name), **changes
    )
    folder = run_experiment(experiment, config, progress=False)
    for variant in ("dense", "rigl"):
        first, *_, last = (
            r["loss"] for r in read_records(folder / variant / "seed0" / "metrics.jsonl") if r["kind"] == "eval"
        )
        assert last < 0.8 * first


# Counting FLOPs


def count(algorithm, nnz, trainable=None):
    forward = ForwardFlops({"a": 1000, "b": 60}, other=5)
    counter = FlopsCounter(forward, {"a": 100}, algorithm, batch_size=2)
    counter.add(0, np.array(nnz).reshape(-1, 1), trainable)
    return counter.total


def test_flops_of_fixed_masks_and_of_a_dense_run():
    assert count(sparsejax.static(0.9), [10] * 4) == 2 * 4 * 3 * (100 + 60 + 5)
    assert count(None, [100] * 4) == 2 * 4 * 3 * 1065


def test_flops_of_rigl_agree_with_the_formula_of_the_paper():
    algorithm = sparsejax.rigl(0.9, update_every=10, stop=1000)
    steps, moves = 1000, 99
    mean = rigl_training_flops(165, 1065, 1)  # (3 f_S + 2 f_S + f_D) / 2: a step and a move
    assert count(algorithm, [10] * steps) == 2 * ((steps - 2 * moves) * 3 * 165 + moves * 2 * mean)
    assert count(sparsejax.set_(0.9, update_every=10, stop=1000), [10] * steps) == 2 * steps * 3 * 165


def test_flops_where_pruned_weights_feel_gradients():
    assert count(sparsejax.straight_through(0.9), [10]) == 2 * training_flops(165, weight_gradient=1065)
    top_kast = sparsejax.top_kast(0.9, backward_sparsity=0.7)
    assert count(top_kast, [10], [30]) == 2 * training_flops(165, weight_gradient=365)
    fading = sparsejax.mdgf(1, 10, begin=0, rate=0.5)
    assert count(fading, [10] * 3) == 2 * (2 * 3 * 1065 + training_flops(165, weight_gradient=1065))


# Measuring


def test_padding_does_not_count():
    logits = jax.random.normal(jax.random.key(0), (4, 3, 5))
    targets = jnp.argmax(logits, axis=-1).at[0, 0].add(1) % 5
    sums = measure(logits, targets, jnp.array([1.0, 1.0, 1.0, 0.0]))
    probabilities = np.asarray(jax.nn.log_softmax(logits))[:3]
    expected = -np.take_along_axis(probabilities, np.asarray(targets)[:3, :, None], axis=-1).mean()
    scored = score("accuracy", sums)
    assert scored["loss"] == pytest.approx(expected, rel=1e-5)
    assert scored["accuracy"] == pytest.approx(8 / 9)
    assert score("bits_per_byte", sums)["bits_per_byte"] == pytest.approx(expected / np.log(2), rel=1e-5)


def test_tokens_are_predicted_from_those_before():
    inputs, targets = inputs_and_targets({"tokens": np.arange(8).reshape(2, 4)})
    assert inputs.tolist() == [[0, 1, 2], [4, 5, 6]]
    assert targets.tolist() == [[1, 2, 3], [5, 6, 7]]


# Metrics files


def test_a_resumed_log_forgets_what_will_be_written_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, after=None) as log:
        for step in (10, 20, 30):
            log.write("train", step, loss=1.0 / step)
        log.write("final", 30)
    path.write_text(path.read_text() + '{"kind": "tra')
    with MetricsLog(path, after=20) as log:
        assert log.last("train")["step"] == 20
        log.write("train", 30, loss=0.5)
    assert [(r["step"], r["loss"]) for r in read_records(path)] == [(10, 0.1), (20, 0.05), (30, 0.5)]
    with MetricsLog(path, after=None):
        assert read_records(path) == []


def test_a_broken_line_inside_a_log_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n{"ki\n{"kind": "train", "step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 is no record"):
        read_records(path)


# Bad configurations


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity": 1.0}, "1.0"),
        ({"sparsity": -0.1}, "-0.1"),
        ({"algorithms": ("sr_ste",), "hidden": (30, 10)}, r"layers/1/kernel"),
        ({"structure": "block", "block": (100, 100)}, r"layers/\d/kernel"),
        ({"dense_layers": ("nothing/*",)}, r"nothing/\*.*matches no leaf"),
        ({"update_every": 60}, "never move"),
        ({"masks_until": 0.0}, "masks_until is 0.0"),
        ({"steps": 0}, "steps is 0"),
        ({"log_every": 0}, "log_every is 0"),
        ({"seeds": (-1,)}, "seed -1"),
        ({"algorithms": ()}, "algorithms is empty"),
    ],
)
def test_a_configuration_that_cannot_run_is_refused_before_anything_is_written(tmp_path, changes, message):
    config = dataclasses.replace(small.CONFIG, output=str(tmp_path / "runs"), **changes)
    with pytest.raises(UsageError, match=message):
        run_experiment(EXPERIMENT, config, progress=False)
    assert not (tmp_path / "runs").exists()


def test_masks_move_in_a_dry_run():
    for name in ("rigl", "set", "gradual"):
        assert make_algorithm(name, dataclasses.replace(small.CONFIG, steps=2, update_every=50)).steps.due(1)


def test_unknown_names_are_refused():
    with pytest.raises(UsageError, match="no algorithm is called 'rigel'; known are dense, static"):
        make_algorithm("rigel", small.CONFIG)
    with pytest.raises(UsageError, match="structure is 'round'"):
        make_algorithm("rigl", SimpleNamespace(**{**dataclasses.asdict(small.CONFIG), "structure": "round"}))
