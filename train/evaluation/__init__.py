"""Detect on all ranks, gather once, measure once: the truth, the metric, and the only way from a model to its AP."""
