"""Judges 10,000 real training images as if a generator had made them: the ceiling of the default protocol.

    python scripts/real_ceiling.py MNIST FashionMNIST

These numbers come from private records without noise where the records are private; run it on public data only.
"""

import argparse
from pathlib import Path

import torch

import datamodules
from lightning_dp.evaluation.protocol import EvaluationProtocol, evaluate_samples


def main() -> None:
    """Judge real images as if a generator had made them, and print one line for each data set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", help="Data modules, e.g. MNIST.")
    parser.add_argument("--root", type=Path, default=None, help="Data root (default: the usual places).")
    parser.add_argument("--seed", type=int, default=0, help="Of the subset.")
    options = parser.parse_args()
    protocol = EvaluationProtocol()
    for name in options.names:
        data = getattr(datamodules, name)(root=options.root)
        data.setup("fit")
        rows = torch.randperm(len(data.train_images), generator=torch.Generator().manual_seed(options.seed))
        rows = rows[: protocol.num_samples]
        images, labels = data.train_images[rows].float() / 255, data.train_labels[rows]
        result = evaluate_samples(images, labels, data.test_images, data.test_labels, protocol)
        numbers = ", ".join(f"{metric} {value:.4g}" for metric, value in result.metrics().items())
        print(f"{name}, {result.num_samples} real training images, protocol {result.protocol_hash}: {numbers}")


if __name__ == "__main__":
    main()
