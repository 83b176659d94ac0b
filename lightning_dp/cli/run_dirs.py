"""Run folders of the command line: a new one, or the one to go on in; its private part is shut to other users."""

import datetime
import itertools
import shutil
from contextlib import suppress
from pathlib import Path

from callbacks.private_checkpoint import check_checkpoint
from callbacks.run_folder import LAST_CHECKPOINT, LEDGER_FILE, PRIVATE_FOLDER
from lightning_dp.cli.processes import process_number
from lightning_dp.errors import ConfigurationError


def resolve_run(name: str, run_dir: str | None, ckpt_path: str | None) -> tuple[Path, Path | None]:
    """Return the run folder and the checkpoint to resume from.

    Args:
        name: Name of the experiment.
        run_dir: The user's folder, or None for a new one under runs/NAME (or the newest there when resuming).
        ckpt_path: None, "last", or a checkpoint file inside a run folder.

    Raises:
        ConfigurationError: Nothing to resume, or a folder that already holds a run.
    """
    if ckpt_path is None:
        folder = Path(run_dir) if run_dir else _new_folder(Path("runs") / name)
        if (folder / LEDGER_FILE).exists():
            raise ConfigurationError(
                f"{folder} already holds a run (its releases are spent). Resume it with --ckpt_path last, "
                "or give another --run_dir."
            )
        return folder, None
    if ckpt_path != "last":
        checkpoint = Path(ckpt_path)
        if not checkpoint.is_file():
            raise ConfigurationError(f"Expected a checkpoint file, found none at --ckpt_path {ckpt_path}.")
        check_checkpoint(checkpoint)
        return Path(run_dir) if run_dir else checkpoint.resolve().parent.parent, checkpoint
    if run_dir is None:
        runs = sorted((Path("runs") / name).glob(f"*/{LEDGER_FILE}"), key=lambda path: path.stat().st_mtime)
        if not runs:
            raise ConfigurationError(f"--ckpt_path last found no run under runs/{name}; give its --run_dir.")
        folder = runs[-1].parent
    else:
        folder = Path(run_dir)
        if not (folder / LEDGER_FILE).exists():
            raise ConfigurationError(f"--ckpt_path last found no ledger in {folder}; check --run_dir.")
    checkpoint = folder / PRIVATE_FOLDER / LAST_CHECKPOINT
    if not checkpoint.exists():  # killed before the first: training starts anew, what the ledger holds stays spent
        return folder, None
    check_checkpoint(checkpoint)
    return folder, checkpoint


def _new_folder(parent: Path) -> Path:
    """Make a folder named after this moment; another one, where a run of the same moment has it."""
    moment = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    if process_number():
        return parent / moment  # the first process makes it
    for number in itertools.count(1):
        folder = parent / (moment if number == 1 else f"{moment}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if parent.is_dir():
                continue
            return folder  # a file is in the way, which making the private part will say
        except OSError:
            return folder
        return folder
    raise AssertionError("itertools.count ends")


def drop_if_empty(folder: Path) -> None:
    """Remove what `resolve_run` made for a run that was refused: folders with nothing in them."""
    with suppress(OSError):
        for place in (folder, folder.parent, folder.parent.parent):
            place.rmdir()


def is_unused(folder: Path) -> bool:
    """Tell whether a folder is not there, or has nothing in it."""
    try:
        return not any(folder.iterdir())
    except FileNotFoundError:
        return True
    except OSError:
        return False


def drop_refused(folder: Path, *, was_there: bool) -> None:
    """Remove what a run wrote into an unused folder before it was refused; one with a ledger is left as it is.

    Args:
        folder: The run folder.
        was_there: Whether it was there, empty, before the run.
    """
    if (folder / LEDGER_FILE).exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    if was_there:
        folder.mkdir(exist_ok=True)


def make_run_dir(folder: Path) -> None:
    """Make the run folder, check that it can be written, and shut its private part to other users.

    Raises:
        ConfigurationError: It cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        private = folder / PRIVATE_FOLDER
        private.mkdir(mode=0o700, exist_ok=True)
        private.chmod(0o700)  # one that was there before
        probe = folder / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ConfigurationError(
            f"Cannot write to the run folder {folder} ({error.strerror}); choose another with --run_dir."
        ) from None
