"""Running VMs from outside: the registry, the QMP socket, its commands."""
