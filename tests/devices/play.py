"""Train small runs twice, on the CPU and on a pretended device (or a real one), and print how far parameters differ.

    python -m tests.devices.play [--device cuda] NAME...

In a process of its own, because a device cannot be taken out of PyTorch again.
"""

import copy
import json
import sys
import tempfile
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.strategies import SingleDeviceStrategy

from callbacks import GradientPrivatizer, PrivacyAccountant
from lightning_dp.gradients.discriminator_teachers import DiscriminatorTeachers
from lightning_dp.mechanisms.adaptive import AdaptiveGaussian
from lightning_dp.mechanisms.gaussian import Gaussian
from lightning_dp.mechanisms.gnmax import GNMax
from lightning_dp.mechanisms.topagg import TopAgg
from lightning_dp.mechanisms.von_mises_fisher import VonMisesFisher
from lightning_dp.modules.teacher_gan import TeacherEnsembleGAN
from tests.conftest import TinyData, settings, tiny_discriminator_gan, tiny_generator, trainer_for
from tests.devices.pretend import NAME, PretendAccelerator, pretended
from tests.distributed.runs import CASES, Case
from tests.modules.test_dpsgd import tiny_dpsgd
from tests.modules.test_semi_dual import tiny_semi_dual

STEPS = 3
STRAY = "a stray tensor"


def convolutional_gan(backend: Any, **options: Any) -> TeacherEnsembleGAN:
    torch.manual_seed(0)
    fixed: dict[str, Any] = {"num_teachers": 4, "batch_size": 5, "train_steps": 2, "pretrain_steps": 1, "chunk_size": 3}
    teachers = DiscriminatorTeachers("datalens", backend=backend, **fixed, **options)
    return TeacherEnsembleGAN(tiny_generator(), teachers, images_per_step=6, public_seed=0)


def stray() -> Any:
    """Labels that were left on the CPU."""
    module = tiny_dpsgd()
    module.labels_of = lambda ids: torch.zeros(len(ids), dtype=torch.int64)
    return module


MORE: dict[str, Case] = {
    STRAY: Case(stray, Gaussian()),
    "stacked convolutions": Case(lambda: convolutional_gan("stacked"), TopAgg(top_k=4), "replace_one"),
    "looped convolutions": Case(lambda: convolutional_gan("loop"), TopAgg(top_k=4), "replace_one"),
    "lent teachers": Case(lambda: convolutional_gan("stacked", state="host"), TopAgg(top_k=4), "replace_one"),
    "semi-dual": Case(tiny_semi_dual, Gaussian()),
    "adaptive clipping": Case(tiny_dpsgd, AdaptiveGaussian()),
    "clipping by layer": Case(tiny_dpsgd, Gaussian(clipping="per_layer")),
    "functorch": Case(lambda: tiny_dpsgd(gradients="functorch"), Gaussian()),
    "GNMax": Case(tiny_discriminator_gan, GNMax(num_projections=3), "replace_one"),
    "directions": Case(tiny_discriminator_gan, VonMisesFisher(), "replace_one"),
    "directions of rows": Case(tiny_discriminator_gan, VonMisesFisher(form="per_unit"), "replace_one"),
}


def train(case: Case, device: torch.device | None, folder: Path) -> dict[str, torch.Tensor]:
    """Return the parameters after a few releases."""
    price: dict[str, Any] = {} if case.warm else {"target_epsilon": None, "noise_multiplier": 8.0}
    privacy = settings(neighboring_relation=case.relation, insecure_seed=3, **price)
    accountant = PrivacyAccountant(privacy=privacy, ledger_path=folder / f"{device}.jsonl")
    warm = case.warm() if case.warm is not None else None
    mechanism = copy.deepcopy(case.mechanism)  # some adapt
    privatizer = GradientPrivatizer(mechanism=mechanism, accountant=accountant, warm_start=warm)
    options: dict[str, Any] = {}
    if device is not None and device.type == NAME:
        there = SingleDeviceStrategy(device=device, accelerator=PretendAccelerator())
        options = {"strategy": there, "accelerator": "auto"}
    elif device is not None:
        options = {"accelerator": device.type}
    module = case.make()
    trainer = trainer_for(folder, [privatizer, accountant], min(STEPS, case.steps), **options)
    trainer.fit(module, datamodule=TinyData())
    teachers = getattr(module, "teachers", None)
    if isinstance(teachers, DiscriminatorTeachers):
        stacks = teachers.state_dict()["exp_avg"].values()
        assert {stack.device.type for stack in stacks} == {
            "cpu" if device is None or teachers.state == "host" else device.type
        }
    return {
        name: value.detach().cpu() for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)
    }


def difference(case: Case, device: torch.device) -> float:
    """Return how far parameters of the two runs are apart at most."""
    with tempfile.TemporaryDirectory() as folder:
        alone, there = train(case, None, Path(folder)), train(case, device, Path(folder))
    assert alone.keys() == there.keys()
    return max(float((there[name].double() - value.double()).abs().max()) for name, value in alone.items())


def main(names: list[str]) -> None:
    """Print a JSON object: a difference for each name (all of them if none is given), or an error."""
    torch.set_num_threads(1)
    real = torch.device(names[1]) if names[:1] == ["--device"] else None
    cases, found = {**CASES, **MORE}, dict[str, float | str]()
    for name in (names[2:] if real else names) or cases:
        with pretended() if real is None else nullcontext(real) as device:
            try:
                found[name] = difference(cases[name], device)
            except Exception:
                found[name] = traceback.format_exc()
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
