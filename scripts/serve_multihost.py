"""Serve from several hosts: `python -m razor_jax.launch … -- scripts/serve_multihost.py --prompts FILE --out FILE`.

`razor-jax serve` by another name, for launchers that start a file. The same line on every host; docs/distributed.md
has those of Cloud TPU VMs, Slurm, Kubernetes and plain SSH.
"""

import sys

from razor_jax.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "serve")
    main()
