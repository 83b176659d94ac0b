"""A grid of samples as a picture: one row per class, so that a glance shows quality, variety and wrong labels."""

from pathlib import Path

import matplotlib.image
import torch
from torch import Tensor

from lightning_dp.errors import ConfigurationError
from lightning_dp.evaluation.protocol import quantise

_GAP = 2  # pixels of background between images
_BACKGROUND = 255


def sample_grid(images: Tensor, labels: Tensor, *, per_class: int = 10, num_classes: int | None = None) -> Tensor:
    """Arrange the first images of each class in rows, class 0 on top.

    Args:
        images: Float in [0, 1], (M, C, H, W), C 1 or 3.
        labels: Integers, (M,).
        per_class: Images a row. A class with fewer leaves the rest of its row empty.
        num_classes: Rows; the largest label + 1 when None.

    Returns: uint8, (height, width, 3).

    Raises:
        ConfigurationError: Another shape, per_class < 1, or pixels that are not finite or not in [0, 1].
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or labels.shape != (len(images),) or not len(images):
        raise ConfigurationError(
            "Expected images of shape (M, 1 or 3, H, W) and labels of shape (M,) for the sample grid, "
            f"got {tuple(images.shape)} and {tuple(labels.shape)}."
        )
    if per_class < 1:
        raise ConfigurationError(f"Expected per_class >= 1, got per_class={per_class}.")
    pixels, labels = quantise(images.detach().cpu()), labels.cpu()
    pixels = pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1)  # (M, H, W, 3)
    height, width = pixels.shape[1:3]
    rows = int(labels.max()) + 1 if num_classes is None else num_classes
    shape = (rows * (height + _GAP) + _GAP, per_class * (width + _GAP) + _GAP, 3)
    canvas = torch.full(shape, _BACKGROUND, dtype=torch.uint8)
    for row in range(rows):
        top = row * (height + _GAP) + _GAP
        for column, image in enumerate(pixels[labels == row][:per_class]):
            left = column * (width + _GAP) + _GAP
            canvas[top : top + height, left : left + width] = image
    return canvas


def save_sample_grid(
    path: Path | str,
    images: Tensor,
    labels: Tensor,
    *,
    per_class: int = 10,
    num_classes: int | None = None,
    scale: int = 2,
) -> Path:
    """Write `sample_grid` as PNG.

    Args:
        path: File to write.
        images: Float in [0, 1], (M, C, H, W), C 1 or 3.
        labels: Integers, (M,).
        per_class: Images a row.
        num_classes: Rows; the largest label + 1 when None.
        scale: Side of the square that one pixel becomes.

    Returns: The path.

    Raises:
        ConfigurationError: As for `sample_grid`, scale < 1, or the file cannot be written.
    """
    if scale < 1:
        raise ConfigurationError(f"Expected scale >= 1, got scale={scale}.")
    canvas = sample_grid(images, labels, per_class=per_class, num_classes=num_classes)
    enlarged = canvas.repeat_interleave(scale, dim=0).repeat_interleave(scale, dim=1)
    try:
        matplotlib.image.imsave(str(path), enlarged.numpy(), format="png")
    except OSError as error:
        raise ConfigurationError(f"Expected a writable file for the sample grid, got {path}: {error}.") from error
    return Path(path)
