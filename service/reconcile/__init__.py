"""The engine: commands in, events to the log, steps to the kernel, and the loop that keeps the two agreed."""
