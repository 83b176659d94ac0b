"""The one door between private rows and anything that leaves: encode, sum, charge, noise once."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from dp_accounting import NeighboringRelation
from torch import Tensor

from lightning_dp.accounting.events import ReleaseEvent, Sampling, relation_name
from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.errors import ConfigurationError, PrivacyProtocolError
from lightning_dp.gradients.ranks import ALONE, Ranks, checksum
from lightning_dp.gradients.record_gradients import RecordChunk, SummableRows
from lightning_dp.gradients.teachers import RowChunk
from lightning_dp.mechanisms.base import ContributionSpec, EncodeContext, Mechanism, ReleasePlan
from lightning_dp.mechanisms.keystream import CIPHER
from lightning_dp.mechanisms.noise import NoiseSource
from lightning_dp.modules.row_census import RowCensus
from lightning_dp.networks.generator import Generator

_DOOR = object()  # Only this module can make a Released value.


@dataclass(frozen=True)
class Released:
    """A value that passed the mechanism and is safe to use, log and save.

    Attributes:
        value: The released direction, float32.
        number: The release's number in the ledger.
        noise_std: Std of the noise on each coordinate of the sum that the mechanism perturbed; 0 without privacy.
    """

    value: Tensor
    number: int
    _door: object = field(repr=False)
    noise_std: float = 0.0

    def __post_init__(self) -> None:
        if self._door is not _DOOR:
            raise PrivacyProtocolError("A Released value comes from release() alone; it cannot be made by hand.")

    def map(self, function: Callable[[Tensor], Tensor]) -> "Released":
        """Return the value after post-processing.

        Args:
            function: A function of the released value and public quantities only; nothing private may be captured.
        """
        return Released(function(self.value), self.number, _DOOR, self.noise_std)


@dataclass(frozen=True)
class PublicRows:
    """A promise: these rows were computed from public and released values only.

    `reference` takes nothing else, so that the rows of an ensemble, which are private, cannot be passed by a slip.

    Attributes:
        chunks: The rows.
        is_share: Whether each process brings rows of its own; if not, each brings all of them.
    """

    chunks: Iterable[RecordChunk]
    is_share: bool = False


@dataclass(frozen=True)
class PublicSamples:
    """A promise: these images and labels were drawn from what was released, or are public.

    Attributes:
        images: float32 in [0, 1], (M, C, H, W).
        labels: int64, (M,).
        source: The generator that they were drawn from, released or public, where its parameters may be taken over.
    """

    images: Tensor
    labels: Tensor
    source: Generator | None = None


class ReleaseSession:
    """Joins one mechanism, one plan, one ledger and one noise source for the length of a run.

    Args:
        mechanism: The mechanism.
        plan: Rows, relation and noise, fixed beforehand.
        ledger: Where every release is recorded before it is drawn.
        sampling: How units enter a release.
        noise: The secret noise source.
        public_seed: Seed of public randomness.
        may_release: Asked before each release whether the budget still holds the event; raises if it does not.
        ranks: The processes of the run, whose rows meet in the sum.
        log_raw: Takes numbers computed from private rows without noise; None computes none.

    Raises:
        PrivacyProtocolError: Plan and ledger speak of different relations.
        ConfigurationError: The mechanism, or an accountant, has no proof for these rows.
    """

    def __init__(
        self,
        *,
        mechanism: Mechanism,
        plan: ReleasePlan,
        ledger: PrivacyLedger,
        sampling: Sampling,
        noise: NoiseSource,
        public_seed: int,
        may_release: Callable[[ReleaseEvent, Sampling], None],
        ranks: Ranks = ALONE,
        log_raw: Callable[[str, float], None] | None = None,
    ) -> None:
        mechanism.check(plan.spec)
        if plan.relation is not ledger.relation:
            raise PrivacyProtocolError(
                f"Expected a plan under the ledger's relation {relation_name(ledger.relation)}, got "
                f"{relation_name(plan.relation)}: its sensitivities are of another one."
            )
        check_absence(mechanism, plan, sampling)
        self.mechanism = mechanism
        self.plan = plan
        self.ledger = ledger
        self.sampling = sampling
        self._noise = noise
        self._public_seed = public_seed
        self._may_release = may_release
        self._ranks = ranks
        self._seen = 0  # what this process knows of the last release, for the others to compare
        self._log_raw = log_raw
        self._may_still_release = False

    @property
    def event(self) -> ReleaseEvent:
        """What a release costs now: options of the mechanism may have been changed since the plan was made."""
        return self.mechanism.step_event(self.plan)

    def begin_step(self) -> None:
        """Allow exactly one release; called before each training step."""
        self._may_still_release = True

    def end_step(self) -> None:
        """Check that the step released; called after each training step.

        Raises:
            PrivacyProtocolError: The step made no release: the ledger and the run would drift apart.
        """
        if self._may_still_release:
            raise PrivacyProtocolError(
                "A training step ended without a release(); every private step makes exactly one."
            )

    def release(self, chunks: Iterable[RecordChunk], shape: tuple[int, int], device: torch.device) -> Released:
        """Charge the ledger, encode and sum all rows over all processes, add noise once, decode.

        The number under which the ledger holds the release also names its coins and its noise. The ledger entry is on
        the disk of process 0 before any process draws noise; when one of them fails, or goes another way, nothing has
        been drawn and nothing leaves. All then draw the same noise, so all hold the same released value.

        Args:
            chunks: Private rows, chunk by chunk.
            shape: (num_vectors, vector_dim) of the release; public, as the plan has it.
            device: Where the rows live.

        Returns:
            The released direction, (num_vectors, vector_dim), float32.

        Raises:
            PrivacyProtocolError: A second release in one step, one that would cross the budget, or rows that are not
                those that were charged (`RowCensus`).
            PeerError: Another process failed, or is gone.
        """
        if not self._may_still_release:
            raise PrivacyProtocolError(
                "release() was called twice in one training step (or outside of one), but the budget was planned for "
                "one release a step. Put everything that leaves in a step into one release."
            )
        number, event = len(self.ledger) + 1, self.event
        with self._ranks.together(number, f"{event} {self.sampling} {shape} {CIPHER}", self._seen):
            census = RowCensus(self.plan.spec)
            census.check_shape(shape)
            self._may_release(event, self.sampling)
            self._may_still_release = False
            self.ledger.append(event, self.sampling)
            self._noise.begin(number)
            total = self._encoded_sum(chunks, shape[0], device, number, census)
        total = self._ranks.sum(total)
        if self._log_raw is not None and self.mechanism.is_private:
            noise_energy = self.mechanism.noise_std(self.plan) * total.numel() ** 0.5
            self._log_raw("raw/signal_to_noise", float(total.double().norm()) / noise_energy)
        value = self.mechanism.release(
            total,
            self.plan,
            self._noise,
            release_number=number,
            public_seed=self._public_seed,
            may_overwrite=True,
        )
        if self._ranks.size > 1:
            self._seen = checksum([value])
        return Released(value, number, _DOOR, self.mechanism.noise_std(self.plan))

    def reference(
        self, rows: PublicRows, shape: tuple[int, int], device: torch.device, *, number: int, num_rows: int
    ) -> Tensor:
        """Return what a release would be, without noise, if these *public* rows were the private ones.

        A method that compares released rows with rows of its own samples wants both to pass the same encoding (the same
        random basis, the same clipping), so that what the encoding does to them cancels. Costs nothing: the rows must
        be computed from released and public values only.

        Args:
            rows: Public rows, `num_rows` for each vector.
            shape: (num_vectors, vector_dim).
            device: Where the rows live.
            number: The release whose public randomness is used.
            num_rows: Rows that judge each vector; scaled to the number of private rows.

        Returns:
            The decoded sum, (num_vectors, vector_dim), float32; public.

        Raises:
            PrivacyProtocolError: The rows are not declared public.
        """
        if not isinstance(rows, PublicRows):
            raise PrivacyProtocolError(
                "reference() adds no noise, so it takes PublicRows only: wrap rows that were computed from public and "
                "released values. Rows of an ensemble go through release()."
            )
        with self.mechanism.as_released():
            total = self._encoded_sum(rows.chunks, shape[0], device, number, None)
            total = (self._ranks.sum(total) if rows.is_share else total).to(torch.float64)
            total *= self.plan.spec.rows_per_vector / num_rows
            return self.mechanism.reference(total, self.plan, release_number=number, public_seed=self._public_seed)

    def _encoded_sum(
        self,
        chunks: Iterable[RecordChunk],
        num_vectors: int,
        device: torch.device,
        number: int,
        census: RowCensus | None,
    ) -> Tensor:
        """Return the sum of encoded rows, private ones under a census, public ones without."""
        chunks = chunks if census is None else census.counted(chunks)
        mechanism, spec = self.mechanism, self.plan.spec
        total = torch.zeros(num_vectors, mechanism.encoded_dim(spec), dtype=mechanism.total_dtype, device=device)
        basis = mechanism.public_basis(spec, release_number=number, public_seed=self._public_seed)
        for chunk in rows_where_needed(chunks, mechanism, spec, total):
            rows = chunk.values if basis is None else chunk.in_basis(basis)
            context = EncodeContext(
                release_number=number,
                public_seed=self._public_seed,
                noise=self._noise,
                row_ids=chunk.teacher_ids,
                first_vector=chunk.queries.start or 0,
            )
            encoded = mechanism.encode(rows, spec, context)
            if census is not None:
                census.check_encoded(chunk, encoded)
                encoded = mechanism.perturb_rows(encoded, self.plan, context)
            total[chunk.queries] += encoded.sum(dim=0, dtype=mechanism.total_dtype)
        return total


def check_absence(mechanism: Mechanism, plan: ReleasePlan, sampling: Sampling) -> None:
    """Refuse replace-one under sampling where a record's absence moves the value by more than half the sensitivity.

    The accountant's worst pair for a sampled record that changes is (-1, 1) halves of the sensitivity, with the record
    absent at 0. Rows that never oppose each other, say, are less than two bounds apart and one bound from nothing.

    Raises:
        ConfigurationError: It does.
    """
    if sampling.rate == 1.0 or plan.relation is not NeighboringRelation.REPLACE_ONE or not mechanism.is_private:
        return
    if mechanism.l2_sensitivity(plan.spec, plan.relation) < 2 * mechanism.row_bound(plan.spec) * (1 - 1e-12):
        raise ConfigurationError(
            "privacy.neighboring_relation=replace_one has no proof for these contributions under Poisson sampling: a "
            "record's absence moves a release by more than half of what its change does. Use add_or_remove_one, or "
            "list RowChange(num_toggled=4) as well."
        )


def rows_where_needed(
    chunks: Iterable[RecordChunk], mechanism: Mechanism, spec: ContributionSpec, total: Tensor
) -> Iterator[RowChunk]:
    """Yield what must be encoded row by row; add to `total` what norms alone decide, and let go of it."""
    for chunk in chunks:
        if not isinstance(chunk, SummableRows):
            yield chunk
            continue
        scaling = mechanism.row_scaling(chunk.norm_bounds, spec)
        if scaling is None:
            yield from chunk.row_chunks()
            continue
        chunk.add_weighted_sum(scaling.weights, total[chunk.place, : spec.vector_dim])
        if scaling.appended is not None:
            total[chunk.place, spec.vector_dim :] += scaling.appended.sum(0)
