"""Kills small runs at random moments and checks what is left: nothing visible is uncharged, no noise is drawn twice.

``python -m tests.faults.crash_driver FOLDER SEED right=500 [late=4 seeded=2 twice=4]`` prints a JSON line a mode.
A process that has imported everything forks a child for each attempt; the child tells through a pipe what became
visible, is killed with SIGKILL at a random moment, and the next child resumes its folder. The modes but the first break
a rule on purpose.
"""

import contextlib
import hashlib
import json
import os
import random
import resource
import select
import signal
import sys
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from callbacks import PrivateCheckpoint
from lightning_dp.accounting.budget_request import DatasetBudgetSettings
from lightning_dp.accounting.claiming import claim_from_ledger
from lightning_dp.accounting.dataset_budget import DatasetBudget
from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.accounting.ledger_state import Run
from lightning_dp.errors import LedgerError
from lightning_dp.mechanisms.noise import NoiseSource
from lightning_dp.modules.release import ReleaseSession
from tests.conftest import TinyData, callbacks_for, tiny_gan, trainer_for

PLANNED = 12
CHECKPOINT_EVERY = 4
EPSILON = 5.0


def attempt(run: Path, budget: Path, pipe: int, broken: str) -> None:
    """Begin the run in this folder or go on with it, to its end; in a child of its own."""
    _report_through(pipe)
    if broken == "late":
        _charge_late()
    ledger, checkpoint = run / "ledger.jsonl", run / "private" / "last.ckpt"
    # Broken: the second attempt forgets the ledger, as a program that trusts its checkpoint alone would.
    if broken == "twice" and ledger.exists():
        ledger.unlink()
    privatizer, accountant = callbacks_for(
        ledger_path=ledger, target_epsilon=EPSILON, insecure_seed=7 if broken == "seeded" else None
    )
    accountant.dataset_budget = DatasetBudgetSettings(folder=str(budget), epsilon=2000.0, allow_unproved=bool(broken))
    saver = PrivateCheckpoint(path=checkpoint, accountant=accountant, every_n_releases=CHECKPOINT_EVERY)
    trainer = trainer_for(run, [privatizer, accountant, saver], PLANNED, enable_checkpointing=True)
    resume = checkpoint if checkpoint.exists() and broken != "twice" else None
    trainer.fit(tiny_gan(), datamodule=TinyData(), ckpt_path=resume, weights_only=True)


def _report_through(pipe: int) -> None:
    """Tell of every draw of noise, and of every value before anything can use it."""
    release, whole = ReleaseSession.release, NoiseSource.whole

    def told_release(self: Any, *arguments: Any, **options: Any) -> Any:
        released = release(self, *arguments, **options)
        os.write(pipe, f"R {released.number}\n".encode())
        return released

    def told_whole(self: Any, *arguments: Any, **options: Any) -> Any:
        noise = whole(self, *arguments, **options)
        os.write(pipe, f"N {hashlib.sha256(noise.numpy().tobytes()).hexdigest()[:32]}\n".encode())
        return noise

    ReleaseSession.release, NoiseSource.whole = told_release, told_whole  # type: ignore[method-assign]


def _charge_late() -> None:
    """Break the rule: a ledger that writes a release down when the next one comes."""
    append = PrivacyLedger.append

    def late(self: Any, event: Any, sampling: Any) -> int:
        waiting = self.__dict__.setdefault("waiting", [])
        if waiting:
            self._forget_last()
            append(self, *waiting.pop())
        waiting.append((event, sampling))
        self._remember(Run(self._writer, event, sampling, 1))
        return len(self)

    PrivacyLedger.append = late  # type: ignore[method-assign]


@dataclass
class Findings:
    """What the kills have shown.

    Attributes:
        kills: Children killed before their end.
        attempts: Children begun.
        runs: Runs that came to their end.
        in_setup: Kills before the first release of an attempt.
        visible: Values that became visible.
        charged: Ledger entries of all runs.
        problems: What should not be.
    """

    kills: int = 0
    attempts: int = 0
    runs: int = 0
    in_setup: int = 0
    visible: int = 0
    charged: int = 0
    problems: list[str] = field(default_factory=list)
    noise: Counter[str] = field(default_factory=Counter)


