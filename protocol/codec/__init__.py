"""Bytes in, records out, and back. No input or output, no clock, no threads: pure functions on bytes."""
