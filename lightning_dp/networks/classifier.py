"""The interface of every classifier that is trained privately: image in, logits out."""

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from lightning_dp.networks.releasable import ReleasableNetwork


class Classifier(ReleasableNetwork):
    """A classifier of images. No layer may couple the records of a batch: group norm, not batch norm."""

    kind: ClassVar[str] = "classifier"

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Return logits, (B, num_classes), of images in [0, 1], (B, C, H, W)."""

    def features(self, images: Tensor) -> Tensor:
        """Return what no trained parameter touches, (B, ...), of each image by itself: here the image."""
        return images

    def classify(self, features: Tensor) -> Tensor:
        """Return what `forward` returns, from `features`."""
        logits: Tensor = self(features)
        return logits

    @torch.no_grad()
    def predict(self, images: Tensor, *, batch_size: int = 500) -> Tensor:
        """Return the most likely labels, int64 on the CPU, (n,).

        Args:
            images: uint8, (n, C, H, W).
            batch_size: Images judged at a time.
        """
        device = next(self.parameters()).device
        found = [self(part.to(device).float() / 255).argmax(1).cpu() for part in images.split(batch_size)]
        return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64)
