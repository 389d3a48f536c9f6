"""Tokenizers, chat templates and stop tokens of a checkpoint."""
