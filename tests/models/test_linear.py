"""The linear map of floats; `test_quantised_weights` has the quantised ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from razor_jax.models.linear import Linear


@pytest.mark.parametrize(
    ("inputs", "shape", "spec"),
    [
        ((2, 5, 32), (32, 3, 2, 8), "btd,dkgh->btkgh"),
        ((2, 5, 3, 2, 8), (3, 2, 8, 32), "btkgh,kghd->btd"),
        ((2, 3, 2, 8), (3, 2, 8, 32), "bkgh,kghd->bd"),
        ((4, 6, 7, 32), (32, 20), "...d,dv->...v"),
    ],
)
def test_it_is_the_einsum(inputs, shape, spec):
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.standard_normal(size), "float32") for size in (inputs, shape))
    y = Linear(shape, spec, use_bias=False).apply({"params": {"kernel": kernel}}, x)
    want = np.einsum(spec, np.asarray(x, np.float64), np.asarray(kernel, np.float64))
    np.testing.assert_allclose(y, want, atol=1e-4)


def test_a_decode_step_does_not_transpose_the_kernel_that_contracts_several_dimensions():
    shape = (3, 4, 64, 256)
    linear = Linear(shape, "btkgh,kghd->btd", use_bias=False)
    arrays = (jax.ShapeDtypeStruct(size, "float32") for size in (shape, (1, 1, *shape[:3])))
    compiled = jax.jit(lambda kernel, x: linear.apply({"params": {"kernel": kernel}}, x)).lower(*arrays).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < np.prod(shape)
