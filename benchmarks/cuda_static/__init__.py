"""What the compilers made of the GPU kernels, read without a GPU: `make cuda-static`. cubin.py reads machine code, report.py judges it."""
