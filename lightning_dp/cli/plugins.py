"""Imports every class that a flag can name; importing it is what makes a class known."""

from datamodules import MNIST, EmbeddedDigits, FashionMNIST, ImageFolder, NpzImages
from lightning_dp.gradients.discriminator_teachers import DiscriminatorTeachers
from lightning_dp.gradients.energy_teachers import EnergyTeachers
from lightning_dp.mechanisms.adaptive import AdaptiveGaussian
from lightning_dp.mechanisms.gaussian import Gaussian
from lightning_dp.mechanisms.gnmax import GNMax
from lightning_dp.mechanisms.no_privacy import NoPrivacy
from lightning_dp.mechanisms.topagg import TopAgg
from lightning_dp.mechanisms.von_mises_fisher import VonMisesFisher
from lightning_dp.modules.dp2vae import DP2VAE
from lightning_dp.modules.dpgan import DPGAN
from lightning_dp.modules.dpsgd import DPSGDClassifier
from lightning_dp.modules.merf import DPMERF
from lightning_dp.modules.moments import MomentsModule
from lightning_dp.modules.pate_gan import PATEGAN
from lightning_dp.modules.semi_dual import SemiDualSinkhorn
from lightning_dp.modules.semi_dual_warm_start import SemiDualWarmStart
from lightning_dp.modules.sinkhorn import DPSinkhorn
from lightning_dp.modules.teacher_gan import TeacherEnsembleGAN
from lightning_dp.modules.vae import DPVAE
from lightning_dp.modules.warm_start import MomentsWarmStart, WarmStart
from lightning_dp.networks.basis import LowFrequencyDCT
from lightning_dp.networks.class_gaussian import ClassGaussianGenerator
from lightning_dp.networks.datalens import DataLensGenerator
from lightning_dp.networks.dcgan import DCGANCritic, DCGANGenerator
from lightning_dp.networks.dct import DCTGenerator
from lightning_dp.networks.gswgan import GSWGANCritic, GSWGANGenerator
from lightning_dp.networks.scattering import ScatteringClassifier
from lightning_dp.networks.sinkhorn import SinkhornConvGenerator, SinkhornResidualGenerator
from lightning_dp.networks.small import MLPDiscriminator, MLPGenerator, SmallConvDiscriminator, SmallConvGenerator
from lightning_dp.networks.tempered import TemperedCNN
from lightning_dp.networks.vae import ConvDecoder, ConvEncoder, CosineDecoder, CosineEncoder
from lightning_dp.networks.wide_resnet import WideResNet

WARM_STARTS: dict[str, type[WarmStart]] = {"moments": MomentsWarmStart, "semi_dual": SemiDualWarmStart}
"""Short names for the command line: `--warm_start moments`."""

__all__ = [
    "DP2VAE",
    "DPGAN",
    "DPMERF",
    "DPVAE",
    "MNIST",
    "PATEGAN",
    "WARM_STARTS",
    "AdaptiveGaussian",
    "ClassGaussianGenerator",
    "ConvDecoder",
    "ConvEncoder",
    "CosineDecoder",
    "CosineEncoder",
    "DCGANCritic",
    "DCGANGenerator",
    "DCTGenerator",
    "DPSGDClassifier",
    "DPSinkhorn",
    "DataLensGenerator",
    "DiscriminatorTeachers",
    "EmbeddedDigits",
    "EnergyTeachers",
    "FashionMNIST",
    "GNMax",
    "GSWGANCritic",
    "GSWGANGenerator",
    "Gaussian",
    "ImageFolder",
    "LowFrequencyDCT",
    "MLPDiscriminator",
    "MLPGenerator",
    "MomentsModule",
    "MomentsWarmStart",
    "NoPrivacy",
    "NpzImages",
    "ScatteringClassifier",
    "SemiDualSinkhorn",
    "SemiDualWarmStart",
    "SinkhornConvGenerator",
    "SinkhornResidualGenerator",
    "SmallConvDiscriminator",
    "SmallConvGenerator",
    "TeacherEnsembleGAN",
    "TemperedCNN",
    "TopAgg",
    "VonMisesFisher",
    "WideResNet",
]
