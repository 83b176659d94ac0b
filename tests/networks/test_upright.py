import math

import pytest
import torch

from lightning_dp.errors import ConfigurationError
from lightning_dp.networks.basis import LowFrequencyDCT
from lightning_dp.networks.class_gaussian import ClassGaussianGenerator
from lightning_dp.networks.upright import UprightDCT

SIDE = 16


def bar(slant: float, wide: int = 2) -> torch.Tensor:
    """A bar that moves by `slant` pixels to the right for each one further down, uint8, (1, 1, 16, 16)."""
    image = torch.zeros(1, 1, SIDE, SIDE, dtype=torch.uint8)
    for row in range(3, 13):
        left = 7 + slant * (row - (SIDE - 1) / 2)
        for column in range(SIDE):
            covered = min(column + 1, left + wide) - max(column, left)
            image[0, 0, row, column] = round(200 * max(0.0, covered))
    return image


def basis(num_coefficients=20, channels=1, weight=2.0) -> UprightDCT:
    return UprightDCT((channels, SIDE, SIDE), num_coefficients, weight=weight)


@pytest.mark.parametrize("slant", [-0.75, -0.25, 0.0, 0.5, 0.75])
def test_a_slant_is_found_and_taken_out(slant):
    found = basis()(bar(slant).float() / 255)
    upright = LowFrequencyDCT((1, SIDE, SIDE), 20)(bar(0.0).float() / 255)
    assert found[0, -1].item() / 2.0 == pytest.approx(slant, abs=1 / 16)
    torch.testing.assert_close(found[:, :-1], upright, atol=0.15, rtol=0)
    if slant:
        assert (LowFrequencyDCT((1, SIDE, SIDE), 20)(bar(slant).float() / 255) - upright).abs().max() > 0.3


def test_samples_lean_as_their_slants_say():
    generator = ClassGaussianGenerator((1, SIDE, SIDE), num_classes=2, num_coefficients=SIDE**2, slant=2.0)
    vectors = generator.basis(bar(0.5).float() / 255)
    with torch.no_grad():
        generator.means.copy_(vectors.expand_as(generator.means))
        generator.means[1, 0, -1] *= -1
    images, _ = generator.sample(2, seed=0, labels=torch.tensor([0, 1]))
    torch.testing.assert_close(images[:1] * 255, bar(0.5).float(), atol=80, rtol=0)
    assert (images[:1] * 255 - bar(0.5)).abs().mean() < 0.25 * (images[:1] * 255 - bar(0.0)).abs().mean()
    assert generator.basis(images)[:, -1].tolist() == pytest.approx([1.0, -1.0], abs=0.2)


def test_slants_that_vary_are_drawn_with_the_image():
    generator = ClassGaussianGenerator((1, SIDE, SIDE), num_classes=1, num_coefficients=SIDE**2, slant=2.0)
    with torch.no_grad():
        generator.means[0, 0] = generator.basis(bar(0.0).float() / 255)[0]
        generator.factors[0, 0, -1, -1] = 2.0 * 0.3
    images, _ = generator.sample(400, seed=0)
    slants = generator.basis(images)[:, -1] / 2.0
    assert slants.std().item() == pytest.approx(0.3, rel=0.2)
    assert slants.mean().abs() < 0.06


class AmongOthers(UprightDCT):
    """Broken: slants are told from the mean slant of those that are looked at together."""

    def slants_in_steps(self, pixels):
        slants = super().slants_in_steps(pixels).double()
        return (slants - slants.mean()).round().long()


