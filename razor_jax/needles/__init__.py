"""Planted facts and held-out text, shared by the demo, head search and evaluations."""
