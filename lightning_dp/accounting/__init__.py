"""Privacy events, the ledger of releases, accountants, calibration and claims: numbers only, no tensors."""
