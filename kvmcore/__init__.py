"""kvmcore: the analogue of the KVM kernel module, as ordinary host processes.

The daemon (`python -m kvmcore`) answers for /dev/kvm; each VM is a process of its own, forked from a warm zygote.
Imports `protocol`, never `qemu_user`. This file stays empty of imports: a VM process must not pay for what it
does not use, and llvmlite must never be reachable from here.
"""
