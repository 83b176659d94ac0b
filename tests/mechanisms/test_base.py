"""What a new mechanism has to say."""

import pytest

from lightning_dp.mechanisms.base import Mechanism


def test_a_mechanism_says_what_it_has_a_proof_for():
    with pytest.raises(TypeError, match=r"Expected Forgetful.kinds, a frozenset out of record, teacher, joint"):

        class Forgetful(Mechanism):
            """Names no kinds."""
