"""A model of how fast the CUDA kernels can be at best, from counts; no GPU needed and none asked: `make gpu-model`, docs/gpu-model.md.

counting.py executes the ops on a CPU and reads what an executor of PTX counted; machine.py turns counted PTX into machine instructions;
model.py has the rates of four cards, the bound, and the bars. Nothing here is a measurement.
"""
