"""Empirical lower bounds on epsilon and checks of the premises of a claim, made through the real objects of a run."""
