"""Both kernels against one contract, and what only the real one can show."""
