import pytest
import torch
from scipy.fft import dctn

from lightning_dp.errors import ConfigurationError
from lightning_dp.networks.basis import LowFrequencyDCT, dct_matrix, lowest_frequencies
from lightning_dp.networks.dct import DCTGenerator
from lightning_dp.networks.ema import ExponentialMovingAverage


def test_basis_is_the_orthonormal_cosine_transform_of_scipy():
    images = torch.rand(3, 2, 8, 8)
    coefficients = LowFrequencyDCT((2, 8, 8), num_coefficients=20)(images).view(3, 2, 20)
    expected = dctn(images.numpy(), axes=(2, 3), norm="ortho")
    for index, (down, across) in enumerate(lowest_frequencies(8, 20)):
        torch.testing.assert_close(
            coefficients[..., index], torch.from_numpy(expected[..., down, across]), atol=1e-5, rtol=0
        )


def test_rows_are_orthonormal_also_in_a_window():
    for window in (8, 5):
        rows = dct_matrix(8, window * window, window)
        torch.testing.assert_close(rows @ rows.T, torch.eye(window * window), atol=1e-6, rtol=0)


def test_a_window_sees_nothing_outside_itself():
    image = torch.zeros(1, 1, 8, 8)
    image[..., 0, :] = 1
    assert LowFrequencyDCT((1, 8, 8), 9, window=4)(image).abs().max() == 0


def test_frequencies_come_in_order_of_radius():
    pairs = lowest_frequencies(4, 16)
    assert pairs[:3] == [(0, 0), (0, 1), (1, 0)]
    radii = [down**2 + across**2 for down, across in pairs]
    assert radii == sorted(radii)


@pytest.mark.parametrize(
    "arguments", [((1, 8, 6), 4, None), ((1, 8, 8), 65, None), ((1, 8, 8), 17, 4), ((1, 8, 8), 4, 9)]
)
def test_bases_that_do_not_fit_are_refused(arguments):
    with pytest.raises(ConfigurationError, match="square images"):
        LowFrequencyDCT(*arguments)


def make(**options) -> DCTGenerator:
    torch.manual_seed(0)
    defaults = {"num_classes": 3, "latent_dim": 4, "num_coefficients": 12, "width": 5}
    return DCTGenerator((1, 8, 8), **{**defaults, **options})


def test_images_lie_in_the_unit_range_and_follow_the_label():
    generator = make()
    latent = torch.randn(1, 4).expand(3, 4)
    images = generator(latent, torch.arange(3))
    assert images.shape == (3, 1, 8, 8)
    assert 0 <= images.min() <= images.max() <= 1
    assert (images[0] - images[1]).abs().max() > 1e-3


def test_each_image_depends_on_its_own_latent_and_label_only():
    """The factors are applied class by class; the order of the batch must not matter."""
    generator = make()
    latent, labels = torch.randn(20, 4), torch.randint(3, (20,))
    whole = generator(latent, labels)
    order = torch.randperm(20)
    torch.testing.assert_close(generator(latent[order], labels[order]), whole[order])
    torch.testing.assert_close(generator(latent[4:5], labels[4:5]), whole[4:5])


def test_only_parameters_are_saved_and_options_rebuild_the_network():
    generator = make(background=-1.0)
    assert set(generator.state_dict()) == {name for name, _ in generator.named_parameters()}
    again = DCTGenerator(**generator.options())
    again.load_state_dict(generator.state_dict())
    latent, labels = torch.randn(4, 4), torch.tensor([0, 1, 2, 0])
    assert torch.equal(again(latent, labels), generator(latent, labels))


def test_groups_cover_every_parameter_once():
    generator = make(mlp_learning_rate_share=0.25)
    groups = generator.parameter_groups(0.4)
    listed = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(listed) == sorted(id(parameter) for parameter in generator.parameters())
    assert [group["lr"] for group in groups] == [0.4, 0.1]


