"""Train the default feature extractor on the complete MNIST and Fashion-MNIST, and write its weights.

    LIGHTNING_DP_DATA=path/to/data python scripts/train_feature_extractor.py

One small CNN learns 20 classes: digits 0 to 9, then the ten kinds of clothing. Both data sets are public, so the
extractor costs no privacy. The weights are stored as float16; the accuracies printed are those of the stored file.
The SHA-256 printed at the end belongs into `lightning_dp/evaluation/features.py`. Takes about 4 minutes on one core.
"""

import argparse
import hashlib
import time
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from datamodules.mnist import MNIST, FashionMNIST
from lightning_dp.networks.classifiers import FeatureClassifier, initialise

Split = tuple[Tensor, Tensor]
DATA_SETS = (MNIST, FashionMNIST)
OUTPUT = Path(__file__).parents[1] / "lightning_dp" / "evaluation" / "assets" / "digits_fashion_cnn.safetensors"


def load_data(root: str | None) -> tuple[Split, Split]:
    """Return train and test images, uint8 (N, 1, 28, 28), with labels in 0..19, of both sets, verified by checksum."""
    digits, fashion = (data_set(root=root).read() for data_set in DATA_SETS)
    train = (
        torch.cat([digits.train_images, fashion.train_images]),
        torch.cat([digits.train_labels, fashion.train_labels + 10]),
    )
    test = (
        torch.cat([digits.test_images, fashion.test_images]),
        torch.cat([digits.test_labels, fashion.test_labels + 10]),
    )
    return train, test


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Move a batch by up to two pixels each way: fidelity should not hang on where exactly a stroke lies."""
    rows, columns = (int(v) for v in torch.randint(0, 5, (2,), generator=generator))
    side = images.shape[-1]
    return nn.functional.pad(images, (2, 2, 2, 2))[..., rows : rows + side, columns : columns + side]


def train(images: Tensor, labels: Tensor, *, epochs: int, seed: int) -> FeatureClassifier:
    """Return a network trained on uint8 images, (N, 1, H, W), and labels 0..19, int64 (N,), of both data sets."""
    generator = torch.Generator().manual_seed(seed)
    network = FeatureClassifier(num_classes=20)
    initialise(network, generator)
    network = network.to(memory_format=torch.channels_last)
    batch = 128
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    for epoch in range(epochs):
        start, losses = time.perf_counter(), []
        for rows in torch.randperm(len(images), generator=generator).split(batch)[: len(images) // batch]:
            pixels = shifted(images[rows].float() / 255, generator)
            loss = nn.functional.cross_entropy(network(pixels), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
        mean_loss, seconds = torch.stack(losses).mean(), time.perf_counter() - start
        print(f"epoch {epoch + 1}: loss {mean_loss:.4f}, {seconds:.0f} s", flush=True)
    return network


@torch.no_grad()
def accuracies(network: FeatureClassifier, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the test accuracy per data set."""
    predicted = torch.cat([network(part.float() / 255).argmax(1) for part in images.split(1000)])
    correct = (predicted == labels).float()
    return {name: float(correct[labels // 10 == i].mean()) for i, name in enumerate(("MNIST", "FashionMNIST"))}


def main() -> None:
    """Train the extractor on both public data sets, and write its weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="folder of the data sets; searched as by `lightning-dp fit` when left out")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # one thread: the same weights again on the same machine
    training, test = load_data(args.root)
    network = train(*training, epochs=args.epochs, seed=args.seed)
    stored = save({name: value.half().contiguous() for name, value in network.state_dict().items()})
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_bytes(stored)
    network.load_state_dict({name: value.float() for name, value in load(stored).items()})
    for name, accuracy in accuracies(network, *test).items():
        print(f"{name}: test accuracy {accuracy:.4f}")
    print(f"{args.output}: {len(stored)} bytes, SHA-256 {hashlib.sha256(stored).hexdigest()}")


if __name__ == "__main__":
    main()
