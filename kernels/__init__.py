"""Attention kernels: one folder an op, one file a backend; arrays in, arrays out, nothing of the rest."""
