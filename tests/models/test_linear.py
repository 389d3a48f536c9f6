"""The linear map of floats; `test_quantised_weights` has the quantised ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from razor_jax.models.linear import Linear, attend, dequantize, look_up, quantize_tree


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


@pytest.mark.parametrize("rows", [1, 2, 4, 5])
@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_a_few_rows_of_narrow_weights_are_the_einsum(rows, weights):
    shape, spec = (3, 2, 8, 32), "btkgh,kghd->btd"
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.standard_normal(size), "bfloat16") for size in ((rows, 1, *shape[:3]), shape))
    params = {"o": {"kernel": kernel}} if weights == "bfloat16" else quantize_tree({"o": {"kernel": kernel}}, "int8")
    y = Linear(shape, spec, use_bias=False).apply({"params": params["o"]}, x)
    want = np.einsum(spec, np.asarray(x, np.float64), np.asarray(dequantize(params["o"]), np.float64))
    assert y.dtype == x.dtype
    np.testing.assert_allclose(np.asarray(y, np.float64), want, atol=0.06)


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_tied_logits_are_products_with_every_embedding(rows):
    rng = np.random.default_rng(0)
    embedding, x = (jnp.asarray(rng.standard_normal(size), "bfloat16") for size in ((50, 32), (rows, 1, 32)))
    want = np.einsum("btd,vd->btv", np.asarray(x, np.float64), np.asarray(embedding, np.float64))
    np.testing.assert_allclose(np.asarray(attend(embedding, x), np.float64), want, atol=0.12)


def test_decoding_on_a_cpu_looks_embeddings_up_without_a_wide_copy_of_the_table():
    table = jnp.asarray(np.random.default_rng(0).standard_normal((300, 32)), "bfloat16")

    def steps(table, tokens):
        def step(index, sums):
            return sums + look_up(table, (tokens + index) % 300).astype("float32").sum((0, 1))

        return jax.lax.fori_loop(0, 8, step, jnp.zeros((32,)))

    tokens = jnp.asarray([[5], [299]])
    compiled = jax.jit(steps).lower(table, tokens).compile()
    want = sum(np.asarray(table, np.float64)[(np.asarray(tokens) + i) % 300].sum((0, 1)) for i in range(8))
    np.testing.assert_allclose(compiled(table, tokens), want, rtol=1e-5)
    assert compiled.memory_analysis().temp_size_in_bytes < table.nbytes


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])  # int4 is unpacked once per call
def test_decoding_on_a_cpu_keeps_no_wide_copy_of_the_weights(weights):
    size = 512
    linear, tree = (
        Linear((size, size), "bd,df->bf", use_bias=False),
        {"k": {"kernel": jnp.ones((size, size), "bfloat16")}},
    )
    tree = tree if weights == "bfloat16" else quantize_tree(tree, weights)

    def steps(kernels, x):
        def step(_, x):
            for kernel in kernels:
                x = linear.apply({"params": kernel}, x)
            return x

        return jax.lax.fori_loop(0, 8, step, x)

    kernels = [tree["k"]] * 8
    arrays = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (kernels, jnp.ones((1, size), "bfloat16")))
    compiled = jax.jit(steps).lower(*arrays).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2.5 * 4 * size * size
