"""A small world in which everything runs: a drawn corpus, models trained on it, and their server."""
