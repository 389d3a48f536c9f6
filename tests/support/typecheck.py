"""The checker that runs shape and type annotations under pytest: an int is a fine float, as in PEP 484."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
