"""A public cosine basis of images that are made upright first, each by its own slant."""

import torch
from torch import Tensor
from typing_extensions import override

from lightning_dp.errors import ConfigurationError
from lightning_dp.networks.basis import LowFrequencyDCT

_STEPS_TO_SLANT = 16  # slants are whole multiples of a sixteenth,
_LARGEST = 16  # up to 1, which is 45 degrees
_PARTS = 2 * _STEPS_TO_SLANT  # of a pixel, by which rows move: their distances from the middle are whole or half
_BASIS_STEPS = 2.0**24  # of the rounded basis
_MAX_WEIGHT = 100.0  # beyond what coefficients reach; squared distances stay below 2^53 steps


class UprightDCT(LowFrequencyDCT):
    """The cosine transform of upright images, and their slants beside it.

    Writers slant differently, which moves every coefficient and along no straight line: what is left of a class after
    its slants are taken out is nearer to a Gaussian. The slant of an image is that of the principal line of its pixels
    (covariance of place and height over the variance of the height, 0 for black images), rounded to sixteenths; it is
    sheared back by that, around its middle row. A vector is (coefficients of the upright image, weight * slant).

    An image's slant and vector depend on that image alone, to the last bit (`in_steps`).

    Args:
        image_shape: (C, H, W) with H = W.
        num_coefficients: See `LowFrequencyDCT`.
        window: See `LowFrequencyDCT`.
        weight: What a slant of 1 counts beside coefficients, in (0, 100].

    Raises:
        ConfigurationError: The numbers do not fit each other.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_coefficients: int = 64,
        window: int | None = None,
        *,
        weight: float = 1.0,
    ) -> None:
        super().__init__(image_shape, num_coefficients, window)
        if not 0 < weight <= _MAX_WEIGHT:
            raise ConfigurationError(f"Expected 0 < weight <= {_MAX_WEIGHT:g} of the slant, got {weight=}.")
        self.weight = weight
        self.dim = image_shape[0] * num_coefficients + 1

    @property
    @override
    def vector_radii(self) -> Tensor:
        return torch.cat([super().vector_radii, torch.zeros(1, dtype=torch.float64, device=self.radii.device)])

    def slants_in_steps(self, pixels: Tensor) -> Tensor:
        """Return slants in sixteenths, int64, (B,), of pixels, float64 and whole, (B, C, H, W).

        Sums are whole numbers below 2^53; what follows is elementwise and rounded as IEEE 754 says, so that no other
        image moves a slant.
        """
        side = pixels.shape[3]
        places = (2 * torch.arange(side, dtype=torch.float64, device=pixels.device) - (side - 1)).flatten()
        drawn = pixels.sum(dim=1)
        of_rows, of_columns = drawn.sum(dim=2), drawn.sum(dim=1)
        mass, down, across = of_rows.sum(dim=1), of_rows @ places, of_columns @ places
        tall = mass * (of_rows @ places.square()) - down.square()
        leaning = mass * ((drawn @ places) @ places) - across * down
        slants = (leaning / tall.clamp(min=1) * _STEPS_TO_SLANT).round().clamp(-_LARGEST, _LARGEST)
        return torch.where(tall > 0, slants, 0.0).long()

    @override
    def in_steps(self, images: Tensor, steps: float) -> Tensor:
        slants = self.slants_in_steps(images.double())
        pixels = images.flatten(2).double()
        found = torch.empty(len(images), self.dim, dtype=torch.float64, device=images.device)
        for slant in slants.unique().tolist():
            mine = slants == slant
            found[mine, :-1] = (pixels[mine] @ self.sheared(slant).to(pixels).T).flatten(1)
        found[:, :-1] = (found[:, :-1] * (steps / (255 * _BASIS_STEPS * _PARTS))).round()
        found[:, -1] = (slants * (self.weight * steps / _STEPS_TO_SLANT)).round()
        return found

    @override
    def forward(self, images: Tensor) -> Tensor:
        slants = self.slants_in_steps((images * 255).round().double())
        # One product for all: it rounds an image in a way that depends on how many there are, which is public, and not
        # on how many of them slant alike, which their pixels decide.
        coefficients = super().forward(_shorn(images, slants))
        return torch.cat([coefficients, slants.to(images)[:, None] * (self.weight / _STEPS_TO_SLANT)], dim=1)

    def sheared(self, slant: int) -> Tensor:
        """Return the basis that takes a slant, in sixteenths, out first, float64, (num_coefficients, H * W).

        In whole steps: the weights of the linear interpolation are whole parts of a pixel.
        """
        side = self.image_shape[1]
        rounded = (self.matrix.double() * _BASIS_STEPS).round().unflatten(1, (side, side))
        places = torch.arange(side, dtype=torch.float64, device=rounded.device) * _PARTS
        moves = (2 * torch.arange(side, dtype=torch.float64, device=rounded.device) - (side - 1)) * slant
        read = places[None, :, None] + moves[:, None, None]  # where a pixel of the upright image lies, (row, pixel, 1)
        weights = (_PARTS - (places - read).abs()).clamp(min=0)  # (row, upright pixel, pixel)
        return torch.einsum("krj,rji->kri", rounded, weights).flatten(1)


def _shorn(images: Tensor, slants: Tensor) -> Tensor:
    """Return images, (B, C, H, H), with their slants in sixteenths, (B,), taken out by linear interpolation."""
    side = images.shape[3]
    places = torch.arange(side, device=images.device)
    moves = (2 * places - (side - 1)) * slants[:, None]  # in parts of a pixel, (B, row)
    left = places + moves.div(_PARTS, rounding_mode="floor")[:, :, None]  # (B, row, upright pixel)
    share = (moves.remainder(_PARTS).to(images) / _PARTS)[:, None, :, None]

    def pixels(read: Tensor) -> Tensor:
        found = images.gather(3, read.clamp(0, side - 1)[:, None].expand_as(images))
        return torch.where(((read >= 0) & (read < side))[:, None], found, 0.0)

    return (1 - share) * pixels(left) + share * pixels(left + 1)
