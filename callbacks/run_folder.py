"""Writes what a run leaves behind: claim, run card, and the release checkpoint."""

import datetime
import json
import os
import platform
import time
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities import rank_zero_only
from typing_extensions import override

from callbacks.evaluate_generator import EvaluateGenerator
from callbacks.gradient_privatizer import GradientPrivatizer, run_summary
from lightning_dp.accounting.accountants import compute_epsilon
from lightning_dp.accounting.plan import ledger_plan
from lightning_dp.errors import PrivacyProtocolError
from lightning_dp.evaluation.peak_memory import peak_resident_bytes
from lightning_dp.evaluation.report import RunCard, write_run_card
from lightning_dp.modules.base import PrivateModule
from lightning_dp.modules.published import save_released

CLAIM_FILE = "claim.json"
GRID_FILE = "samples.png"
RELEASE_FOLDER = "release"
LEDGER_FILE = "ledger.jsonl"
PRIVATE_FOLDER = "private"
LAST_CHECKPOINT = "last.ckpt"
_PACKAGES = ("lightning-dp", "torch", "pytorch-lightning", "dp-accounting", "torchmetrics", "numpy")
_CURVE_POINTS = 20  # every other one, where records are sampled, is one at which the accountant has already spoken


class RunFolder(pl.Callback):
    """Fills the run folder at the end of a run; the ledger and the private checkpoint are written as it goes.

    Stands behind the callbacks that judge and draw samples, whose results it collects.

    Args:
        path: The run folder.
        privatizer: Knows mechanism, plan and ledger.
        evaluation: Holds the quality of the released samples; null leaves it out of the card.
        config: The resolved configuration, JSON-ready.
        title: One line that names the run.
    """

    def __init__(
        self,
        *,
        path: Path,
        privatizer: GradientPrivatizer,
        evaluation: EvaluateGenerator | None,
        config: dict[str, Any],
        title: str,
    ) -> None:
        self.path = path
        self.privatizer = privatizer
        self.evaluation = evaluation
        self.config = config
        self.title = title
        self.card: RunCard | None = None
        self._start = time.monotonic()
        self._train_time_s = 0.0
        self._device = "cpu"

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start = time.monotonic()
        self._device = str(pl_module.device)  # the strategy moves the module away before on_fit_end

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        judging = self.evaluation.time_s if self.evaluation is not None else 0.0
        self._train_time_s = time.monotonic() - self._start - judging

    @override
    @rank_zero_only
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not isinstance(pl_module, PrivateModule):
            raise PrivacyProtocolError("RunFolder was moved to another module after setup.")
        pl_module.check_published()
        claim = self.privatizer.accountant.claim()
        (self.path / CLAIM_FILE).write_text(
            json.dumps({**claim.to_dict(), "statement": claim.statement()}, indent=2) + "\n"
        )
        save_released(self.path / RELEASE_FOLDER, pl_module.released_model(), claim.to_dict())
        self.card = self._make_card(trainer, pl_module)
        write_run_card(self.path, self.card)
        metrics = {"cost/train_time_s": self._train_time_s, "privacy/delta": claim.delta}
        if claim.epsilon is not None:
            metrics["privacy/final_epsilon"] = claim.epsilon
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
            if isinstance(logger, WandbLogger):  # one that has a place for words
                logger.experiment.summary.update(
                    {"privacy/level": str(claim.level), "privacy/claim": claim.statement()}
                )

    def _make_card(self, trainer: pl.Trainer, module: PrivateModule) -> RunCard:
        accountant, data = self.privatizer.accountant, trainer.datamodule  # type: ignore[attr-defined]
        claim, budget, privacy = accountant.claim(), accountant.budget, accountant.privacy
        result = self.evaluation.result if self.evaluation is not None else None
        network = module.released_model()
        evaluation_time_s = self.evaluation.time_s if self.evaluation is not None else 0.0
        return RunCard(
            title=self.title,
            run_id=str(accountant.ledger.header.get("run_id", self.path.name)),
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            claim=claim.to_dict(),
            claim_statement=claim.statement(),
            budget={
                **({"target_epsilon": privacy.target_epsilon} if claim.epsilon is not None else {}),
                "target_delta": privacy.target_delta,
                "planned_releases": budget.num_releases if budget is not None else None,
                "releases": len(accountant.ledger),
                **self._shares(),
            },
            mechanism=run_summary(self.privatizer),
            sampler=module.sampling.to_dict(),
            seed_policy=(
                f"noise: fixed by privacy.insecure_seed={privacy.insecure_seed}, not private"
                if privacy.insecure_seed is not None
                else "noise: fresh secret from the operating system at every process start, never saved; "
                "latents, labels and initial weights: public seed of the configuration"
            ),
            data={
                "name": data.name,
                "num_records": data.num_records,
                "image_shape": list(data.image_shape),
                "fingerprint": data.fingerprint,
            },
            model={
                "method": type(module).__name__,
                network.kind: type(network).__name__,
                "parameters": sum(parameter.numel() for parameter in network.parameters()),
            },
            evaluation=result.to_dict() if result is not None else None,
            epsilon_curve=self._epsilon_curve(),
            cost={
                "train_time_s": self._train_time_s,
                "evaluation_time_s": evaluation_time_s,
                "total_time_s": time.monotonic() - self._start,
                "cpu_time_s": time.process_time(),
                "peak_memory_mb": _peak_memory_mb(),
                **_peak_device_memory(self._device),
                "device": self._device,
                "precision": str(trainer.precision),
                "processes": trainer.world_size,
                "machine": f"{platform.machine()}, {platform.system()}",
                "processors": f"{os.cpu_count()} processors, {torch.get_num_threads()} used",
                "memory": f"{_total_memory_gb():.0f} GB of memory",
            },
            versions=_versions(),
            config=self.config,
            sample_grid=GRID_FILE if (self.path / GRID_FILE).exists() else None,
        )

    def _shares(self) -> dict[str, float]:
        """Return what a warm start and the method cost as planned, each by itself: composed, less than their sum."""
        accountant, privacy = self.privatizer.accountant, self.privatizer.accountant.privacy
        planned = dict(ledger_plan(accountant.ledger) or {})
        if self.privatizer.warm_start is None or accountant.claim().epsilon is None or len(planned) < 2:
            return {}  # releases that are alike are one line of the plan
        first = next(iter(planned))  # nothing comes before a warm start
        parts = {"warm_start": {first: planned.pop(first)}, "method": planned}
        return {
            f"epsilon_of_{name}_alone": compute_epsilon(
                part,
                delta=privacy.target_delta,
                relation=privacy.relation,
                accountant=privacy.accountant,
                is_rough=True,
            ).epsilon
            for name, part in parts.items()
        }

    def _epsilon_curve(self) -> tuple[tuple[float, float], ...]:
        accountant, privacy = self.privatizer.accountant, self.privatizer.accountant.privacy
        if accountant.claim().epsilon is None:
            return ()
        entries = accountant.ledger.entries
        stride = max(1, len(entries) // _CURVE_POINTS)
        points = sorted({*range(stride, len(entries), stride), len(entries)})
        curve = []
        for count in points:
            counts = Counter((entry.event, entry.sampling) for entry in entries[:count])
            spent = compute_epsilon(
                counts,
                delta=privacy.target_delta,
                relation=privacy.relation,
                accountant=privacy.accountant,
                is_rough=count < len(entries),
            )
            curve.append((float(count), spent.epsilon))
        return tuple(curve)


def _peak_memory_mb() -> float:
    return peak_resident_bytes() / 1024**2


def _peak_device_memory(device: str) -> dict[str, float]:
    return {"peak_device_memory_mb": torch.cuda.max_memory_allocated(device) / 2**20} if "cuda" in device else {}


def _total_memory_gb() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
