"""Models and caches on disk: Hugging Face and Orbax checkpoints, the Hub, saved caches."""
