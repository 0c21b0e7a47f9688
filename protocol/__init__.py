"""protocol: the language that kvmcore and qemu_user speak, the Linux KVM UAPI over ZeroMQ.

`abi` says what bytes mean, `codec` turns frames into records and back, `channel` moves bytes without policy,
`client` is the "libkvm" of typed handles. Imports nothing else of this project.
"""