class Driver:
    """Runs and kills, in one folder."""

    def __init__(self, folder: Path, seed: int, broken: str) -> None:
        self.folder, self.broken = folder, broken
        self.budget = folder / "budget"
        self.dice = random.Random(seed)
        self.found = Findings()
        self.longest_s = 0.5

    def go(self, kills: int) -> Findings:
        """Kill so many children, then let the last run end; two runs at least, whose noise may not agree."""
        while (self.found.kills < kills or self.found.runs < 2) and len(self.found.problems) < 20:
            self.one_run(kills)
        return self.found

    def one_run(self, kills: int) -> None:
        """One run folder from its first attempt to its end."""
        run = self.folder / f"run{self.found.runs}"
        run.mkdir()
        seen: list[int] = []
        before = b""
        while True:
            deadly = self.found.kills < kills
            ended, numbers = self.child(run, deadly)
            self.found.visible += len(numbers)
            seen += numbers
            before = self.check(run, seen, before)
            if ended:
                break
        self.check_end(run)
        self.found.runs += 1

    def child(self, run: Path, deadly: bool) -> tuple[bool, list[int]]:
        """Fork one attempt, kill it or let it end; return whether it ended and what it made visible."""
        reader, writer = os.pipe()
        start = time.monotonic()
        pid = os.fork()
        if not pid:
            _become_child(run, self.budget, writer, self.broken)
        os.close(writer)
        self.found.attempts += 1
        # Half of the kills anywhere in the process's life, half right after some release.
        after = self.dice.randint(1, PLANNED) if self.dice.random() < 0.5 else None
        moment = start + self.dice.uniform(0.0, 1.1 * self.longest_s) if deadly and after is None else None
        told = _listen(reader, moment, after if deadly else None)
        if deadly and after is not None:
            time.sleep(self.dice.expovariate(500.0))
        if deadly:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        told += _listen(reader, None, None)
        os.close(reader)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        lines = b"".join(told).decode().splitlines()
        for line in lines:
            if line.startswith("N "):
                self.found.noise[line[2:]] += 1
        numbers = [int(line[2:]) for line in lines if line.startswith("R ")]
        if code == -signal.SIGKILL:
            self.found.kills += 1
            self.found.in_setup += not numbers
        elif code:
            words = (run / "err.txt").read_text().strip().splitlines()
            self.found.problems.append(f"{run.name}: exit code {code}: {words[-1] if words else 'no word'}")
            return True, numbers
        else:
            self.longest_s = max(0.2, 0.5 * self.longest_s + 0.5 * (time.monotonic() - start))
        return code == 0, numbers

    def check(self, run: Path, seen: list[int], before: bytes) -> bytes:
        """Compare what was visible with what is charged; return the whole lines of the ledger."""
        problems, path = self.found.problems, run / "ledger.jsonl"
        doubled = [noise for noise, times in self.found.noise.items() if times > 1]
        if doubled:
            problems.append(f"{run.name}: noise drawn twice: {doubled[0]}")
            self.found.noise.clear()
        data = path.read_bytes() if path.exists() else b""
        if b"\n" not in data:  # killed before the header was whole: as the message says, the file is deleted
            if seen:
                problems.append(f"{run.name}: {len(seen)} values visible, no ledger")
            path.unlink(missing_ok=True)
            return b""
        if not data.startswith(before):
            problems.append(f"{run.name}: lines of the ledger are gone")
        try:
            ledger = PrivacyLedger.read(path)
        except LedgerError as error:
            problems.append(f"{run.name}: {error}")
            return b""
        if len(set(seen)) != len(seen):
            problems.append(f"{run.name}: one number released twice: {seen}")
        if max(seen, default=0) > len(ledger) or len(seen) > len(ledger):
            problems.append(f"{run.name}: {len(seen)} values visible up to number {max(seen)}, {len(ledger)} charged")
        if len(ledger) > PLANNED:
            problems.append(f"{run.name}: {len(ledger)} releases of {PLANNED}")
        self.check_budget(run, ledger, seen)
        return data[: data.rfind(b"\n") + 1]

    def check_budget(self, run: Path, ledger: PrivacyLedger, seen: list[int]) -> None:
        """A visible value was reserved before, and a run reserves its plan once."""
        if not (self.budget / "budget.jsonl").exists():
            if seen:
                self.found.problems.append(f"{run.name}: values visible, nothing reserved")
            return
        try:
            charge = DatasetBudget(self.budget).state().runs.get(str(ledger.header["run_id"]))
        except LedgerError as error:
            if seen:
                self.found.problems.append(f"{run.name}: {error}")
            return
        reserved = sum(charge.counts.values()) if charge else 0
        if reserved not in ((PLANNED,) if seen else (0, PLANNED)):
            self.found.problems.append(f"{run.name}: {reserved} releases reserved of {PLANNED}")

    def check_end(self, run: Path) -> None:
        """A run that came to its end keeps its budget and states its plan."""
        if not (run / "ledger.jsonl").exists():
            return
        ledger = PrivacyLedger.read(run / "ledger.jsonl")
        self.found.charged += len(ledger)
        claim = claim_from_ledger(ledger)
        if self.broken == "seeded":
            return
        if claim.epsilon is None or not 0.99 * EPSILON < claim.epsilon <= EPSILON or len(ledger) != PLANNED:
            self.found.problems.append(f"{run.name}: {claim.statement()}")


def _become_child(run: Path, budget: Path, pipe: int, broken: str) -> None:
    """Never returns."""
    code = 1
    try:
        error = os.open(run / "err.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(error, 1)
        os.dup2(error, 2)
        warnings.simplefilter("ignore")
        attempt(run, budget, pipe, broken)
        code = 0
    except BaseException as error:
        # All planned releases are made and the last checkpoint does not hold them: the run can only be given up.
        if "no checkpoint holds what they taught" in str(error):
            code = 0
        else:
            import traceback

            traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _listen(reader: int, until: float | None, releases: int | None) -> list[bytes]:
    """Return what the child told: until a moment, or so many releases, or its end."""
    told: list[bytes] = []
    made = 0
    while True:
        left = None if until is None else until - time.monotonic()
        if (left is not None and left <= 0) or (releases is not None and made >= releases):
            return told
        ready, _, _ = select.select([reader], [], [], left)
        if not ready:
            return told
        part = os.read(reader, 65536)
        if not part:
            return told
        told.append(part)
        made += part.count(b"R ")


def main(folder: str, seed: str, *modes: str) -> None:
    """Run the driver in each mode (`right=500`, or a broken one) and print what it found, a line for each."""
    torch.set_num_threads(1)
    for mode in modes:
        name, _, kills = mode.partition("=")
        place = Path(folder) / name
        place.mkdir()
        start, before = time.monotonic(), _cpu_s()
        found = Driver(place, int(seed), "" if name == "right" else name).go(int(kills))
        values = {name: value for name, value in asdict(found).items() if name != "noise"}
        seconds = {"cpu_s": round(_cpu_s() - before, 1), "wall_s": round(time.monotonic() - start, 1)}
        print(json.dumps(values | seconds), flush=True)


def _cpu_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


if __name__ == "__main__":
    main(*sys.argv[1:])
