"""CrAM, the compression-aware minimizer (ICLR 2023), as kernels about as fast as copying the weights once."""
