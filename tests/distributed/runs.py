"""Small runs of every kind of contribution, and what a process remembers of one."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from callbacks import GradientPrivatizer, PrivacyAccountant, PrivateCheckpoint
from callbacks.private_ddp import STRATEGY
from lightning_dp.gradients.ranks import Ranks
from lightning_dp.mechanisms.base import Mechanism
from lightning_dp.mechanisms.gaussian import Gaussian
from lightning_dp.mechanisms.no_privacy import NoPrivacy
from lightning_dp.mechanisms.noise import NoiseSource
from lightning_dp.mechanisms.topagg import TopAgg
from lightning_dp.modules.warm_start import WarmStart
from tests.conftest import TinyData, settings, tiny_discriminator_gan, tiny_gan, trainer_for
from tests.modules.test_dpgan import tiny_dpgan
from tests.modules.test_dpsgd import tiny_dpsgd
from tests.modules.test_gswgan import tiny_gswgan
from tests.modules.test_merf import tiny_module as tiny_merf
from tests.modules.test_moments import tiny_module as tiny_moments
from tests.modules.test_pate_gan import tiny_pate
from tests.modules.test_sinkhorn import tiny_sinkhorn
from tests.modules.test_vae import tiny_vae
from tests.modules.test_warm_start import by_transport, warm_start

STEPS = 20


@dataclass(frozen=True)
class Case:
    """A kind of contribution.

    Attributes:
        make: Builds the method.
        mechanism: Makes it private.
        relation: Of the claim.
        exact: Whether its sums are whole numbers or lie on a grid, so that processes change not one bit.
        warm: What is released first.
        steps: Releases.
    """

    make: Callable[[], Any]
    mechanism: Mechanism
    relation: str = "add_or_remove_one"
    exact: bool = False
    warm: Callable[[], WarmStart] | None = None
    steps: int = STEPS


CASES: dict[str, Case] = {
    "energy teachers": Case(
        lambda: tiny_gan(ema_decay=0.9), TopAgg(top_k=4, rotate=True, output="votes"), "replace_one"
    ),
    "trained teachers": Case(tiny_discriminator_gan, TopAgg(top_k=20, votes="stochastic"), "replace_one"),
    "drawn critics": Case(tiny_gswgan, Gaussian(), "replace_one"),
    "pate": Case(lambda: tiny_pate(votes="above_mean"), Gaussian(), "replace_one"),
    "records": Case(lambda: tiny_dpsgd(ema_decay=0.9, views_per_record=2, max_shift=1), Gaussian()),
    "two optimizers": Case(tiny_dpgan, Gaussian()),
    "autoencoder": Case(tiny_vae, Gaussian()),
    "joint": Case(tiny_sinkhorn, Gaussian()),
    "moments": Case(lambda: tiny_moments(num_components=2), Gaussian(), "replace_one", exact=True, steps=3),
    "embedding": Case(tiny_merf, Gaussian(), exact=True, steps=2),
    "whole noise": Case(tiny_dpsgd, Gaussian(noise="rounded_gaussian"), steps=3),
    "warm start": Case(tiny_dpgan, Gaussian(), warm=warm_start, steps=6),
    "warm start by transport": Case(tiny_dpgan, Gaussian(), warm=by_transport, steps=3),
}


@dataclass
class Trace:
    """What one process knows of a run; the totals and the noise are private, and seen by tests alone."""

    totals: list[Tensor] = field(default_factory=list)
    noise: list[Tensor] = field(default_factory=list)
    stds: list[float] = field(default_factory=list)
    released: list[Tensor] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[Any, int] = field(default_factory=dict)
    has_stopped: bool = False
    secrets: list[bytes] = field(default_factory=list)


class Stopped(Exception):
    """A run was stopped on purpose."""


class StopAt(pl.Callback):
    """Stops a run, on every process, before a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if trainer.global_step == self.step:
            raise Stopped


