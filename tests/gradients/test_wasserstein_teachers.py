"""Teachers of GS-WGAN: their objective, their turns, and who of them judges."""

import itertools

import pytest
import torch

from lightning_dp.errors import ConfigurationError
from lightning_dp.gradients.discriminator_teachers import NETWORKS, DiscriminatorTeachers
from tests.gradients.test_discriminator_teachers import (
    BATCH,
    CLASSES,
    SHAPE,
    TEACHERS,
    _double,  # noqa: F401  (a fixture)
    fakes_of,
    make_shards,
    make_teachers,
    rows_of,
    run,
    tensors_of,
)


class TestWasserstein:
    """The critics of GS-WGAN: slopes drawn to one, few teachers trained in a round, few that judge."""

    @pytest.mark.usefixtures("_double")
    @pytest.mark.parametrize("network", ["mlp", "small_conv", "gswgan"])
    def test_both_backends_equal_the_formula(self, network):
        loop, stacked = (make_teachers(network, backend, objective="wasserstein") for backend in ("loop", "stacked"))
        parameters = loop.state_dict()["parameters"]
        fakes = fakes_of(torch.arange(CLASSES).repeat(BATCH)).unflatten(0, (BATCH, CLASSES))
        samples, one_hot = loop._round_batch(slice(0, TEACHERS), fakes, 0)
        real, fake = samples.chunk(2, 1)
        shares = torch.tensor([0.0, 0.3, 0.5, 1.0])
        found = [t._backend.training_gradients(parameters, samples, one_hot, shares) for t in (loop, stacked)]
        teacher, module = 3, NETWORKS[network](SHAPE, CLASSES)
        module.load_state_dict({name: stack[teacher] for name, stack in parameters.items()})
        mixed = shares[:, None, None, None] * real[teacher] + (1 - shares[:, None, None, None]) * fake[teacher]
        mixed.requires_grad_()
        slopes = torch.autograd.grad(module(mixed, one_hot[teacher]).sum(), mixed, create_graph=True)[0]
        scores = [module(samples[teacher], one_hot[teacher]) for samples in (real, fake)]
        loss = scores[1].mean() - scores[0].mean() + 10 * (slopes.flatten(1).norm(dim=1) - 1).square().mean()
        loss = loss + 1e-3 * scores[0].square().mean()
        expected = dict(zip(parameters, torch.autograd.grad(loss, list(module.parameters())), strict=True))
        for name, gradient in expected.items():
            for stack in found:
                torch.testing.assert_close(stack[name][teacher], gradient, rtol=1e-6, atol=1e-9)

    def test_rows_climb_the_score(self):
        teachers = make_teachers("mlp", "stacked", objective="wasserstein")
        labels = torch.zeros(2, dtype=torch.int64)
        fakes = fakes_of(labels)
        rows = torch.cat([chunk.values for chunk in teachers.row_chunks(fakes, labels)]).reshape(TEACHERS, *fakes.shape)
        parameters, one_hot = teachers.state_dict()["parameters"], torch.nn.functional.one_hot(labels, CLASSES).float()
        before = teachers._backend.logits(parameters, fakes, one_hot).mean(1)
        after = [
            teachers._backend.logits({k: v[t : t + 1] for k, v in parameters.items()}, fakes + rows[t], one_hot)[0]
            for t in range(TEACHERS)
        ]
        assert (torch.stack(after).mean(1) > before).all()

    def test_batch_statistics_are_refused(self):
        with pytest.raises(ConfigurationError, match="batch statistics"):
            make_teachers("datalens", "loop", objective="wasserstein")


class TestTurns:
    def test_teachers_take_turns_in_public_order_and_see_all_their_records(self):
        shards = make_shards(num=24, teachers=4)
        teachers = make_teachers("mlp", "stacked", shards, num_teachers=4, teachers_per_round=2, batch_size=2)
        seen = []
        original = teachers._round_batch
        teachers._round_batch = lambda chunk, fakes, step: seen.append((chunk, step)) or original(chunk, fakes, step)
        states = [{k: v.clone() for k, v in tensors_of(run(teachers, 1)).items()}]
        for step in (1, 2, 3):
            teachers.train(lambda labels, step=step: fakes_of(labels, step), step=step)
            states.append({k: v.clone() for k, v in tensors_of(teachers).items()})
        assert [chunk for chunk, _ in seen] == [slice(0, 2), slice(2, 4), slice(0, 2), slice(2, 4), slice(0, 2)]
        assert [visit for _, visit in seen] == [0, 0, 1, 1, 2]
        key = ("parameters", "hidden0.weight")
        moved = [
            [t for t in range(4) if not torch.equal(old[key][t], new[key][t])]
            for old, new in itertools.pairwise(states)
        ]
        assert moved == [[0, 1], [2, 3], [0, 1]]

    def test_a_teacher_that_waits_is_the_same_as_one_that_need_not(self):
        """Its Adam has its own count of steps: bias correction follows visits, not rounds."""
        shards = make_shards(num=24, teachers=4)
        waits = make_teachers("mlp", "loop", shards, num_teachers=4, teachers_per_round=2)
        always = make_teachers("mlp", "loop", shards, num_teachers=4)
        for step, turn in ((0, 0), (1, 1), (2, 1), (3, 2), (4, 2)):
            waits.train(lambda labels, turn=turn: fakes_of(labels, turn), step=step)
        run(always, 3)
        for name, stack in waits.state_dict()["parameters"].items():
            torch.testing.assert_close(stack, always.state_dict()["parameters"][name], rtol=1e-6, atol=1e-8)

    @pytest.mark.parametrize("number", [0, 2, 9])
    def test_blocks_that_do_not_divide_are_refused(self, number):
        with pytest.raises(ConfigurationError, match="teachers_per_round to divide"):
            DiscriminatorTeachers("mlp", num_teachers=5, teachers_per_round=number)


class TestJudges:
    @pytest.mark.parametrize("backend", ["loop", "stacked"])
    def test_chosen_teachers_say_what_they_say_among_all(self, backend):
        teachers = run(make_teachers("mlp", backend), 1)
        labels = torch.arange(3) % CLASSES
        fakes, judges = fakes_of(labels, 50), torch.tensor([1, 3, 4])
        chunks = list(teachers.row_chunks(fakes, labels, judges))
        assert torch.cat([chunk.teacher_ids for chunk in chunks]).tolist() == [1, 3, 4]
        torch.testing.assert_close(torch.cat([chunk.values for chunk in chunks]), rows_of(teachers)[judges])
        assert list(teachers.row_chunks(fakes, labels, judges[:0])) == []
