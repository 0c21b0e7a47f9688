"""qemu_user: the user-space half of the hypervisor, as QEMU is to KVM (not qemu-riscv64's user-mode
emulation).

One process per VM: the machine, its devices, their back ends and the management socket. It speaks to kvmcore
through `protocol` only, and knows nothing of instructions or page tables.
"""
