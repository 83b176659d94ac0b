import torch

from lightning_dp.networks.texture import sharpened, textured


def test_edges_are_raised_and_flat_parts_left():
    images = torch.full((2, 1, 6, 6), 0.25)
    images[:, :, :, 3:] = 0.5
    found = sharpened(images, 2.0)
    assert torch.equal(found[..., [0, 1, 4, 5]], images[..., [0, 1, 4, 5]])
    torch.testing.assert_close(found[..., 2], torch.full_like(found[..., 2], 0.25 - 2 * 0.25 / 4))
    torch.testing.assert_close(found[..., 3], torch.full_like(found[..., 3], 0.5 + 2 * 0.25 / 4))


def test_texture_is_on_light_pixels_alone_and_within_range():
    images = torch.cat([torch.full((1, 1, 6, 6), 0.02), torch.full((1, 1, 6, 6), 0.95)])
    dark, light = textured(images, torch.randn(2, 36), 0.1)
    assert torch.equal(dark, images[0])
    assert light.max() <= 1
    assert light.std() > 0
