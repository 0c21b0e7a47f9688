"""Moving and keeping VMs: state, memory and disks as streams. Everything here goes through protocol, as QEMU's goes
through KVM."""
