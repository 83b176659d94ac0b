import copy
import math

import pytest
import torch
from torch.func import vmap

from lightning_dp.errors import ConfigurationError
from lightning_dp.gradients.dense_backend import DenseBackend
from lightning_dp.gradients.discriminator_teachers import NETWORKS, DiscriminatorTeachers, choose_backend
from lightning_dp.gradients.teacher_backends import StackedBackend
from lightning_dp.gradients.teachers import TeacherShards
from lightning_dp.losses.adversarial import discriminator_loss, generator_loss

SHAPE, CLASSES, TEACHERS, BATCH = (1, 8, 8), 3, 5, 4
SMALL = ("datalens", "small_conv", "mlp")
ALL = [(network, backend) for network in SMALL for backend in ("loop", "stacked")]


@pytest.fixture
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make_shards(num=TEACHERS * BATCH + 2, teachers=TEACHERS):
    source = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (num, *SHAPE), generator=source, dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (num,), generator=source)
    return TeacherShards(images, labels, torch.arange(num) % teachers, teachers)


def make_teachers(network, backend, shards=None, **settings):
    settings = {"num_teachers": TEACHERS, "batch_size": BATCH, "pretrain_steps": 3, "chunk_size": 2} | settings
    teachers = DiscriminatorTeachers(network, backend=backend, **settings)
    shards = make_shards() if shards is None else shards
    teachers.bind(shards, num_classes=CLASSES, image_shape=SHAPE, device="cpu", seed=7)
    return teachers


def fakes_of(labels, step=0):
    source = torch.Generator().manual_seed(100 + step)
    return torch.rand(labels.shape[0], *SHAPE, generator=source)


def run(teachers, rounds=2):
    for step in range(rounds):
        teachers.train(lambda labels, step=step: fakes_of(labels, step), step=step)
    return teachers


def rows_of(teachers, num_images=3):
    labels = torch.arange(num_images) % CLASSES
    chunks = list(teachers.row_chunks(fakes_of(labels, 50), labels))
    assert torch.equal(torch.cat([chunk.teacher_ids for chunk in chunks]), torch.arange(teachers.num_teachers))
    assert all(chunk.queries == slice(0, num_images) for chunk in chunks)
    return torch.cat([chunk.values for chunk in chunks])


def tensors_of(teachers):
    state = teachers.state_dict()
    return {
        (kind, name): stack for kind in ("parameters", "exp_avg", "exp_avg_sq") for name, stack in state[kind].items()
    }