def test_samples_are_reproducible_balanced_and_leave_the_global_stream_alone():
    generator = make()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    images, labels = generator.sample(7, seed=5)
    assert torch.equal(before, torch.get_rng_state())
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert torch.equal(images, generator.sample(7, seed=5)[0])
    assert not torch.equal(images, generator.sample(7)[0])


def test_moving_average_follows_with_a_warm_up():
    """De et al.: the decay is min(decay, (1 + t) / (10 + t)); 0.1 at first, 0.91 at update 90."""
    network = torch.nn.Linear(1, 1, bias=False)
    network.weight.data.fill_(0.0)
    average = ExponentialMovingAverage(network, decay=0.95)
    network.weight.data.fill_(1.0)
    average.update(network)
    assert average.network.weight.item() == pytest.approx(0.9)
    average.num_updates = 90
    average.network.weight.data.fill_(0.0)
    average.update(network)
    assert average.network.weight.item() == pytest.approx(0.09)


def test_nothing_is_written_outside_the_window():
    generator = make(window=4, outside=0.25)
    images = generator(torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))
    assert torch.equal(images[..., :2, :], torch.full((5, 1, 2, 8), 0.25))
    assert torch.equal(images[..., 2:6, 6:], torch.full((5, 1, 4, 2), 0.25))
    assert images[..., 2:6, 2:6].std() > 1e-3


@pytest.mark.parametrize("options", [{"num_coefficients": 65}, {"window": 9}, {"window": 3}, {"latent_dim": 0}])
def test_generators_that_do_not_fit_are_refused(options):
    with pytest.raises(ConfigurationError, match="Expected"):
        make(**options)


def drawn(generator: DCTGenerator, num: int = 600) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return generator.sample(num, seed=3)


def test_moments_of_samples_are_matched_without_a_step():
    """The twin that starts at random is several times as far off in the mean image of a class."""
    torch.manual_seed(1)
    teacher = make(latent_dim=6, background=0.0)
    with torch.no_grad():
        teacher.means.normal_(std=0.7)
        teacher.factors.mul_(0.5)
    teacher.match_moments(*drawn(teacher))  # its MLP, too, adds nothing then
    images, labels = drawn(teacher)
    pupil = make(latent_dim=6, background=0.0)

    def errors() -> tuple[float, float]:
        fakes, of = drawn(pupil)
        means = [(fakes[of == c].mean(0) - images[labels == c].mean(0)).abs().mean() for c in range(3)]
        stds = [(fakes[of == c].std(0) - images[labels == c].std(0)).abs().mean() for c in range(3)]
        return float(max(means)), float(max(stds))

    before = errors()
    pupil.match_moments(images, labels)
    after = errors()
    assert after[0] < 0.2 * before[0]
    assert after[1] < 0.5 * before[1]
    assert after[0] < 0.02


def test_classes_without_samples_keep_what_they_have():
    generator = make(window=6)
    images, labels = drawn(generator, 60)
    before = generator.means.detach().clone(), generator.factors.detach().clone()
    some = labels != 1
    generator.match_moments(images[some][:4], labels[some][:4])  # fewer samples than latent numbers, too
    assert torch.equal(generator.means[1], before[0][1])
    assert torch.equal(generator.factors[1], before[1][1])
    assert not torch.equal(generator.means[0], before[0][0])
    assert all(torch.isfinite(value).all() for value in generator.state_dict().values())


def test_texture_is_in_samples_alone_and_repeatable():
    plain, textured = (DCTGenerator((1, 8, 8), num_classes=2, num_coefficients=9, texture=t) for t in (0.0, 0.2))
    textured.load_state_dict(plain.state_dict())
    latent, labels = plain.sample_latent(6, torch.Generator().manual_seed(1)), torch.arange(6) % 2
    assert torch.equal(plain(latent, labels), textured(latent, labels))
    (images, _), (same, _), (without, _) = (g.sample(6, seed=3) for g in (textured, textured, plain))
    assert torch.equal(images, same)
    assert 0.05 < (images - without).std() < 0.2
    with pytest.raises(ConfigurationError, match="texture"):
        DCTGenerator((1, 8, 8), num_coefficients=9, texture=-0.1)
