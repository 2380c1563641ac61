"""Pieces of the studies of SparK, of wafers and of volumes, and, slowly, what these studies claim."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.data.volumes import make_volumes
from experiments.data.wafers import PATTERNS, bin_wafers, make_wafers, stack_wafers
from experiments.models import MaskedConvNeXt, MaskedResNet, Spark
from experiments.models.masked_nets import conv_function
from experiments.models.spark import normalised, patch_loss, patches, reached, unpatch
from experiments.papers import spark_digits, volumes, wafers
from sparsejax.convolution import SiteMask

MASK = SiteMask(jnp.array([[[True, False], [False, False]], [[False, True], [True, False]]]))


def images(side=8, dims=2, seed=0):
    return jax.random.normal(jax.random.key(seed), (2, *[side] * dims, 1))


@pytest.mark.parametrize("dims", [2, 3])
def test_patches_are_put_together_again(dims):
    x = np.asarray(images(dims=dims))
    cut = patches(x, 4)
    assert cut.shape == (2, *[2] * dims, 4**dims)
    np.testing.assert_array_equal(cut[(1,) * (dims + 1)], x[(1, *[slice(4, 8)] * dims)].reshape(-1))
    np.testing.assert_array_equal(unpatch(cut, 4, 1), x)


def test_only_hidden_patches_count_in_the_loss():
    x, guess = images(), images(seed=1)
    perfect = unpatch(normalised(patches(x, 4))[0], 4, 1)
    assert float(patch_loss(perfect, x, MASK, 4)) < 1e-8
    cut = np.asarray(patches(x, 4), np.float64)
    true = (cut - cut.mean(-1, keepdims=True)) / np.sqrt(cut.var(-1, ddof=1, keepdims=True) + 1e-6)
    error = ((np.asarray(patches(guess, 4)) - true) ** 2).mean(-1)
    value, grads = jax.value_and_grad(patch_loss)(guess, x, MASK, 4)
    np.testing.assert_allclose(value, error[~np.asarray(MASK.mask)].mean(), rtol=1e-5)
    visible = np.asarray(MASK.at((8, 8)))
    assert not np.asarray(grads)[visible].any()
    assert np.asarray(grads)[~visible].all()


@pytest.mark.parametrize("network", [MaskedResNet, pytest.param(MaskedConvNeXt, marks=pytest.mark.slow)])
def test_masks_erode_only_where_the_network_does_not_know_them(network):
    @jax.jit
    def run(x):
        encoder = network(1, (8, 8), rngs=nnx.Rngs(0))
        return [reached(encoder, x, MASK, masked=masked) for masked in (True, False)]

    masked, ordinary = run(images(16))
    # A site may be dead by chance, all of its features cut off by relu.
    visible = float(MASK.mask.mean())
    assert all(visible - 0.05 < share <= visible for share in np.asarray(masked))
    assert visible + 0.1 < ordinary[0] < ordinary[1]


def test_convolutions_of_volumes_are_those_of_flax():
    ours = nnx.Conv(1, 2, (3, 3, 3), strides=2, conv_general_dilated=conv_function(3), rngs=nnx.Rngs(0))
    flax = nnx.Conv(1, 2, (3, 3, 3), strides=2, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(ours(images(dims=3)), flax(images(dims=3)), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("network", [MaskedResNet, MaskedConvNeXt])
def test_predictions_do_not_depend_on_what_is_hidden(network):
    rngs = nnx.Rngs(0)
    model = Spark(network(1, (4, 8), rngs=rngs), 1, width=8, rngs=rngs)
    hidden = ~MASK.at((8, 8))[..., None]
    run = nnx.jit(lambda model, x: model(x, MASK))
    first = run(model, images())
    np.testing.assert_array_equal(run(model, jnp.where(hidden, jnp.nan, images())), first)
    assert np.abs(np.asarray(run(model, jnp.where(hidden, images(), 1.0))) - first).max() > 1e-3
    shares = reached(model.encoder, images(), MASK, masked=True)
    np.testing.assert_allclose(shares, float(MASK.mask.mean()), atol=0.05)


def test_wafers_hold_defects_inside_of_a_disc():
    kinds = np.arange(len(PATTERNS))
    made = make_wafers(kinds, size=4096, points=(200, 300), seed=3)
    for wafer, again in zip(made, make_wafers(kinds, size=4096, points=(200, 300), seed=3), strict=True):
        np.testing.assert_array_equal(wafer, again)
        assert len(wafer) <= 300
        assert (np.linalg.norm(wafer - 2047.5, axis=1) < 2050).all()
    ring, edge, cluster = (wafer - 2047.5 for wafer in made[:3])
    assert np.median(np.linalg.norm(edge, axis=1)) > 0.9 * 2048
    assert np.median(np.abs(np.linalg.norm(ring, axis=1) - np.median(np.linalg.norm(ring, axis=1)))) < 200
    assert np.median(np.linalg.norm(cluster - np.median(cluster, axis=0), axis=1)) < 250
    maps = bin_wafers(made, 4096, 64)
    np.testing.assert_allclose(np.expm1(maps).sum((1, 2, 3)), [len(wafer) for wafer in made], rtol=1e-5)
    batch, coords = stack_wafers(made, 2000)
    np.testing.assert_array_equal(coords[batch == 4], made[4])
    with pytest.raises(ValueError, match="capacity is 100, pass at least that"):
        stack_wafers(made, 100)


def test_the_mixture_is_the_density_of_its_classes():
    random = np.random.default_rng(0)
    labels = np.repeat([0, 1], [300, 100])
    latents = random.normal(size=(400, 2)) * [[1.0, 0.5]] + 6.0 * labels[:, None]
    surprise = wafers.mixture(latents, labels)
    at = np.array([[0.3, 0.1], [6.0, 6.5], [3.0, -4.0]])
    density = np.zeros(3)
    for share, part in ((0.75, latents[:300]), (0.25, latents[300:])):
        covariance = np.cov(part.T, bias=True) + 1e-4 * np.eye(2)
        away = at - part.mean(0)
        distance = np.einsum("ni,ij,nj->n", away, np.linalg.inv(covariance), away)
        density += share * np.exp(-distance / 2) / (2 * np.pi * np.sqrt(np.linalg.det(covariance)))
    np.testing.assert_allclose(surprise(at), -np.log(density), rtol=1e-6)


def test_volumes_have_organs_and_a_target_between():
    made = make_volumes(3, seed=1)
    assert made.images.dtype == np.float32
    for number, brightness in enumerate((-1.0, 0.9, 0.7), 1):
        assert abs(made.images[..., 0][made.organs == number].mean() - brightness) < 0.3
    assert 0.01 < made.target.mean() < 0.1
    np.testing.assert_array_equal(make_volumes(3, seed=1).images, made.images)


def test_the_loss_of_segmentation_is_least_at_the_truth():
    labels = jnp.asarray(make_volumes(2).organs)

    def loss(chosen):
        return float(volumes.dice_loss(lambda *_, train: 20 * jax.nn.one_hot(chosen, 4), None, labels))

    assert loss(labels) < 1e-3
    assert loss(jnp.where(labels == 3, 0, labels)) > 0.2


@pytest.mark.slow
def test_tiny_studies_leave_tables_and_pictures(tmp_path):
    kinds = {
        "spark_digits": spark_digits.Config(
            seeds=(0,), size=16, channels=(4, 8), decoder_width=8, steps=2, batch_size=8, labels=20, tune_steps=2
        ),
        "wafers": wafers.Config(
            **{"seeds": (0,), "size": 256, "points": (20, 40), "channels": (8, 8), "latent": 4, "bins": (16,)},
            **{"binned_channels": (8, 8), "steps": 2, "batch_size": 8, "wafers": 48, "timed_sizes": (256,)},
        ),
        "volumes": volumes.Config(
            **{"seeds": (0,), "side": 8, "channels": (4, 8), "decoder_width": 8, "unlabelled": 8, "labelled": 4},
            **{"target_labelled": 2, "heldout": 4, "steps": (2, 2, 2), "batch_size": 2},
        ),
    }
    for module in (spark_digits, wafers, volumes):
        name = module.STUDY.name
        config = dataclasses.replace(kinds[name], output=str(tmp_path / name))
        tables = module.run(config, progress=False)
        kept = json.loads((tmp_path / name / "results.json").read_text())
        assert {key: kept[key] for key in tables} == tables
    assert (tmp_path / "spark_digits" / "reconstruction.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_pretraining_beats_random_weights(tmp_path):
    tables = spark_digits.run(spark_digits.Config(output=str(tmp_path)), progress=False)
    rows = tables["accuracy"]
    for random, _, spark in (rows[:3], rows[3:]):
        assert spark["linear probe"] > random["linear probe"]
        assert spark["worst probe"] > random["linear probe"]
    for row in tables["erosion"]:
        shares = list(row.values())[1:]
        if "ordinary" in row["network"]:
            assert shares[-1] > 0.95
        else:
            np.testing.assert_allclose(shares, shares[0], atol=0.02)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_wafers_at_full_resolution_are_recognised(tmp_path):
    config = wafers.Config(timed_sizes=(), output=str(tmp_path))
    full, *binned = wafers.run(config, progress=False)["recognition"]
    assert full["accuracy"] > max(row["accuracy"] for row in binned)
    assert full["AUROC mixture"] > max(full["AUROC softmax"], full["AUROC energy"]) + 5