def reference(network, steps_per_round):
    """Every teacher as its own module with its own torch.optim.Adam: the plainest form of the specification."""
    start, shards = make_teachers(network, "loop"), make_shards()
    parameters, rows = [], []
    for teacher in range(TEACHERS):
        module = NETWORKS[network](SHAPE, CLASSES)
        module.load_state_dict({name: stack[teacher] for name, stack in start.state_dict()["parameters"].items()})
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-3, betas=(0.5, 0.999), foreach=False)
        for step, repeats in enumerate(steps_per_round):
            own = torch.nonzero(shards.assignment == teacher).flatten()
            own = own[(step * BATCH + torch.arange(BATCH)) % len(own)]
            labels = shards.labels[own]
            one_hot = torch.nn.functional.one_hot(labels, CLASSES).to(torch.get_default_dtype())
            table = fakes_of(torch.arange(CLASSES).repeat(BATCH), step).unflatten(0, (BATCH, CLASSES))
            fake = torch.stack([table[place, label] for place, label in enumerate(labels)])
            for _ in range(repeats):
                optimizer.zero_grad()
                real = shards.images[own].to(fake.dtype) / 255
                discriminator_loss(module(real, one_hot), module(fake, one_hot)).backward()
                optimizer.step()
        labels = torch.arange(3) % CLASSES
        fakes = fakes_of(labels, 50).requires_grad_()
        one_hot = torch.nn.functional.one_hot(labels, CLASSES).to(fakes.dtype)
        generator_loss(module(fakes, one_hot)).backward()
        rows.append(-fakes.grad.flatten(1))
        parameters.append(dict(module.named_parameters()))
    return parameters, torch.stack(rows)


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize(("network", "backend"), ALL)
def test_both_backends_equal_separate_modules_with_separate_optimizers(network, backend):
    parameters, rows = reference(network, steps_per_round=(3, 2))  # 5 Adam steps
    teachers = run(make_teachers(network, backend))
    assert teachers.state_dict()["rounds"] == 2
    for name, stack in teachers.state_dict()["parameters"].items():
        torch.testing.assert_close(stack, torch.stack([own[name] for own in parameters]), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(rows_of(teachers), rows, rtol=1e-5, atol=1e-12)


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("network", SMALL)
def test_losses_and_gradients_of_the_backends_agree(network):
    fakes = fakes_of(torch.arange(CLASSES).repeat(BATCH)).unflatten(0, (BATCH, CLASSES))
    loop, stacked = make_teachers(network, "loop"), make_teachers(network, "stacked")
    parameters = loop.state_dict()["parameters"]
    samples, one_hot = loop._round_batch(slice(0, TEACHERS), fakes, 0)
    losses = []
    for teacher in range(TEACHERS):
        loop._backend._load(parameters, teacher)
        judged = [loop._backend.network(half, one_hot[teacher]) for half in samples[teacher].chunk(2)]
        losses.append(discriminator_loss(*judged))
    stacked_losses = vmap(stacked._backend._training_loss)(parameters, samples, one_hot)
    torch.testing.assert_close(stacked_losses, torch.stack(losses), rtol=1e-5, atol=0)
    by_loop = loop._backend.training_gradients(parameters, samples, one_hot)
    by_stack = stacked._backend.training_gradients(parameters, samples, one_hot)
    for name, gradient in by_loop.items():
        torch.testing.assert_close(by_stack[name], gradient, rtol=1e-5, atol=1e-12)


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("objective", ["non_saturating", "wasserstein"])
def test_dense_layers_by_hand_equal_their_derivatives(objective):
    torch.manual_seed(2)
    network = NETWORKS["mlp"](SHAPE, CLASSES)
    parameters = {name: torch.randn(TEACHERS, *values.shape) / 5 for name, values in network.named_parameters()}
    samples, one_hot = torch.rand(TEACHERS, 2 * BATCH, *SHAPE), torch.eye(CLASSES)[torch.arange(BATCH) % CLASSES]
    by_hand, derived = (kind(network, objective=objective) for kind in (DenseBackend, StackedBackend))
    for num in (2, TEACHERS, 3):  # the memory that is kept serves fewer and more teachers
        own = {name: values[:num] for name, values in parameters.items()}
        given = own, samples[:num], one_hot.expand(num, -1, -1), torch.rand(BATCH)
        expected = derived.training_gradients(*given)
        for name, gradient in by_hand.training_gradients(*given).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-13)
    for what in ("logits", "descent_directions"):
        found = [getattr(one, what)(parameters, samples[0, :BATCH], one_hot) for one in (by_hand, derived)]
        torch.testing.assert_close(*found, rtol=1e-10, atol=1e-13)


def test_dense_layers_are_worked_out_by_hand_where_teachers_are_stacked():
    assert type(make_teachers("mlp", "auto")._backend) is DenseBackend
    assert type(make_teachers("small_conv", "stacked")._backend) is StackedBackend


