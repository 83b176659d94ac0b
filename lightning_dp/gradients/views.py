"""Random views of records, for augmentation multiplicity: each record's views depend on its id and the step alone."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dp.mechanisms.keyed import keyed_uniform


def random_views(images: Tensor, *, ids: Tensor, num_views: int, max_shift: int, flip: bool, seed: int) -> Tensor:
    """Return shifted and mirrored copies of each image.

    The draws are keyed by the record's id and the seed: a record that joins or leaves a batch changes nobody else's
    views, so that averaging them costs no privacy (De et al. 2022, Section 3.3). Where ids are positions in a file, the
    seed has to be secret (`PoissonModule.record_seed`).

    Args:
        images: (n, C, H, W).
        ids: Stable record ids, int64, (n,).
        num_views: Views of each image, >= 1.
        max_shift: Largest shift in pixels; what enters at the border mirrors the edge.
        flip: Whether views are mirrored left to right with probability 1/2.
        seed: Seed of the step.

    Returns:
        (n, num_views, C, H, W).
    """
    num, _, height, width = images.shape
    if not num:
        return images.unsqueeze(1).expand(-1, num_views, -1, -1, -1)
    draws = keyed_uniform(torch.Size((num, num_views, 3)), seed=seed, row_ids=ids.to(images.device), first_vector=0)
    shifts = (draws[..., :2] * (2 * max_shift + 1)).long()  # (n, K, 2), in 0 .. 2 max_shift
    padded = F.pad(images, [max_shift] * 4, mode="reflect") if max_shift else images
    rows = shifts[..., :1] + torch.arange(height, device=images.device)  # (n, K, H)
    columns = torch.arange(width, device=images.device).expand(num, num_views, -1)
    if flip:
        columns = torch.where(draws[..., 2:] < 0.5, columns.flip(-1), columns)
    columns = shifts[..., 1:] + columns  # (n, K, W)
    which = torch.arange(num, device=images.device)[:, None, None, None]
    return padded[which, :, rows.unsqueeze(3), columns.unsqueeze(2)].movedim(-1, 2)  # gathered as (n, K, H, W, C)
