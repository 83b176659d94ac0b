"""Import arrows point down: what counts privacy knows no tensors, and a method knows no mechanism by name."""

import subprocess
import sys

import pytest

from tests.policy.sources import PACKAGES, ROOT, Source, parse, sources

# What each package may import of ours, besides itself and FOR_ANYONE.
MAY_IMPORT = {
    "lightning_dp.accounting": (),
    "lightning_dp.losses": (),
    "lightning_dp.networks": (),
    # Events and special functions are numbers, which the accountant and the sampler must agree on.
    "lightning_dp.mechanisms": ("lightning_dp.accounting.events", "lightning_dp.accounting.bessel"),
    "lightning_dp.gradients": ("lightning_dp.losses", "lightning_dp.networks", "lightning_dp.mechanisms"),
    "lightning_dp.evaluation": ("lightning_dp.networks", "lightning_dp.losses"),
    "lightning_dp.modules": tuple(
        f"lightning_dp.{name}" for name in ("accounting", "mechanisms", "networks", "losses", "gradients", "evaluation")
    ),
    "datamodules": (),
    "callbacks": tuple(
        f"lightning_dp.{name}"
        for name in ("accounting", "mechanisms", "networks", "gradients", "evaluation", "modules")
    ),
    # Audits go through the real door and train real methods, so they stand above both; nothing below knows of them.
    "lightning_dp.auditing": (
        *(
            f"lightning_dp.{name}"
            for name in ("accounting", "mechanisms", "networks", "losses", "gradients", "evaluation", "modules")
        ),
        "callbacks",
        "datamodules",
    ),
    "lightning_dp.cli": ("lightning_dp", "callbacks", "datamodules"),
    "lightning_dp.benchmark": ("lightning_dp", "callbacks", "datamodules"),
}
FOR_ANYONE = ("lightning_dp.errors", "lightning_dp.wording")

# Files of lightning_dp/mechanisms that are no mechanism: what a method may know.
NOT_A_MECHANISM = ("base", "noise", "keystream", "contributions", "keyed", "rows")


def package_of(module: str) -> str:
    return next(name for name in sorted(MAY_IMPORT, key=len, reverse=True) if within(module, (name,)))


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def arrows_up(source: Source) -> list[str]:
    """Return imports of ours that the file's package may not make."""
    package = package_of(source.module)
    allowed = (package, *MAY_IMPORT[package], *FOR_ANYONE)
    return [name for name in source.imports() if within(name, PACKAGES) and not within(name, allowed)]


def concrete_mechanisms(source: Source) -> list[str]:
    """Return imports of a mechanism by name."""
    names = [name.split(".") for name in source.imports() if name.startswith("lightning_dp.mechanisms")]
    return [".".join(name) for name in names if len(name) < 4 or name[2] not in NOT_A_MECHANISM]


def files(*packages: str) -> list[Source]:
    return [source for source in sources() if within(source.module, packages)]


LEAVES = [source for source in sources() if source.path.parent != ROOT / "lightning_dp"]


@pytest.mark.parametrize("source", LEAVES, ids=lambda source: source.module)
def test_arrows_point_down(source):
    assert arrows_up(source) == []


@pytest.mark.parametrize("source", files("lightning_dp.modules"), ids=lambda source: source.module)
def test_modules_import_no_concrete_mechanism(source):
    assert concrete_mechanisms(source) == []


@pytest.mark.parametrize("source", files("lightning_dp.accounting"), ids=lambda source: source.module)
def test_accounting_is_numbers_only(source):
    """No torch, nor anything that brings it."""
    heavy = ("torch", "pytorch_lightning", "lightning_fabric", "opacus", "torchmetrics", "safetensors")
    assert not [name for name in source.imports() if within(name, heavy)]


def test_nothing_imports_torchvision():
    """The index's torchvision is a CUDA build that breaks Lightning beside a CPU torch."""
    assert not [source.module for source in sources() if any(within(n, ("torchvision",)) for n in source.imports())]


def test_the_one_file_at_the_bottom_imports_nothing():
    (errors,) = files("lightning_dp.errors")
    assert not [name for name in errors.imports() if not within(name, tuple(sys.stdlib_module_names))]


def test_every_package_is_known_and_importable():
    """A folder without __init__.py would be left out of the wheel; one without a rule would go unchecked."""
    for package in PACKAGES:
        for folder in [ROOT / package, *(ROOT / package).rglob("*")]:
            if folder.is_dir() and any(folder.glob("*.py")):
                assert (folder / "__init__.py").exists(), folder
                if folder != ROOT / "lightning_dp":
                    package_of(".".join(folder.relative_to(ROOT).parts))


class TestTheTests:
    """The rules above notice what they are for."""

    @pytest.mark.parametrize(
        ("path", "text"),
        [
            ("lightning_dp/accounting/x.py", "from lightning_dp.mechanisms.base import Mechanism"),
            ("lightning_dp/mechanisms/x.py", "from lightning_dp.accounting.ledger import PrivacyLedger"),
            ("lightning_dp/mechanisms/x.py", "import lightning_dp.modules.base"),
            ("lightning_dp/networks/x.py", "def f():\n    from lightning_dp.losses import energy"),
            ("lightning_dp/modules/x.py", "from callbacks import GradientPrivatizer"),
            ("lightning_dp/modules/x.py", "from lightning_dp.auditing.result import AuditResult"),
            ("lightning_dp/auditing/x.py", "from lightning_dp.cli import main"),
            ("lightning_dp/evaluation/x.py", "from datamodules import MNIST"),
            ("callbacks/x.py", "from lightning_dp.cli import main"),
            ("datamodules/x.py", "from lightning_dp.modules.base import PrivateModule"),
        ],
    )
    def test_an_arrow_up_is_seen(self, path, text):
        assert arrows_up(parse(text, path))

    @pytest.mark.parametrize(
        "text",
        [
            "from lightning_dp.mechanisms.topagg import TopAgg",
            "from lightning_dp.mechanisms import TopAgg",
            "import lightning_dp.mechanisms.gaussian",
        ],
    )
    def test_a_concrete_mechanism_is_seen(self, text):
        assert concrete_mechanisms(parse(text, "lightning_dp/modules/x.py"))
        assert not concrete_mechanisms(
            parse("from lightning_dp.mechanisms.base import Mechanism", "lightning_dp/modules/x.py")
        )


def test_accounting_and_the_parser_start_without_torch():
    """`account` and mistyped commands answer at once: importing them brings no torch."""
    code = (
        "import sys, lightning_dp.accounting.claim, lightning_dp.accounting.ledger\n"
        "import lightning_dp.cli.commands\n"
        "print([name for name in ('torch', 'pytorch_lightning', 'wandb', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
