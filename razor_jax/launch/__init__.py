"""`python -m razor_jax.launch`: one process of a run over many hosts."""
