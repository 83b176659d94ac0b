"""Tests of lightning_dp.accounting."""
