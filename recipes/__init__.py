"""Train the packaged models. Not installed: run from a clone, `python -m recipes.train_mini`."""
