import pytest
import torch


@pytest.fixture(scope="session")
def toy():
    """Return (images, labels) of three classes that any classifier can learn: a bright row per class, plus noise."""

    def make(num, seed, classes=3):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(num) % classes
        images = 0.3 * torch.rand(num, 1, 8, 8, generator=generator)
        images[torch.arange(num), 0, 2 * labels + 1] += 0.6
        return images, labels

    return make
