"""The parts of `reconstruct`: layers and what flows through them, sums and least squares, the report."""
