"""Benchmarks that a user can run: `softkvm bench`."""
