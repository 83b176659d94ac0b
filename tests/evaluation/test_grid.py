import matplotlib.image
import pytest
import torch

from lightning_dp.errors import ConfigurationError
from lightning_dp.evaluation.grid import sample_grid, save_sample_grid


def test_rows_are_classes_in_order():
    labels = torch.tensor([2, 0, 1, 0])
    images = (labels.float() / 2 * 0.8).view(4, 1, 1, 1).expand(4, 1, 5, 6)
    grid = sample_grid(images, labels, per_class=2)
    assert grid.shape == (3 * 7 + 2, 2 * 8 + 2, 3)
    for row, level in enumerate((0, 102, 204)):
        assert (grid[row * 7 + 2 : row * 7 + 7, 2:8] == level).all()
    assert (grid[9:14, 10:16] == 255).all()  # class 1 has one image: the rest of its row is empty
    assert (grid[2:7, 10:16] == 0).all()


def test_png_holds_the_pixels(tmp_path):
    images, labels = torch.rand(6, 3, 4, 4), torch.arange(6) % 2
    path = save_sample_grid(tmp_path / "grid.png", images, labels, per_class=3, num_classes=3, scale=2)
    read = (torch.from_numpy(matplotlib.image.imread(path))[..., :3] * 255).round().to(torch.uint8)
    expected = sample_grid(images, labels, per_class=3, num_classes=3)
    assert read.shape == (2 * expected.shape[0], 2 * expected.shape[1], 3)
    assert torch.equal(read[::2, ::2], expected)


def test_wrong_inputs(tmp_path):
    images, labels = torch.rand(4, 1, 4, 4), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ConfigurationError, match="sample grid, got"):
        sample_grid(images, labels[:3])
    with pytest.raises(ConfigurationError, match="NaN"):
        sample_grid(images * torch.nan, labels)
    with pytest.raises(ConfigurationError, match="per_class=0"):
        sample_grid(images, labels, per_class=0)
    with pytest.raises(ConfigurationError, match="scale=0"):
        save_sample_grid(tmp_path / "grid.png", images, labels, scale=0)
    with pytest.raises(ConfigurationError, match="writable file"):
        save_sample_grid(tmp_path / "absent" / "grid.png", images, labels)
