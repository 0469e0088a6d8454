"""Data sources, partitions and the batches that clients read."""
