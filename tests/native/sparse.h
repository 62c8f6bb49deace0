// The checks of sparse inference that the harness runs.
#pragma once

// Returns how many failed; adds to `checks` how many there were. run_threads: as in Pool.
int sparse_failures(void (*run_threads)(int threads, void (*body)(void*, int), void* context), int& checks);
