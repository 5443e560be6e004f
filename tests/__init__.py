"""The tests, by room; `tests/run` starts them."""
