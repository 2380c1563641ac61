import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.masks.roles import Roles, convolution_roles, convolution_roles_out_in

CASES = [
    (Roles(in_axes=(0,), out_axes=(1,)), (6, 4), (6, 4)),
    (Roles(in_axes=(1,), out_axes=(0,)), (4, 6), (6, 4)),
    (Roles(in_axes=(0,), out_axes=(1, 2)), (6, 2, 4), (6, 8)),
    (Roles(in_axes=(0, 1), out_axes=(2,)), (2, 4, 6), (8, 6)),
    (Roles(in_axes=(-2,), out_axes=(-1,), batch_axes=(0,)), (3, 6, 4), (3, 6, 4)),
    (Roles(in_axes=(0,), out_axes=(2,), batch_axes=(1,)), (6, 3, 4), (3, 6, 4)),
    (convolution_roles(4), (3, 3, 5, 7), (45, 7)),
    (convolution_roles_out_in(4), (7, 5, 3, 3), (45, 7)),
]


@pytest.mark.parametrize(("roles", "shape", "matrix"), CASES)
def test_matrix_shape_and_round_trip(roles, shape, matrix):
    roles.check(shape, "w")
    array = jnp.arange(np.prod(shape)).reshape(shape)
    laid_out = roles.to_matrix(array)
    assert roles.matrix_shape(shape) == matrix == laid_out.shape
    np.testing.assert_array_equal(roles.from_matrix(laid_out, shape), array)


def test_convolutions_of_both_layouts_have_the_same_matrix_and_kernel_shape():
    hwio = np.random.default_rng(0).normal(size=(3, 2, 5, 7))
    oihw = np.transpose(hwio, (3, 2, 0, 1))
    first, second = convolution_roles(4), convolution_roles_out_in(4)
    np.testing.assert_array_equal(first.to_matrix(jnp.asarray(hwio)), second.to_matrix(jnp.asarray(oihw)))
    assert first.kernel_shape(hwio.shape) == second.kernel_shape(oihw.shape) == (3, 2, 5, 7)


@pytest.mark.parametrize(
    "roles",
    [Roles((0,), (0,)), Roles((0,), (2,)), Roles((0, 1), ()), Roles((0,), (1,), batch_axes=(1,))],
)
def test_roles_that_do_not_fit_are_refused_by_name(roles):
    with pytest.raises(ValueError, match="blocks/0/kernel"):
        roles.check((4, 4), "blocks/0/kernel")
