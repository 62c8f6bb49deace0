"""What the compilers made of the GPU kernels, read without a GPU: `make cuda-static`.

compile.py makes a folder of cubins with a sidecar each; cubin.py reads such a folder, whoever compiled it; report.py judges and prints.
"""
