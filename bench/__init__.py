"""The figures, each next to what it is compared with, measured in the same run. `make bench` runs them all."""
