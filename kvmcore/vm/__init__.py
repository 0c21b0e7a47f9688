"""The objects behind the handles: VM, vCPU, memory, interrupt controllers. Called by kvmcore/ioctl and
kvmcore/server; must never know of sockets or frames."""
