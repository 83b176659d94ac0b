"""Data modules: verified files, teacher partitions, fetching."""
