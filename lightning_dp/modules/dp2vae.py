"""DP2-VAE: the decoder of a frozen encoder, trained on per-record gradients (Jiang et al. 2022)."""

import hashlib
from collections.abc import Iterator
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_dp.errors import ConfigurationError
from lightning_dp.gradients.per_record import trainable_parameters
from lightning_dp.gradients.record_gradients import rows_of
from lightning_dp.gradients.source import GradientMode
from lightning_dp.gradients.teachers import RowChunk
from lightning_dp.mechanisms.base import ContributionSpec
from lightning_dp.modules.options import check_share
from lightning_dp.modules.public_facts import PublicFacts
from lightning_dp.modules.vae import DPVAE
from lightning_dp.networks.vae import VAEDecoder, VAEEncoder

EncoderSource = Literal["public", "dp", "random", "private_nondp"]

_PRETRAINING_BATCH = 256
_CONDITION = (
    "the encoder, which was trained on the records without noise: a record moves the latents of all others, so nothing "
    "bounds what it adds to a release unless the encoder is taken as public"
)
_NOT_PUBLIC = (
    "records that are an image of model.public_data as well: a run on such is refused, so that it was made at all "
    "tells that there are none"
)


class DP2VAE(DPVAE):
    """A decoder trained privately on the latents of an encoder that is frozen; where that comes from must be said.

    The divergence does not reach the decoder, so only its reconstruction is trained.

    Guarantee: with a `public` or `random` encoder, as for DPVAE, for the decoder's gradients alone. With a `dp` encoder
    the first releases train both networks, the others the decoder, all in one ledger and under one bound. With a
    `private_nondp` encoder (the published method) none: every latent depends on every record, so one record can move
    all rows of a batch, and the claim is CONDITIONAL, without an epsilon.

    Args:
        encoder: Encoder; stays.
        decoder: Decoder, the generator that leaves.
        encoder_source: public (trained on `public_data`), dp, random (never trained), or private_nondp.
        public_data: Another data set of the same image shape and number of classes, for a public encoder; refused
            where it is of the private one's collection, by name, or holds an image of it, pixel by pixel.
        pretraining_steps: Steps of a public or private_nondp encoder's training, without noise.
        pretraining_learning_rate: Adam's learning rate there.
        encoder_share: Share of the releases that train a dp encoder, in (0, 1].
        expected_batch_size: See DPVAE, as all that follow.
        draws_per_record: See DPVAE.
        kl_weight: See DPVAE; matters while the encoder is trained.
        likelihood: See DPVAE.
        pixel_std: See DPVAE.
        learning_rate: See DPVAE.
        betas: See DPVAE.
        final_learning_rate_share: See DPVAE.
        ema_decay: See DPVAE.
        chunk_size: See DPVAE.
        gradients: See DPVAE.
        public_seed: See DPVAE.

    Raises:
        ConfigurationError: A value is out of range, or the public data are missing, or would be ignored.
    """

    def __init__(
        self,
        encoder: VAEEncoder,
        decoder: VAEDecoder,
        encoder_source: EncoderSource,
        *,
        public_data: pl.LightningDataModule | None = None,
        pretraining_steps: int = 1000,
        pretraining_learning_rate: float = 1e-3,
        encoder_share: float = 0.5,
        expected_batch_size: float = 2048,
        draws_per_record: int = 1,
        kl_weight: float = 1.0,
        likelihood: Literal["bernoulli", "gaussian"] = "bernoulli",
        pixel_std: float = 0.2,
        learning_rate: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        final_learning_rate_share: float = 1.0,
        ema_decay: float = 0.0,
        chunk_size: int | None = None,
        gradients: GradientMode = "auto",
        public_seed: int = 0,
    ) -> None:
        super().__init__(
            encoder,
            decoder,
            expected_batch_size=expected_batch_size,
            draws_per_record=draws_per_record,
            kl_weight=kl_weight,
            likelihood=likelihood,
            pixel_std=pixel_std,
            learning_rate=learning_rate,
            betas=betas,
            final_learning_rate_share=final_learning_rate_share,
            ema_decay=ema_decay,
            chunk_size=chunk_size,
            gradients=gradients,
            public_seed=public_seed,
        )
        check_share(encoder_share=encoder_share)
        if pretraining_steps < 0:
            raise ConfigurationError(f"Expected model.pretraining_steps >= 0, got {pretraining_steps=}.")
        if (encoder_source == "public") != (public_data is not None):
            raise ConfigurationError(
                "model.public_data holds the records of a public encoder: give it with model.encoder_source=public, "
                f"and with no other, got encoder_source={encoder_source}."
            )
        self.encoder_source, self.public_data = encoder_source, public_data
        self.pretraining_steps, self.pretraining_learning_rate = pretraining_steps, pretraining_learning_rate
        self.encoder_share = encoder_share
        if encoder_source != "dp":
            encoder.requires_grad_(requires_grad=False)

    # Public facts ----------------------------------------------------------------------------------------------------

    @override
    def describe_data(self, data: PublicFacts) -> None:
        super().describe_data(data)
        if self.public_data is not None and _origin(self.public_data) == _origin(data):
            raise ConfigurationError(
                f"model.public_data holds records of {_origin(data)}, as the private data do, so no encoder trained on "
                "them is public. Choose another data set, or model.encoder_source=dp."
            )

    @override
    def public_plan(self) -> dict[str, Any]:
        # Another encoder in mid-run, trained on other records, would leave the proof of the first.
        of_public = {} if self.public_data is None else {"public_data": _origin(self.public_data)}
        return super().public_plan() | {"encoder_source": self.encoder_source} | of_public

    @property
    @override
    def conditional_on(self) -> tuple[str, ...]:
        return (_CONDITION,) if self.encoder_source == "private_nondp" else ()

    @property
    @override
    def not_covered(self) -> tuple[str, ...]:
        return (_NOT_PUBLIC,) if self.encoder_source == "public" else ()

    @override
    def released_networks(self) -> dict[str, nn.Module]:
        return {"autoencoder" if self.encoder_source == "dp" else "decoder": self._learner}

    @property
    def _learner(self) -> nn.Module:
        return self.autoencoder if self.encoder_source == "dp" else self.autoencoder.decoder

    @override
    def contribution_spec(self) -> ContributionSpec:
        return self.record_spec(self._learner)

    # Training --------------------------------------------------------------------------------------------------------

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage != "fit" or self.trainer.ckpt_path is not None:
            return  # a checkpoint brings its encoder along
        if self.encoder_source == "public" and self.public_data is not None:
            self.public_data.setup("fit")
            self._refuse_private_images(self.public_data)
            self._pretrain(self.public_data)
        elif self.encoder_source == "private_nondp":
            self._pretrain(self.trainer.datamodule)  # type: ignore[attr-defined]

    def _refuse_private_images(self, public: Any) -> None:
        """Refuse records that are private under another name: a file of one's own, say.

        Nothing has been released, and the error neither names nor counts them. Whether it comes depends on the records
        without noise, so the claim is one about records that are no public image (`not_covered`): among data sets of
        such, no run is refused. Hashes stay in memory.
        """
        private = self.trainer.datamodule  # type: ignore[attr-defined]
        if _have_common_images(public.train_images, private.train_images):
            raise ConfigurationError(
                f"model.public_data ({_origin(public)}) holds images that the private data ({_origin(private)}) hold "
                "too, so no encoder trained on them is public. Choose another data set, or model.encoder_source=dp."
            )

    def _pretrain(self, data: Any) -> None:
        """Train the encoder by plain back-propagation, and put the decoder back to where it was."""
        encoder, decoder = self.autoencoder.encoder, self.autoencoder.decoder
        images, labels = data.train_images, data.train_labels
        if tuple(images.shape[1:]) != encoder.image_shape or int(labels.max()) >= encoder.num_classes:
            raise ConfigurationError(
                f"Expected public data of images {encoder.image_shape} with labels below {encoder.num_classes}, got "
                f"{tuple(images.shape[1:])} with labels up to {int(labels.max())}. Choose another model.public_data."
            )
        before = {name: value.clone() for name, value in decoder.state_dict().items()}
        stream = torch.Generator().manual_seed(self.public_seed)
        encoder.requires_grad_(requires_grad=True)
        optimizer = torch.optim.Adam(self.autoencoder.parameters(), lr=self.pretraining_learning_rate)
        for _ in range(self.pretraining_steps):
            ids = torch.randint(len(images), (_PRETRAINING_BATCH,), generator=stream)
            draws = torch.randn(len(ids), decoder.latent_dim, generator=stream)
            optimizer.zero_grad()
            self.batch_loss(images[ids].float() / 255, labels[ids], draws).backward()
            optimizer.step()
        optimizer.zero_grad()
        encoder.requires_grad_(requires_grad=False)
        decoder.load_state_dict(before)

    def batch_loss(self, images: Tensor, labels: Tensor, draws: Tensor) -> Tensor:
        """Return the mean loss of records that need no protection, one draw each.

        Args:
            images: (B, C, H, W), in [0, 1].
            labels: (B,).
            draws: Standard normal draws, (B, m).
        """
        mean, log_variance = self.autoencoder.encoder(images, labels)
        logits = self.autoencoder.decoder.logits(mean + (0.5 * log_variance).exp() * draws, labels)
        return (self.misfit(logits, images) + self.kl_weight * self.divergence(mean, log_variance)).mean()

    @override
    def training_step(self, batch: Any, batch_idx: int) -> None:
        if self.encoder_source != "dp" or self._round < self.encoder_share * self.planned_releases:
            self.train_on_release(self._learner)
            return
        # Later releases of a dp encoder: its columns hold zeros and noise, which the optimizer must not follow.
        encoder = self.autoencoder.encoder
        parameters = list(trainable_parameters(self.autoencoder).values())
        shape = (1, sum(parameter.numel() for parameter in parameters))
        released = self.release(self._decoder_rows(self.draw_records()), shape)
        self.assign_released(parameters, released)
        for parameter in encoder.parameters():
            parameter.grad = None
        self.step_optimizer()

    def _decoder_rows(self, records: Tensor) -> Iterator[RowChunk]:
        """Yield rows whose columns of the encoder, which come first, are zero."""
        num_columns = sum(p.numel() for p in trainable_parameters(self.autoencoder.encoder).values())
        for gradients in self.record_rows(records):
            for chunk in rows_of(gradients):
                chunk.values[..., :num_columns] = 0
                yield chunk


def _have_common_images(first: Tensor, second: Tensor) -> bool:
    """Tell whether two sets of images, (n, C, H, W), share one, to the last bit; labels do not count."""

    def hashes(images: Tensor) -> set[bytes]:
        return {hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images.cpu().numpy()}

    return first.shape[1:] == second.shape[1:] and not hashes(first).isdisjoint(hashes(second))


def _origin(data: Any) -> str:
    """Return the collection that records are of; data modules that do not say are one of their own, by name."""
    return str(getattr(data, "origin", getattr(data, "name", type(data).__name__)))