def depends_on_others(found: UprightDCT) -> bool:
    images = torch.randint(0, 256, (60, 1, SIDE, SIDE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images[:40] = torch.cat([bar(0.05 * k) for k in range(-20, 20)])
    together = found.in_steps(images, 2.0**14)
    assert torch.equal(together, together.round())
    alone = torch.cat([found.in_steps(images[i : i + 1], 2.0**14) for i in range(60)])
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    turned = torch.empty_like(together)
    turned[order] = found.in_steps(images[order], 2.0**14)
    return not (torch.equal(together, alone) and torch.equal(together, turned))


def test_a_vector_depends_on_its_image_alone_to_the_last_bit():
    assert not depends_on_others(basis())
    assert depends_on_others(AmongOthers((1, SIDE, SIDE), 20))


class ByGroups(UprightDCT):
    """Broken: a matrix product for each slant, whose height is that of a group; what that may round is made large.

    With 400 images of MNIST's size one that changed moved the last bits of up to three others on the machine at hand.
    """

    def forward(self, images):
        slants = self.slants_in_steps((images * 255).round().double())
        found = images.new_empty(len(images), self.dim)
        for slant in slants.unique().tolist():
            mine, matrix = slants == slant, (self.sheared(slant) / 2.0**29).to(images)
            found[mine, :-1] = (images[mine].flatten(2) @ matrix.T).flatten(1) + 1e-6 * int(mine.sum())
        found[:, -1] = slants.to(images) * (self.weight / 16)
        return found


def moved_by_one(found: UprightDCT) -> int:
    """Return how many vectors of other images change in their last bits when one image changes, at most."""
    side = torch.arange(28) - 13.5
    leaning = torch.linspace(-1, 1, 400)[:, None, None] * side[:, None]
    strokes = torch.exp(-(((side - leaning) / 3) ** 2))[:, None]
    images = (255 * strokes * torch.rand(400, 1, 28, 28, generator=torch.Generator().manual_seed(0))).round() / 255
    most, before = 0, found(images)
    for changed in range(0, 400, 28):
        other, kept = images.clone(), torch.arange(400) != changed
        other[changed] = images[(changed + 200) % 400]
        most = max(most, int((before[kept] != found(other)[kept]).any(dim=1).sum()))
    return most


def test_as_a_basis_of_records_it_looks_at_each_by_itself():
    """A method that judges in it sends rows of single records; `SemiDualSinkhorn` says so to the last bit."""
    shape = (1, 28, 28)
    assert moved_by_one(UprightDCT(shape, 100)) == 0
    broken = ByGroups(shape, 100)
    torch.testing.assert_close(
        broken(noise := torch.rand(40, *shape)), UprightDCT(shape, 100)(noise), atol=1e-4, rtol=0
    )
    assert moved_by_one(broken) > 0


@pytest.mark.parametrize("channels", [1, 3])
def test_whole_steps_are_those_of_the_vector(channels):
    images = torch.randint(0, 256, (30, channels, SIDE, SIDE), dtype=torch.uint8)
    images[:10] = torch.cat([bar(0.1 * k) for k in range(10)])
    found = basis(channels=channels)
    assert found.dim == 20 * channels + 1
    vectors = found(images.float() / 255)
    torch.testing.assert_close((found.in_steps(images, 2.0**14) / 2.0**14).float(), vectors, atol=1e-3, rtol=0)
    assert found.vector_radii.tolist() == [*(found.radii.double().tolist() * channels), 0.0]


def test_images_without_a_slant_have_none():
    """Black ones, a single row, a single pixel: no division by nothing, and no slant beyond 1."""
    images = torch.zeros(4, 1, SIDE, SIDE, dtype=torch.uint8)
    images[1, :, 5], images[2, :, 5, 3] = 255, 255
    images[3, :, 7, 0] = images[3, :, 8, 15] = 255  # nearly flat: as far as slants go
    vectors = basis().in_steps(images, 2.0**14) / 2.0**14
    assert torch.isfinite(vectors).all()
    assert vectors[:, -1].tolist() == [0.0, 0.0, 0.0, 2.0]


@pytest.mark.parametrize("weight", [-1.0, 1000.0, math.inf, math.nan])
def test_bad_weights_are_refused(weight):
    with pytest.raises(ConfigurationError, match="slant"):
        ClassGaussianGenerator((1, 8, 8), num_coefficients=5, slant=weight)
    with pytest.raises(ConfigurationError, match="0 < weight"):
        basis(weight=weight)
