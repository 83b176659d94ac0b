"""A mixture of Gaussians per class, in the low frequencies of a public cosine basis."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_dp.errors import ConfigurationError
from lightning_dp.networks.basis import LowFrequencyDCT
from lightning_dp.networks.generator import Generator
from lightning_dp.networks.texture import sharpened, textured
from lightning_dp.networks.upright import UprightDCT

_NUM_DISTORTIONS = 6  # an angle, two scales, a shear, two shifts


class ClassGaussianGenerator(Generator):
    """Draws cosine coefficients from the Gaussians of a label, and clamps the image to [0, 1].

    Each label has `num_components` Gaussians with logits, means and factors; a factor F stands for the covariance
    F F^T. Of a latent, the first numbers are its standard normal coordinates, the next one picks the component, and the
    last ones the distortion and the texture, if any. Low frequencies alone look soft, so contrast may be raised.

    Args:
        image_shape: (C, H, W) with H = W.
        num_classes: Number of labels.
        num_coefficients: Lowest frequencies per channel.
        window: Side of the centred square that is transformed; null takes the whole image. Outside it is black.
        num_components: Gaussians per label.
        gain: Contrast: a pixel x becomes gain * (x - black), > 0.
        black: Pixel value that becomes 0.
        distortion: Stds of random affine maps of the images: rotation in degrees, logarithm of the scale along each
            axis, shear, shift in pixels. Public knowledge of what keeps a label, no release; null draws none.
        slant: Weight of a slant beside coefficients. Images are made upright before they are transformed
            (`UprightDCT`), their slants drawn with the coefficients, and samples sheared by them; 0 leaves images as
            they are.
        sharpness: How much edges are raised after that (`sharpened`); 0 leaves them.
        texture: Std of noise on pixels that are not dark (`textured`), last of all; 0 adds none.

    Raises:
        ConfigurationError: The numbers do not fit each other.

    Example:
        >>> generator = ClassGaussianGenerator((1, 8, 8), num_classes=2, num_coefficients=10)
        >>> generator.sample(4, seed=0)[0].shape
        torch.Size([4, 1, 8, 8])
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int = 10,
        num_coefficients: int = 78,
        window: int | None = None,
        num_components: int = 1,
        gain: float = 1.0,
        black: float = 0.0,
        distortion: tuple[float, float, float, float] | None = None,
        sharpness: float = 0.0,
        texture: float = 0.0,
        slant: float = 0.0,
    ) -> None:
        super().__init__()
        if num_components < 1:
            raise ConfigurationError(f"Expected generator.num_components >= 1, got {num_components=}.")
        if not (0 < gain < math.inf and -1 < black < 1):
            raise ConfigurationError(f"Expected finite generator.gain > 0 and -1 < black < 1, got {gain=}, {black=}.")
        self.image_shape, self.num_classes, self.gain, self.black = image_shape, num_classes, gain, black
        self.num_coefficients, self.window, self.num_components = num_coefficients, window, num_components
        self.slant = slant
        self.basis = (
            UprightDCT(image_shape, num_coefficients, window, weight=slant)
            if slant
            else LowFrequencyDCT(image_shape, num_coefficients, window)
        )
        if distortion is not None and (len(distortion) != 4 or not all(0 <= std < math.inf for std in distortion)):
            raise ConfigurationError(f"Expected four finite stds >= 0 as generator.distortion, got {distortion=}.")
        if not (0 <= texture < math.inf and 0 <= sharpness < math.inf):
            raise ConfigurationError(
                f"Expected finite generator.sharpness >= 0 and texture >= 0, got {sharpness=}, {texture=}."
            )
        self.distortion, self.sharpness, self.texture = distortion, sharpness, texture
        self._of_latent = (
            self.basis.dim,
            1,
            0 if distortion is None else _NUM_DISTORTIONS,
            math.prod(image_shape) if texture else 0,
        )
        self.latent_dim = sum(self._of_latent)
        cells, dim = (num_classes, num_components), self.basis.dim
        self.logits = nn.Parameter(torch.zeros(*cells))
        self.means = nn.Parameter(torch.zeros(*cells, dim))
        self.factors = nn.Parameter(torch.zeros(*cells, dim, dim))

    def forward(self, latent: Tensor, labels: Tensor) -> Tensor:  # noqa: D102
        normal, choice, warp, noise = latent.split(self._of_latent, dim=1)
        cells = labels * self.num_components + self._component(choice[:, 0], labels)
        vectors = self._coefficients(normal, cells)
        images, slants = self.to_images(vectors), vectors[:, -1] / self.slant if self.slant else None
        if self.distortion is not None or slants is not None:
            images = self._distorted(images.clamp(0, 1), warp, self.distortion, slants)
        images = ((images - self.black) * self.gain).clamp(0, 1)  # after interpolation, which blurs
        images = sharpened(images, self.sharpness) if self.sharpness else images
        return textured(images, noise, self.texture) if self.texture else images

    def to_images(self, coefficients: Tensor) -> Tensor:
        """Return the images, (B, C, H, W), of coefficients, (B, C * num_coefficients), upright and not clamped.

        What follows coefficients, the slant, is not read.
        """
        channels, height, width = self.image_shape
        of_channels = coefficients[:, : channels * self.num_coefficients].unflatten(
            1, (channels, self.num_coefficients)
        )
        pixels = of_channels @ self.basis.matrix.to(coefficients)
        return pixels.unflatten(2, (height, width))

    def _distorted(
        self,
        images: Tensor,
        warp: Tensor,
        stds: tuple[float, float, float, float] | None,
        slants: Tensor | None = None,
    ) -> Tensor:
        """Return the images under affine maps that standard normal draws, (B, 6), pick, and sheared by slants, (B,)."""
        rotation, scale, shear, shift = stds or (0.0,) * 4
        warp = warp if stds else images.new_zeros(len(images), _NUM_DISTORTIONS)
        angle, stretch = warp[:, 0] * math.radians(rotation), (warp[:, 1:3] * scale).exp()
        cosine, sine = angle.cos(), angle.sin()
        first = torch.stack([cosine * stretch[:, 0], warp[:, 3] * shear - sine * stretch[:, 1]], dim=1)
        second = torch.stack([sine * stretch[:, 0], cosine * stretch[:, 1]], dim=1)
        moves = warp[:, 4:6] * (2 * shift / self.image_shape[2])
        if slants is not None:  # a place of the sheared image, read in the upright one
            first = first - slants[:, None] * second
            moves = torch.stack([moves[:, 0] - slants * moves[:, 1], moves[:, 1]], dim=1)
        maps = torch.cat([torch.stack([first, second], dim=1), moves[:, :, None]], dim=2)
        places = F.affine_grid(maps, list(images.shape), align_corners=False)
        return F.grid_sample(images, places, align_corners=False)

    def _component(self, normal: Tensor, labels: Tensor) -> Tensor:
        """Return the component that the quantile of a standard normal picks, (B,)."""
        shares = self.logits.softmax(dim=1).cumsum(dim=1)[labels]
        quantile = 0.5 * (1 + torch.erf(normal / math.sqrt(2)))
        return (quantile[:, None] > shares[:, :-1]).sum(dim=1)

    def _coefficients(self, normal: Tensor, cells: Tensor) -> Tensor:
        """Return means plus factors times latents, cell by cell, without a (B, d, d) tensor."""
        factors, order = self.factors.flatten(0, 1), torch.argsort(cells, stable=True)
        counts = torch.bincount(cells, minlength=len(factors)).tolist()
        parts = [rows @ factors[cell].T for cell, rows in enumerate(normal[order].split(counts)) if len(rows)]
        return self.means.flatten(0, 1)[cells] + torch.cat(parts)[torch.argsort(order)]

    def sample_latent(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        """Return standard normal latents, (num, latent_dim)."""
        source = self.means.device if generator is None else generator.device
        return torch.randn(num, self.latent_dim, generator=generator, device=source).to(self.means.device)
