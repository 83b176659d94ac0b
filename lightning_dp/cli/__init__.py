"""The command line: ``lightning-dp fit | sample | evaluate | account | audit | benchmark | select | compare | ...``.

Mistakes of the user end in one line on standard error and exit code 2. Heavy imports wait until a command needs them.
"""

import errno
import logging
import os
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import entry_points

from lightning_dp.cli.memory import keep_freed_memory
from lightning_dp.cli.processes import process_number
from lightning_dp.errors import ConfigurationError, PeerError, PrivacyProtocolError

_LIMITS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG)

USAGE = """lightning-dp: differentially private generative models on PyTorch Lightning

  lightning-dp fit --config FILE [flags]     train a private generator under a stated budget
  lightning-dp sample RUN --num 10000        draw samples of a run's released generator
  lightning-dp evaluate RUN                  judge them against the real test split
  lightning-dp evaluate FILE --data NAME     judge samples that another program made (.npz, or a folder per class)
  lightning-dp account RUN [--delta D]       recompute epsilon from the ledger alone
  lightning-dp account --dataset DIR         what all runs within one data set's budget may spend together
  lightning-dp audit mechanism NAME | method FILE | RUN   try to break a claim: empirical lower bounds on epsilon
  lightning-dp benchmark FILE                compare methods and mechanisms at equal privacy (configs/benchmark/)
  lightning-dp select FILE --score NAME      choose the best of a grid's cells, and pay for the choice
  lightning-dp compare CARD CARD ...         show what tells run cards apart
  lightning-dp matrix [--markdown]           which mechanisms run with which methods, or why not
  lightning-dp data fetch NAME               fill ./data with verified files (mnist, fashion-mnist)

Flags over a configuration:
  --mechanism TopAgg|Gaussian|NoPrivacy      swap the mechanism; its options: --mechanism.help NAME
  --privacy.target_epsilon 1                 calibrate the noise (or the length) to a budget
  --privacy.noise_multiplier 40              or give the noise
  --trainer.max_steps 400                    number of releases
  --run_dir DIR --ckpt_path last             resume a run
  --dataset_budget.folder DIR                share one budget with all runs on the same data

'lightning-dp COMMAND --help' lists all flags of a command. Configurations to start from: configs/experiment/."""


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments after the program's name; None takes them from the process.

    Returns:
        Exit code: 0 done, 1 a broken privacy protocol or a lost process, 2 a mistake of the user in one line, 130
        interrupted.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if arguments[0] == "--version":
        from lightning_dp import __version__

        print(f"lightning-dp {__version__}")
        return 0
    _quieten()
    keep_freed_memory()
    try:
        return _command(arguments[0])(arguments[1:])
    except ConfigurationError as error:
        return _fail(f"{error}", 2)
    except PrivacyProtocolError as error:
        return _fail(f"privacy protocol broken: {error}", 1)
    except PeerError as error:
        return 1 if process_number() else _fail(f"{error}", 1)  # told once; whoever failed has its own line
    except KeyboardInterrupt as error:
        return 130 if process_number() else _fail(str(error) or "interrupted", 130)
    except (MemoryError, OSError, RuntimeError) as error:
        if (limit := _limit_of_the_machine(error)) is None:
            raise
        return _fail(limit, 1)


def _limit_of_the_machine(error: Exception) -> str | None:
    """Return what to do about a lack of memory, disk or rights; None for other errors, which are bugs."""
    text = f"{type(error).__name__} {error}"
    if isinstance(error, MemoryError) or "OutOfMemoryError" in text or "can't allocate memory" in text:
        return (
            "not enough memory; lower model.images_per_step, model.chunk_size, evaluation.num_samples or the sizes of "
            "the model's networks."
        )
    if isinstance(error, OSError) and error.errno in _LIMITS:
        where = error.filename or "a file of the run"
        return f"cannot write {where} ({error.strerror}); make room or mend its rights, then --ckpt_path last goes on."
    return None


def _quieten() -> None:
    """Keep other libraries' greetings out of the way; our own messages stay."""
    # Waiting threads that spin make a busy machine several times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # about Lightning's calls, not ours
    logging.basicConfig(format="%(message)s")
    for name in ("callbacks", "lightning_dp", "datamodules"):
        logging.getLogger(name).setLevel(logging.WARNING if process_number() else logging.INFO)
    for message in (".*LeafSpec.*", ".*args parameter is intended to run.*", ".*does not have many workers.*"):
        warnings.filterwarnings("ignore", message=message)


def _command(name: str) -> Callable[[list[str]], int]:
    from lightning_dp.cli import audit, commands, comparison, matrix, select

    known = {
        "fit": commands.fit,
        "sample": commands.sample,
        "evaluate": commands.evaluate,
        "account": commands.account,
        "audit": audit.audit,
        "benchmark": comparison.benchmark,
        "select": select.select,
        "compare": comparison.compare,
        "matrix": matrix.matrix,
        "data": commands.data,
    }
    if name not in known:
        from lightning_dp.cli.messages import nearest

        raise ConfigurationError(f"Unknown command {name!r}; choose from {', '.join(known)}.{nearest(name, known)}")
    for plugin in entry_points(group="lightning_dp.plugins"):
        plugin.load()
    return known[name]


def _fail(message: str, code: int) -> int:
    where = f"process {process_number()}: " * (process_number() > 0)
    print(f"lightning-dp: {where}error: {' '.join(message.split())}", file=sys.stderr)
    return code
