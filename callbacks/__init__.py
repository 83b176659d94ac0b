"""Thin adapters between Lightning hooks and the classes of ``lightning_dp``."""
