"""PCI: the host bridge with its ECAM and windows, and what a function is made of."""
