"""Which process of a run this is, before anything heavy is imported."""

import os


def process_number() -> int:
    """Return the number of this process in its run, as torchrun, SLURM or Lightning's own launcher set it; 0 alone."""
    for name in ("RANK", "SLURM_PROCID"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    node, local = (os.environ.get(name, "0") for name in ("NODE_RANK", "LOCAL_RANK"))
    # The launcher counts processes within a node: which number it will be exactly does not matter here.
    return int(node) + int(local) if node.isdigit() and local.isdigit() else 0