def run(name: str, *, is_private: bool, changes: dict[tuple[type, str], Any] | None = None, **options: Any) -> Trace:
    """Train a case on this process, as one of its group.

    Args:
        name: Of `CASES`.
        is_private: With the case's mechanism; without, the same run without noise.
        changes: Attributes of classes to replace, for a wrong version of the code.
        options: `steps`, `seed` of noise and coins, `ledger` path, `checkpoint` to resume from, `callbacks`, `noise`:
            a list that is filled even if the run fails.
    """
    case, trace = CASES[name], Trace(noise=options.get("noise", []))
    watch(trace)
    for (owner, attribute), value in (changes or {}).items():
        setattr(owner, attribute, value)
    steps = options.get("steps", case.steps)
    privacy = settings(
        neighboring_relation=case.relation,
        insecure_seed=options.get("seed", 3),
        # Calibrated in a moment.
        **({"accountant": "rdp"} if case.warm is not None else {"target_epsilon": None, "noise_multiplier": 8.0}),
    )
    accountant = PrivacyAccountant(privacy=privacy, ledger_path=options.get("ledger"))
    privatizer = GradientPrivatizer(
        mechanism=case.mechanism if is_private else NoPrivacy(),
        accountant=accountant,
        warm_start=case.warm() if case.warm is not None else None,
    )
    module = case.make()
    own = [privatizer, accountant, *options.get("callbacks", lambda _: [])(accountant)]
    trainer = make_trainer(own, steps)
    with suppress(Stopped):
        trainer.fit(module, datamodule=TinyData(), ckpt_path=options.get("checkpoint"), weights_only=True)
    trace.state = {k: v.detach().clone() for k, v in module.state_dict().items() if isinstance(v, Tensor)}
    trace.counts = {str(key): count for key, count in accountant.ledger.counts().items()}
    trace.has_stopped = trainer.should_stop
    return trace


def make_trainer(callbacks: list[pl.Callback], steps: int) -> pl.Trainer:
    size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    options: dict[str, Any] = {} if size == 1 else {"strategy": STRATEGY, "devices": size}
    options["enable_checkpointing"] = any(isinstance(one, PrivateCheckpoint) for one in callbacks)
    return trainer_for(Path.cwd(), callbacks, steps, **options)


def watch(trace: Trace) -> None:
    """Let a process note what is perturbed, and with what."""
    release, gaussian, whole = Mechanism.release, NoiseSource.gaussian, NoiseSource.whole
    adopt = NoiseSource.adopt_secret

    def noted_secret(self: NoiseSource, secret: bytes) -> None:
        trace.secrets.append(secret)
        adopt(self, secret)

    def noted_release(self: Mechanism, total: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        trace.totals.append(total.detach().clone())
        value = release(self, total, *args, **kwargs)
        trace.released.append(value.clone())
        return value

    def noted_gaussian(self: NoiseSource, shape: Any, *, std: float, **kwargs: Any) -> Tensor:
        drawn = gaussian(self, shape, std=std, **kwargs)
        trace.noise.append(drawn.clone())
        trace.stds.append(std)
        return drawn

    def noted_whole(self: NoiseSource, law: Any, shape: Any, *, scale: Any, **kwargs: Any) -> Tensor:
        drawn = whole(self, law, shape, scale=scale, **kwargs)
        trace.noise.append(drawn.clone())
        trace.stds.append(float(scale))
        return drawn

    Mechanism.release, NoiseSource.gaussian = noted_release, noted_gaussian  # type: ignore[method-assign]
    NoiseSource.whole, NoiseSource.adopt_secret = noted_whole, noted_secret  # type: ignore[method-assign]


def all_cases(*, is_private: bool, names: tuple[str, ...] = tuple(CASES), most_steps: int = STEPS) -> dict[str, Trace]:
    """Train every case, one after another, in one group of processes."""
    release, gaussian, whole = Mechanism.release, NoiseSource.gaussian, NoiseSource.whole
    adopt, found = NoiseSource.adopt_secret, {}
    for name in names:
        Mechanism.release, NoiseSource.gaussian = release, gaussian  # type: ignore[method-assign]
        NoiseSource.whole, NoiseSource.adopt_secret = whole, adopt  # type: ignore[method-assign]
        found[name] = run(name, is_private=is_private, steps=min(most_steps, CASES[name].steps))
    return found


def my_ranks() -> Ranks:
    return Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size())
