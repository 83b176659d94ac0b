"""Fidelity and utility of released samples, and the reports made of them."""
