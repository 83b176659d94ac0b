"""What images of low frequencies lack, from public knowledge alone: edges and texture."""

import torch
import torch.nn.functional as F
from torch import Tensor

_DARK = 0.05  # pixels below this value are background, and stay smooth


def sharpened(images: Tensor, sharpness: float) -> Tensor:
    """Return images in [0, 1] with their differences from the neighbours' mean added, `sharpness` times.

    Args:
        images: (B, C, H, W).
        sharpness: >= 0; 0 changes nothing.
    """
    cross = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]).to(images) / 4
    around = F.pad(images.flatten(0, 1)[:, None], (1, 1, 1, 1), mode="replicate")
    means = F.conv2d(around, cross[None, None]).view_as(images)
    return (images + sharpness * (images - means)).clamp(0, 1)


def textured(images: Tensor, noise: Tensor, std: float) -> Tensor:
    """Return images in [0, 1] with independent noise on every pixel that is not dark.

    Images of low frequencies are smooth, and a classifier that has seen nothing else is at a loss with photographs.
    That they have a texture is public knowledge: no release tells it.

    Args:
        images: (B, C, H, W).
        noise: Standard normal, (B, C * H * W).
        std: Of the noise, in units of pixels.
    """
    return (images + std * noise.view_as(images) * (images > _DARK)).clamp(0, 1)
