"""Which channels of a model are the same channel, found by one dry run."""
