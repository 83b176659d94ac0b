"""Test classes that every plug-in of a kind inherits."""
