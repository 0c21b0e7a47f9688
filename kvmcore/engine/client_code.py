"""The client's half of the doorbell as machine code: LLVM IR text that stands in the image and is copied out of it.

A vDSO: what the kernel gives to its processes so that they need not enter it. One function of its own, which calls nothing
and refers to nothing: `client_run(state)`, which has one argument because each costs Python as much as the rest.
state: {score as in running.py, ticks of a spin, ticks until it gives up, a struct timespec, address of the doorbell words,
whether to ring}. Returns exit_reason, or an errno negated, or GAVE_UP: called again it goes on waiting. Used by
kvmcore/vm/vdso.py, mapped by protocol/channel/vdso.py, whose VERSION changes with it.
"""

from __future__ import annotations

from kvmcore.engine.running import FAILED_SPIN, GAP_SHIFT
from protocol.abi import run_page
from protocol.channel.vdso import GAVE_UP

NAME = "client_run"
_REQUEST, _REPLY, _RET, _ERRNO, _BELL_SLEEPS, _REPLY_SLEEPS, _REASON = (
    at - run_page.DOORBELL_BELL
    for at in (
        run_page.DOORBELL_REQUEST,
        run_page.DOORBELL_REPLY,
        run_page.DOORBELL_RET,
        run_page.DOORBELL_ERRNO,
        run_page.DOORBELL_BELL_SLEEPS,
        run_page.DOORBELL_REPLY_SLEEPS,
        run_page.EXIT_REASON,
    )
)
_FUTEX = (
    'call i64 asm sideeffect "syscall", "={{rax}},{{rax}},{{rdi}},{{rsi}},{{rdx}},{{r10}},'
    '~{{rcx}},~{{r11}},~{{memory}},~{{dirflag}},~{{fpsr}},~{{flags}}"(i64 202, i64 {0}, i64 {1}, i64 {2}, i64 {3})'
)
DECLARATIONS = ("declare i64 @llvm.readcyclecounter()", "declare void @llvm.x86.sse2.pause()")
TEXT = f"""
define i64 @{NAME}(i64 %state) #1 {{
entry:
  %scores = inttoptr i64 %state to ptr
  %bell_at = getelementptr i8, ptr %scores, i64 40
  %bell = load i64, ptr %bell_at
  %ring_at = getelementptr i8, ptr %scores, i64 48
  %ring = load i64, ptr %ring_at
  %bells = inttoptr i64 %bell to ptr
  %requests = getelementptr i8, ptr %bells, i64 {_REQUEST}
  %replies = getelementptr i8, ptr %bells, i64 {_REPLY}
  %ours = getelementptr i8, ptr %bells, i64 {_REPLY_SLEEPS}
  %started = call i64 @llvm.readcyclecounter()
  %before = load volatile i32, ptr %requests
  %new = icmp ne i64 %ring, 0
  br i1 %new, label %request, label %prepare
request:
  %next = add i32 %before, 1
  store volatile i32 %next, ptr %requests
  %rung = atomicrmw add ptr %bells, i32 1 seq_cst
  %theirs = getelementptr i8, ptr %bells, i64 {_BELL_SLEEPS}
  %asleep = load atomic i32, ptr %theirs seq_cst, align 4
  %must_wake = icmp ne i32 %asleep, 0
  br i1 %must_wake, label %wake, label %prepare
wake:
  %woken = {_FUTEX.format("%bell", 1, 0x7FFFFFFF, 0)}
  br label %prepare
prepare:
  %number = phi i32 [ %before, %entry ], [ %next, %request ], [ %next, %wake ]
  %score = load i64, ptr %scores
  %mosts = getelementptr i8, ptr %scores, i64 8
  %most = load i64, ptr %mosts
  %pays = icmp sge i64 %score, 0
  br i1 %pays, label %spin, label %sleep
spin:
  %earlier = phi i64 [ %started, %prepare ], [ %now, %spin_on ]
  %seen = load volatile i32, ptr %replies
  %answered = icmp eq i32 %seen, %number
  br i1 %answered, label %done, label %spin_on
spin_on:
  call void @llvm.x86.sse2.pause()
  %now = call i64 @llvm.readcyclecounter()
  %spent = sub i64 %now, %started
  %gap = sub i64 %now, %earlier
  %gaps = shl i64 %gap, {GAP_SHIFT}
  %worse = icmp ugt i64 %gaps, %spent
  %worst = select i1 %worse, i64 %gaps, i64 %spent
  %may = icmp ult i64 %worst, %most
  br i1 %may, label %spin, label %failed
failed:
  store i64 -{FAILED_SPIN}, ptr %scores
  br label %sleep
sleep:
  store atomic i32 1, ptr %ours seq_cst, align 4
  %last = load atomic i32, ptr %replies seq_cst, align 4
  %came = icmp eq i32 %last, %number
  br i1 %came, label %awake, label %wait
wait:
  %timeout = add i64 %state, 24
  %word = ptrtoint ptr %replies to i64
  %expected = zext i32 %last to i64
  %slept = {_FUTEX.format("%word", 0, "%expected", "%timeout")}
  br label %awake
awake:
  store atomic i32 0, ptr %ours seq_cst, align 4
  %found = load atomic i32, ptr %replies seq_cst, align 4
  %good = icmp eq i32 %found, %number
  %then = call i64 @llvm.readcyclecounter()
  %took = sub i64 %then, %started
  br i1 %good, label %judge, label %again
again:
  %patiences = getelementptr i8, ptr %scores, i64 16
  %patience = load i64, ptr %patiences
  %late = icmp ugt i64 %took, %patience
  br i1 %late, label %give_up, label %sleep
give_up:
  store i64 0, ptr %ring_at
  ret i64 {GAVE_UP}
judge:
  %short = icmp ult i64 %took, %most
  %now_score = load i64, ptr %scores
  %low = icmp slt i64 %now_score, 0
  %better = and i1 %short, %low
  %gain = zext i1 %better to i64
  %learnt = add i64 %now_score, %gain
  store i64 %learnt, ptr %scores
  br label %done
done:
  store i64 1, ptr %ring_at
  %rets = getelementptr i8, ptr %bells, i64 {_RET}
  %ret = load volatile i32, ptr %rets
  %success = icmp eq i32 %ret, 0
  %where = select i1 %success, i64 {_REASON}, i64 {_ERRNO}
  %values = getelementptr i8, ptr %bells, i64 %where
  %value = load volatile i32, ptr %values
  %wide = zext i32 %value to i64
  %negated = sub i64 0, %wide
  %result = select i1 %success, i64 %wide, i64 %negated
  ret i64 %result
}}
"""
