"""The processes of kvmcore: daemon, zygote, VM processes; their sockets, sessions and handles.

On top of everything: imports ioctl and vm, is imported by __main__ only. Decides who may ask, never what an ioctl means.
"""
