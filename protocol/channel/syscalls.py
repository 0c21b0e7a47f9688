"""Numbers of system calls by name (Linux, arch/x86/entry/syscalls/syscall_64.tbl): those that filters name.

Hosts other than x86-64 have others; there no filter is made, and that is said.
"""

from __future__ import annotations

import platform

#: linux/audit.h: what seccomp_data.arch says on this machine; 0: not known here.
AUDIT_ARCH = {"x86_64": 0xC000003E}.get(platform.machine(), 0)
#: On x86-64 numbers from here up are the x32 ABI's, whose calls go by other names.
X32 = 0x4000_0000

_X86_64 = """
read 0 write 1 close 3 stat 4 fstat 5 lstat 6 poll 7 lseek 8 mmap 9 mprotect 10 munmap 11 brk 12 rt_sigaction 13
rt_sigprocmask 14 rt_sigreturn 15 ioctl 16 pread64 17 pwrite64 18 readv 19 writev 20 access 21 select 23
sched_yield 24 mremap 25 madvise 28 dup 32 dup2 33 nanosleep 35 getpid 39 socket 41 connect 42 accept 43 sendto 44
recvfrom 45 sendmsg 46 recvmsg 47 shutdown 48 bind 49 listen 50 getsockname 51 getpeername 52 socketpair 53
setsockopt 54 getsockopt 55 clone 56 fork 57 vfork 58 execve 59 exit 60 wait4 61 kill 62 uname 63 fcntl 72 flock 73
fsync 74 fdatasync 75 ftruncate 77 getcwd 79 rename 82 unlink 87 readlink 89 umask 95 gettimeofday 96 getrusage 98
sysinfo 99 ptrace 101 getuid 102 syslog 103 getgid 104 setuid 105 setgid 106 geteuid 107 getegid 108 getppid 110
setreuid 113 setregid 114 setgroups 116 setresuid 117 setresgid 119 setfsuid 122 setfsgid 123 sigaltstack 131
uselib 134 personality 135 fstatfs 138 getpriority 140 sched_getparam 143 sched_setscheduler 144
sched_getscheduler 145 pivot_root 155 prctl 157 adjtimex 159 chroot 161 acct 163 settimeofday 164 mount 165
umount2 166 swapon 167 swapoff 168 reboot 169 sethostname 170 setdomainname 171 iopl 172 ioperm 173 create_module 174
init_module 175 delete_module 176 quotactl 179 gettid 186 tkill 200 time 201 futex 202 sched_getaffinity 204
getdents64 217 set_tid_address 218 restart_syscall 219 clock_settime 227 clock_gettime 228 clock_getres 229
clock_nanosleep 230 exit_group 231 epoll_wait 232 epoll_ctl 233 tgkill 234 kexec_load 246 add_key 248 request_key 249
keyctl 250 openat 257 newfstatat 262 unlinkat 263 readlinkat 267 faccessat 269 pselect6 270 ppoll 271 unshare 272
set_robust_list 273 epoll_pwait 281 fallocate 285 accept4 288 eventfd2 290 epoll_create1 291 dup3 292 pipe2 293
preadv 295 pwritev 296 perf_event_open 298 fanotify_init 300 prlimit64 302 open_by_handle_at 304 clock_adjtime 305
setns 308 process_vm_readv 310 process_vm_writev 311 kcmp 312 finit_module 313 sched_setattr 314 seccomp 317
getrandom 318 memfd_create 319 kexec_file_load 320 bpf 321 execveat 322 userfaultfd 323 membarrier 324 preadv2 327
pwritev2 328 statx 332 rseq 334 pidfd_send_signal 424 io_uring_setup 425 io_uring_enter 426 io_uring_register 427
open_tree 428 move_mount 429 fsopen 430 fsconfig 431 fsmount 432 fspick 433 pidfd_open 434 clone3 435 close_range 436
pidfd_getfd 438 faccessat2 439 process_madvise 440 epoll_pwait2 441 mount_setattr 442 quotactl_fd 443
landlock_create_ruleset 444 landlock_add_rule 445 landlock_restrict_self 446 futex_waitv 449
"""
_words = _X86_64.split()
NUMBERS: dict[str, int] = {name: int(number) for name, number in zip(_words[::2], _words[1::2], strict=True)}
"""Name -> number on x86-64."""
