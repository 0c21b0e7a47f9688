"""Input and output without policy: Unix sockets with descriptors, shared memory, doorbells, ZeroMQ sockets.
Moves bytes; knows no ioctl and no struct."""
