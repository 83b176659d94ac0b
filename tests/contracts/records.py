"""What every record-level method promises of its rows; a test changes one record and measures the encoded sum."""

from types import SimpleNamespace

import torch

from lightning_dp.mechanisms.base import EncodeContext, Mechanism
from lightning_dp.mechanisms.noise import NoiseSource
from lightning_dp.modules.release import rows_where_needed


def clean_sum(module, data, ids: torch.Tensor, mechanism: Mechanism) -> torch.Tensor:
    """Return the sum that would be released without noise for a fixed batch; for tests of sensitivity only."""
    data.setup()
    module.trainer = SimpleNamespace(datamodule=data)
    module.describe_data(data)
    module._record_key = bytes(16)  # the same draws for whatever is compared
    spec = module.contribution_spec()
    total = torch.zeros(spec.num_vectors, mechanism.encoded_dim(spec), dtype=mechanism.total_dtype)
    for chunk in rows_where_needed(module.record_rows(ids), mechanism, spec, total):
        context = EncodeContext(
            release_number=1, public_seed=0, noise=NoiseSource(insecure_seed=0), row_ids=chunk.teacher_ids
        )
        total[chunk.queries] += mechanism.encode(chunk.values, spec, context).sum(0, dtype=mechanism.total_dtype)
    return total


def moves(module, data_class, ids: torch.Tensor, mechanism: Mechanism, *, relation: str) -> list[float]:
    """Return how far the sum moves when one record of the batch leaves it, or changes altogether."""
    data = data_class()
    reference = clean_sum(module, data, ids, mechanism).double()
    found = []
    for record in ids.tolist():
        if relation == "add_or_remove_one":
            other = clean_sum(module, data, ids[ids != record], mechanism)
        else:
            changed = data_class()
            changed.setup()
            changed.train_images[record] = 255 - changed.train_images[record]
            changed.train_labels[record] = 1 - changed.train_labels[record]
            other = clean_sum(module, changed, ids, mechanism)
        found.append(torch.linalg.vector_norm(other.double() - reference).item())
    return found
