"""What the bytes of the protocol mean: the Linux KVM UAPI for RISC-V, as tables.

Everybody imports from here (client, kvmcore, qemu_user, tests). Nothing here opens, waits for or keeps
anything: numbers, layouts and names only. Importing it must stay cheap, and the exit path uses the plain offsets of
run_page.
"""
