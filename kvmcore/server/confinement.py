"""What a VM process keeps of its user's rights: it runs guest code, so it gives up all that a VM does not need.

Called by vm_process.py: files() before there are threads, calls() when everything is open. It keeps: reading Python's and
our own files and /proc/self, removing its two sockets, memory, threads, Unix sockets, descriptors that it is given. It loses:
starting processes, writing or creating files, the network, signals to others, memory that is writable and executable at once.
"""

from __future__ import annotations

import logging
import os
import resource
import sys
from errno import ENOSYS
from functools import cache
from pathlib import Path

from protocol.channel import confinement
from protocol.channel.confinement import If, equal

log = logging.getLogger("kvmcore.vm")

_AF_UNIX = 1
_CLONE_THREAD = 0x10000
_PR_SET_NAME = 15
_WRITE_OR_CREATE = os.O_ACCMODE | os.O_CREAT | os.O_TRUNC
_TCGETS, _FIONREAD, _FIONBIO, _FIOCLEX = 0x5401, 0x541B, 0x5421, 0x5451
_WRITE, _EXEC = 2, 4

_ALWAYS = (
    # first what a running VM does all the time
    "futex", "read", "write", "epoll_wait", "recvmsg", "sendmsg", "poll", "preadv2", "sendto", "recvfrom", "getpid",
    "clock_gettime", "clock_nanosleep", "madvise", "munmap", "brk", "close", "epoll_ctl", "fcntl", "lseek", "readv", "writev",
    "epoll_pwait", "ppoll", "select", "pselect6", "gettid", "sched_yield", "nanosleep", "restart_syscall", "rt_sigreturn",
    "rt_sigprocmask", "rt_sigaction", "sigaltstack", "set_robust_list", "rseq", "exit", "exit_group", "membarrier", "mremap",
    "eventfd2", "memfd_create", "ftruncate", "fallocate", "dup", "dup3", "pipe2", "epoll_create1", "getrandom", "pread64",
    "pwrite64", "accept4", "accept", "connect", "shutdown", "getsockopt", "setsockopt", "getsockname", "getpeername",
    "pidfd_open",
    "newfstatat", "fstat", "stat", "lstat", "statx", "access", "faccessat", "faccessat2", "getdents64", "readlink",
    "readlinkat", "getcwd", "unlink", "umask", "uname", "sysinfo", "getuid", "geteuid", "getgid", "getegid", "getrusage",
    "gettimeofday", "time", "clock_getres", "sched_getaffinity", "sched_getparam", "sched_getscheduler", "sched_setscheduler",
    "set_tid_address", "rename", "getpriority", "sched_setattr",
)  # fmt: skip

KILL = frozenset(
    (
        "execve", "execveat", "ptrace", "process_vm_readv", "process_vm_writev", "pidfd_getfd", "kcmp", "mount", "umount2",
        "pivot_root", "chroot", "unshare", "setns", "open_tree", "move_mount", "fsopen", "fsconfig", "fsmount", "fspick",
        "mount_setattr", "bpf", "perf_event_open", "kexec_load", "kexec_file_load", "init_module", "finit_module",
        "delete_module", "keyctl", "add_key", "request_key", "io_uring_setup", "io_uring_enter", "io_uring_register",
        "userfaultfd", "open_by_handle_at", "reboot", "iopl", "ioperm",
    )
)  # fmt: skip
"""Nothing that we do ever calls these: whoever does is no longer us."""


def rules() -> confinement.Filter:
    """The filter of a VM process that has everything open."""
    return confinement.Filter(
        kill=KILL,
        errnos={"clone3": ENOSYS},  # its flags cannot be seen from here; glibc then uses clone
        allow={
            **dict.fromkeys(_ALWAYS, ()),
            "openat": (If(2, _WRITE_OR_CREATE, (os.O_RDONLY,)),),
            "mmap": (If(2, _WRITE | _EXEC, (0, _WRITE, _EXEC)),),
            "mprotect": (If(2, _EXEC, (0,)),),
            "socket": (equal(0, _AF_UNIX),),
            "clone": (If(0, _CLONE_THREAD, (_CLONE_THREAD,)),),
            "ioctl": (equal(1, _TCGETS, _FIONREAD, _FIONBIO, _FIOCLEX),),
            "prctl": (equal(0, _PR_SET_NAME),),
            "prlimit64": (equal(0, 0),),
            "tgkill": (equal(0, os.getpid()),),
        },
    )


@cache
def readable() -> list[str]:
    """What every VM may read; called by the zygote, so that its children need not look (each page that looking touches is
    memory of their own)."""
    root = str(Path(__file__).parents[2])
    found = {*(os.path.realpath(path) for path in sys.path if path), sys.prefix, sys.base_prefix, root}
    return sorted(found | {"/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/dev/null", "/proc/self"})


def files(private_dir: str, *, network: bool) -> None:
    """Leave of the file system what a VM needs. Before there are threads: it is each thread's own, and inherited."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the guest's memory is not for a file in somebody's directory
    paths = dict.fromkeys(readable(), confinement.READ)
    paths[private_dir] = confinement.READ | confinement.REMOVE_FILE | confinement.MAKE_SOCK
    try:
        confinement.landlock(paths, network=network)
    except OSError as error:
        log.info("without Landlock: %s", error)


def calls() -> None:
    """Leave the system calls that a VM needs, in all threads. Everything is open by now."""
    try:
        confinement.seccomp(rules())
    except OSError as error:
        log.info("without seccomp: %s", error)


def missing() -> list[str]:
    """What this host lacks of the above; [] as it should be."""
    lacks = []
    if not confinement.seccomp_available():
        lacks.append("seccomp filters")
    if not confinement.landlock_version():
        lacks.append("Landlock")
    return lacks
