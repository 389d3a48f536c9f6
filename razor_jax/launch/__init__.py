"""`python -m razor_jax.launch`: start one process of a multi-host run and watch it."""
