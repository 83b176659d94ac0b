"""Where private rows come from: teacher ensembles and per-record gradients."""
