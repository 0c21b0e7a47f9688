"""The qcow2 image format (docs/interop/qcow2 of QEMU): tables, reference counts, reading and writing, creating, checking."""
