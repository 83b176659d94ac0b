"""Mechanisms: rows of private contributions in, one safe release out."""
