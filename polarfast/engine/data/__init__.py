"""Data sets: found on disk, split, decoded, augmented and handed out in reproducible batches."""
