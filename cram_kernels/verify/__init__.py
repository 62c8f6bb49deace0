"""`python -m cram_kernels verify-gpu`: everything that only a real GPU can show, in one report.

machine.py is a GPU, or what stands for one in a dry run; problems.py the inputs; checks.py, programs.py and bandwidth.py the sections;
part.py those that run kernels, each for a process of its own; report.py the report; command.py the order.
"""
