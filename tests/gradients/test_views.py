import torch
import torch.nn.functional as F

from lightning_dp.gradients.views import random_views

IMAGES = torch.rand(5, 2, 6, 7, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([3, 8, 9, 20, 21])


def views(images=IMAGES, ids=IDS, num_views=4, max_shift=2, flip=True, seed=1):
    return random_views(images, ids=ids, num_views=num_views, max_shift=max_shift, flip=flip, seed=seed)


def test_every_view_is_a_shifted_and_maybe_mirrored_copy():
    made = views(num_views=30)
    padded = F.pad(IMAGES, [2] * 4, mode="reflect")
    seen = set()
    for image in range(5):
        crops = {
            (down, across, mirrored): crop.flip(-1) if mirrored else crop
            for down in range(5)
            for across in range(5)
            for mirrored in (False, True)
            for crop in [padded[image, :, down : down + 6, across : across + 7]]
        }
        for view in made[image]:
            found = [key for key, crop in crops.items() if torch.equal(crop, view)]
            assert found
            seen.update(found)
    assert len(seen) > 40  # of 50


def test_no_shift_and_no_flip_are_copies():
    assert torch.equal(views(max_shift=0, flip=False), IMAGES.unsqueeze(1).expand(-1, 4, -1, -1, -1))


def test_a_records_views_do_not_depend_on_the_batch():
    """The broken twin draws views in the order of the batch: a record that joins would change everybody's gradients."""
    assert torch.equal(views(IMAGES[[4, 1]], IDS[[4, 1]]), views()[[4, 1]])


def test_steps_and_records_have_views_of_their_own():
    same = IMAGES[:1].expand(5, -1, -1, -1)
    made = views(same)
    assert not torch.equal(made[0], made[1])
    assert not torch.equal(views(seed=2), views())


def test_no_records_make_no_views():
    assert views(IMAGES[:0], IDS[:0]).shape == (0, 4, 2, 6, 7)
