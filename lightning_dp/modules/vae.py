"""DP-VAE: a variational autoencoder trained on per-record gradients; its decoder is what leaves."""

from typing import Any, Literal

import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from typing_extensions import override

from lightning_dp.errors import ConfigurationError
from lightning_dp.gradients.per_record import RecordLoss, trainable_parameters
from lightning_dp.gradients.source import GradientMode
from lightning_dp.losses.elbo import bernoulli_nll, gaussian_nll, kl_to_standard_normal
from lightning_dp.mechanisms.base import ContributionSpec
from lightning_dp.mechanisms.keyed import keyed_normal
from lightning_dp.modules.imitation import batches, descend
from lightning_dp.modules.options import check_betas, check_positive, check_share
from lightning_dp.modules.public_facts import PublicFacts
from lightning_dp.modules.records import RecordModule
from lightning_dp.modules.release import PublicSamples
from lightning_dp.modules.schedule import with_cosine_schedule
from lightning_dp.networks.vae import Autoencoder, VAEDecoder, VAEEncoder

_LATENT = 0  # purpose of randomness that belongs to records


class DPVAE(RecordModule):
    """A variational autoencoder whose every step is one release of summed per-record gradients.

    The loss of a record is -E[log p(x | z, y)] + kl_weight * KL(q(z | x, y) || N(0, I)), with its own draws of z.
    Plain, beta (kl_weight) and conditional (encoder and decoder told the label) autoencoders are options.

    Guarantee: a record reaches the one row that is the gradient of its own loss, over encoder and decoder together. A
    term over several records (an aggregated posterior, a total correlation, MMD) would reach every row of the batch,
    and cannot be written here. The decoder is published; the encoder is covered as well, and stays.

    Args:
        encoder: Encoder; frozen parameters are not trained.
        decoder: Decoder, the generator that leaves.
        expected_batch_size: Mean number of records of a step.
        draws_per_record: Latents drawn for a record, averaged before it is clipped.
        kl_weight: beta; 1 is the evidence lower bound.
        likelihood: bernoulli treats gray values as means of bits; gaussian has a fixed standard deviation.
        pixel_std: Standard deviation of a pixel under the gaussian likelihood.
        learning_rate: Adam's learning rate on released gradients.
        betas: Adam's betas.
        final_learning_rate_share: The learning rate falls along a half cosine to this share of itself; 1 keeps it.
        ema_decay: Decay of the moving average of the decoder that is released; 0 releases the last iterate.
        chunk_size: Records whose gradients are held at a time (the physical batch); null fits it to cache and memory.
        gradients: How per-record gradients are made: functorch differentiates record by record, materialize forms a row
            for each, ghost forms norms and sums without rows where it can, auto is the fastest; speed and memory only.
        public_seed: See `PoissonModule`.

    Raises:
        ConfigurationError: A value is out of range, or encoder and decoder do not fit.
    """

    def __init__(
        self,
        encoder: VAEEncoder,
        decoder: VAEDecoder,
        *,
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
            expected_batch_size=expected_batch_size,
            chunk_size=chunk_size,
            gradients=gradients,
            public_seed=public_seed,
            ema_decay=ema_decay,
        )
        check_positive(draws_per_record=draws_per_record, learning_rate=learning_rate, pixel_std=pixel_std)
        check_share(final_learning_rate_share=final_learning_rate_share)
        check_betas(betas)
        if not 0 <= kl_weight < float("inf"):
            raise ConfigurationError(f"Expected a finite model.kl_weight >= 0, got kl_weight={kl_weight}.")
        self.autoencoder = Autoencoder(encoder, decoder)
        self.keep_average(decoder)
        self.draws_per_record, self.kl_weight = draws_per_record, kl_weight
        self.likelihood, self.pixel_std = likelihood, pixel_std
        self.learning_rate, self.betas = learning_rate, betas
        self.final_learning_rate_share = final_learning_rate_share

    # Public facts ----------------------------------------------------------------------------------------------------

    @override
    def describe_data(self, data: PublicFacts) -> None:
        super().describe_data(data)
        decoder = self.autoencoder.decoder
        if data.image_shape != decoder.image_shape or data.num_classes != decoder.num_classes:
            raise ConfigurationError(
                f"The decoder makes images {decoder.image_shape} of {decoder.num_classes} classes, but the data are "
                f"{data.image_shape} of {data.num_classes}; set image_shape and num_classes of model.encoder and of "
                "model.decoder, or choose other data."
            )

    @override
    def contribution_spec(self) -> ContributionSpec:
        return self.record_spec(self.autoencoder)

    @override
    def released_networks(self) -> dict[str, nn.Module]:
        return {"autoencoder": self.autoencoder}

    @override
    def released_generator(self) -> VAEDecoder:
        """Return the decoder that is sampled and published: the average if there is one."""
        return self.averaged(self.autoencoder.decoder)

    # Training --------------------------------------------------------------------------------------------------------

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        parameters = list(trainable_parameters(self.autoencoder).values())
        optimizer = torch.optim.Adam(parameters, lr=self.learning_rate, betas=self.betas)
        return with_cosine_schedule(
            optimizer, num_steps=self.planned_releases, final_share=self.final_learning_rate_share
        )

    @override
    def learn_from_samples(self, samples: PublicSamples, *, steps: int, learning_rate: float, seed: int) -> None:
        draw, network = batches(samples, seed=seed), self.autoencoder
        stream = torch.Generator().manual_seed(seed)

        def loss() -> Tensor:
            images, labels = draw()
            mean, log_variance = network.encoder(images, labels)
            noise = torch.randn(mean.shape, generator=stream).to(mean)
            logits = network.decoder.logits(mean + (0.5 * log_variance).exp() * noise, labels)
            divergence = self.divergence(mean, log_variance)
            return (self.misfit(logits, images) + self.kl_weight * divergence).mean()

        parameters = list(trainable_parameters(network).values())
        descend(loss, [{"params": parameters, "lr": learning_rate}], steps=steps)
        self.start_average()

    @override
    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.train_on_release(self.autoencoder)

    @override
    def record_loss_of(self) -> tuple[nn.Module, RecordLoss]:
        return self.autoencoder, self.record_loss

    @override
    def record_batch(self, ids: Tensor) -> tuple[Tensor, ...]:
        images, on_device = self.images_of(ids), ids.to(self.device)
        shape = torch.Size((len(ids), self.draws_per_record, self.autoencoder.decoder.latent_dim))
        # Keyed by the record, so that one that joins or leaves changes nobody else's draws.
        draws = keyed_normal(shape, seed=self.record_seed(_LATENT), row_ids=on_device)
        return images, self.labels_of(ids), draws.to(images)

    def record_loss(self, network: nn.Module, image: Tensor, label: Tensor, draws: Tensor) -> Tensor:
        """Return the loss of one record, averaged over its draws.

        Args:
            network: The autoencoder.
            image: (1, C, H, W), in [0, 1].
            label: (1,).
            draws: Standard normal draws, (1, K, m).
        """
        mean, log_variance = network.encoder(image, label)  # type: ignore[operator]
        latent = mean + (0.5 * log_variance).exp() * draws[0]  # (K, m)
        logits = network.decoder.logits(latent, label.expand(len(latent)))  # type: ignore[union-attr, operator]
        return self.misfit(logits, image).mean() + self.kl_weight * self.divergence(mean, log_variance).sum()

    def misfit(self, logits: Tensor, images: Tensor) -> Tensor:
        """Return minus the log likelihood of images, (B,), under the chosen distribution of pixels."""
        if self.likelihood == "bernoulli":
            return bernoulli_nll(logits, images)
        return gaussian_nll(logits, images, std=self.pixel_std)

    def divergence(self, mean: Tensor, log_variance: Tensor) -> Tensor:
        """Return the divergence of the encoder's distributions from the prior, (B,)."""
        return kl_to_standard_normal(mean, log_variance)