def test_a_teacher_that_is_sure_learns_on():
    """The slope of softplus is tiny far out and no zero, as sigmoid - 1 is in single precision."""
    backend = DenseBackend(NETWORKS["mlp"](SHAPE, CLASSES))
    parameters = {name: torch.zeros(1, *values.shape) for name, values in backend.network.named_parameters()}
    for name, total in (("hidden0.weight", 1.0), ("hidden1.weight", 1.0), ("head.weight", 60.0)):
        parameters[name] += total / parameters[name].shape[2]
    parameters["head.bias"] -= 30
    samples, one_hot = torch.stack([torch.ones(SHAPE), torch.zeros(SHAPE)])[None], torch.eye(CLASSES)[None, :1]
    gradient = backend.training_gradients(parameters, samples, one_hot)["head.weight"][0, 0]  # logits 30 and -30
    torch.testing.assert_close(gradient, torch.full_like(gradient, -math.exp(-30)), rtol=1e-4, atol=0)


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize(("network", "backend"), ALL)
def test_chunk_size_changes_nothing(network, backend):
    whole, parts = (run(make_teachers(network, backend, chunk_size=size)) for size in (TEACHERS, 1))
    for key, stack in tensors_of(whole).items():
        torch.testing.assert_close(stack, tensors_of(parts)[key], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(rows_of(whole), rows_of(parts), rtol=1e-6, atol=1e-11)


@pytest.mark.parametrize("network", SMALL)
def test_state_moves_between_backends_and_resumes(network):
    first = run(make_teachers(network, "loop"))
    second = make_teachers(network, "stacked")
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    torch.testing.assert_close(rows_of(first), rows_of(second), rtol=1e-4, atol=1e-7)
    third = make_teachers(network, "loop")
    third.load_state_dict(copy.deepcopy(first.state_dict()))
    for teachers in (first, third):
        teachers.train(lambda labels: fakes_of(labels, 9), step=2)
    assert all(torch.equal(stack, tensors_of(third)[key]) for key, stack in tensors_of(first).items())
    assert third.state_dict()["rounds"] == 3  # no second pretraining


def test_teachers_start_apart_and_reproducibly():
    first, second = make_teachers("mlp", "loop"), make_teachers("mlp", "stacked", chunk_size=5)
    for key, stack in tensors_of(first).items():
        assert torch.equal(stack, tensors_of(second)[key])
    weights = first.state_dict()["parameters"]["hidden0.weight"]
    assert not torch.equal(weights[0], weights[1])


def test_building_teachers_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    make_teachers("small_conv", "loop")
    # The first template network draws from the global stream as any module does; nothing else may.
    torch.set_rng_state(before)
    NETWORKS["small_conv"](SHAPE, CLASSES)
    after_template = torch.get_rng_state()
    torch.set_rng_state(before)
    make_teachers("small_conv", "loop")
    assert torch.equal(torch.get_rng_state(), after_template)


def test_generator_is_asked_once_per_round_with_public_labels_only():
    seen = []
    for flip in (0, 1):
        shards = make_shards()
        teachers = make_teachers(
            "mlp", "loop", TeacherShards(shards.images, (shards.labels + flip) % CLASSES, shards.assignment, TEACHERS)
        )
        teachers.train(lambda labels: (seen.append(labels.clone()), fakes_of(labels))[1], step=0)
    assert len(seen) == 2
    assert torch.equal(seen[0], seen[1])
    assert seen[0].tolist() == list(range(CLASSES)) * BATCH


def test_rows_carry_the_batch_mean():
    teachers = make_teachers("mlp", "loop")
    labels = torch.zeros(1).long()
    fakes = fakes_of(labels)
    once = torch.cat([chunk.values for chunk in teachers.row_chunks(fakes, labels)])
    twice = torch.cat([c.values for c in teachers.row_chunks(fakes.repeat(2, 1, 1, 1), labels.repeat(2))])
    torch.testing.assert_close(twice[:, :1], once / 2)
    assert once.shape == (TEACHERS, 1, 64)


def test_teachers_judge_encoded_records():
    basis = torch.rand(64, 6)
    teachers = DiscriminatorTeachers("mlp", num_teachers=TEACHERS, batch_size=BATCH)
    teachers.bind(
        make_shards(),
        num_classes=CLASSES,
        image_shape=SHAPE,
        device="cpu",
        seed=0,
        encode=lambda x: x.flatten(1) @ basis,
    )
    teachers.train(lambda labels: torch.rand(labels.shape[0], 6), step=0)
    labels = torch.arange(2)
    assert next(teachers.row_chunks(torch.rand(2, 6), labels)).values.shape[1:] == (2, 6)


def test_automatic_choice_follows_the_measurements():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    chosen = {network: choose_backend(network, cpu) for network in SMALL}
    assert chosen == {"datalens": "loop", "small_conv": "loop", "mlp": "stacked"}
    assert {choose_backend(network, cuda) for network in NETWORKS} == {"stacked"}
    assert {network: make_teachers(network, "auto").chosen_backend for network in SMALL} == chosen


def test_automatic_chunk_keeps_to_the_memory_budget(monkeypatch):
    teachers = make_teachers("mlp", "stacked", chunk_size=None)
    assert [chunk.stop for chunk in teachers._chunks(8, slice(0, 5))] == [5]
    monkeypatch.setattr("lightning_dp.gradients.chunk_sizes.CPU_MEMORY_BUDGET", 1)
    teachers = make_teachers("mlp", "stacked", chunk_size=None)
    assert [chunk.stop for chunk in teachers._chunks(8, slice(0, 5))] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"network": "resnet"}, r"network to be one of datalens, gswgan, small_conv, mlp, got network='resnet'"),
        ({"backend": "gpu"}, r"backend to be one of auto, loop, stacked"),
        ({"num_teachers": 0}, r"num_teachers >= 1"),
        ({"chunk_size": 0}, r"chunk_size >= 1"),
        ({"train_steps": 0}, r"train_steps >= 1"),
        ({"learning_rate": float("nan")}, r"learning_rate=nan"),
        ({"betas": (0.5, 1.0)}, r"betas in \[0, 1\)"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        DiscriminatorTeachers(**({"num_teachers": 3} | settings))


def test_shards_that_do_not_fit_are_refused():
    with pytest.raises(ConfigurationError, match=r"num_teachers=4, got shards\.num_teachers=5"):
        make_teachers("mlp", "loop", num_teachers=4)
    with pytest.raises(ConfigurationError, match=r"at least 2 records per teacher.*datalens"):
        make_teachers("datalens", "loop", make_shards(num=TEACHERS))
    teachers = DiscriminatorTeachers("mlp", num_teachers=TEACHERS)
    with pytest.raises(ConfigurationError, match="num_classes=1"):
        teachers.bind(make_shards(), num_classes=1, image_shape=SHAPE, device="cpu", seed=0)
    with pytest.raises(RuntimeError, match=r"Call bind\(\) first"):
        teachers.state_dict()


def test_checkpoint_of_another_ensemble_is_refused():
    teachers = make_teachers("mlp", "loop")
    with pytest.raises(ConfigurationError, match="checkpoint with shapes"):
        teachers.load_state_dict(make_teachers("small_conv", "loop").state_dict())


def test_fakes_of_another_shape_are_refused():
    teachers = make_teachers("datalens", "loop")
    with pytest.raises(ValueError, match=r"at least 2 fakes of shape \(1, 8, 8\)"):
        list(teachers.row_chunks(torch.rand(1, *SHAPE), torch.zeros(1).long()))
    with pytest.raises(ValueError, match=r"fakes.shape=\(2, 64\)"):
        list(teachers.row_chunks(torch.rand(2, 64), torch.zeros(2).long()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize(("network", "backend"), ALL)
def test_a_gpu_gives_what_the_cpu_gives(network, backend):
    results = []
    for device in ("cpu", "cuda"):
        teachers = DiscriminatorTeachers(network, num_teachers=TEACHERS, batch_size=BATCH, backend=backend)
        teachers.bind(make_shards(), num_classes=CLASSES, image_shape=SHAPE, device=device, seed=7)
        for step in range(2):
            teachers.train(lambda labels, step=step: fakes_of(labels, step).to(labels.device), step=step)
        labels = torch.arange(3) % CLASSES
        rows = [chunk.values for chunk in teachers.row_chunks(fakes_of(labels).to(device), labels.to(device))]
        results.append(torch.cat(rows).cpu())
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-10)


def test_state_in_files_changes_nothing_and_leaves_nothing_behind(tmp_path):
    in_memory, in_files = (run(make_teachers("mlp", "stacked", state_dir=where)) for where in (None, str(tmp_path)))
    for name, stack in tensors_of(in_memory).items():
        assert torch.equal(stack, tensors_of(in_files)[name])
    assert list(tmp_path.iterdir()) == []


def test_state_in_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="state_dir"):
        make_teachers("mlp", "stacked", state_dir=str(tmp_path / "missing"))


@pytest.mark.parametrize("backend", ["loop", "stacked"])
def test_bfloat16_is_for_computing_and_for_nothing_that_stays(backend):
    plain, low = (make_teachers("mlp", backend, compute=compute) for compute in ("float32", "bfloat16"))
    rows, exact = rows_of(low), rows_of(plain)
    assert rows.dtype == torch.float32
    assert 0 < float((rows - exact).norm() / exact.norm()) < 0.1
    assert all(stack.dtype == torch.float32 for stack in tensors_of(run(low)).values())


def test_an_unknown_precision_is_refused():
    with pytest.raises(ConfigurationError, match="compute"):
        make_teachers("mlp", "loop", compute="float16")
