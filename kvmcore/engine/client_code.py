"""What clients wait with as machine code: LLVM IR text that stands in the image and is copied out of it.

A vDSO: what the kernel gives to its processes so that they need not enter it. Functions of their own, which call nothing
and refer to nothing, with one argument because each costs Python as much as the rest.
`client_run(state)` is the client's half of the doorbell: {score as in running.py, ticks of a spin, ticks until it gives up,
a struct timespec, address of the doorbell words, whether to ring}. Returns exit_reason, or an errno negated, or GAVE_UP:
called again it goes on waiting.
`client_watch(state)` spins until a word changes: {ticks of the spin, ticks without us, number of words, then for each its
address and what it is now}; words have 16 bits. Returns CHANGED, IN_VAIN, or CROWDED: somebody else has had the core for more
than those ticks at a time.
`client_drain(state)` is the device's side of a split virtqueue with event index (virtio 1.2, 2.7) whose requests are one buffer
each that the device reads: it copies them one behind the other and gives them back. {DRAIN}: what they are is told there. The
ring is the guest's, and hostile: each of its fields is read once, and what is not of that kind is left to who called.
Used by kvmcore/vm/vdso.py, mapped by protocol/channel/vdso.py, whose VERSION changes with them.
"""

from __future__ import annotations

from kvmcore.engine.running import BEST_SCORE, CROWDED_SPIN, CROWDED_TICKS, FAILED_SPIN, SPIN_TICKS
from protocol.abi import run_page
from protocol.channel.vdso import CHANGED, CROWDED, DRAIN, GATHERED, GAVE_UP, IN_VAIN, WANTED

RUN, WATCH, DRAINS = "client_run", "client_watch", "client_drain"
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


def _field(name: str, value: str = "") -> str:
    """Where a word of client_drain's state lies, and, as %value, what it is on entry."""
    where = f"  %{name} = getelementptr i8, ptr %words, i64 {8 * DRAIN.index(name)}\n"
    return where + (f"  %{value} = load i64, ptr %{name}\n" if value else "")


DECLARATIONS = ("declare i64 @llvm.readcyclecounter()", "declare void @llvm.x86.sse2.pause()")
TEXT = f"""
define i64 @{RUN}(i64 %state) #1 {{
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
  br i1 %answered, label %paid, label %spin_on
paid:
  %poor = icmp slt i64 %score, {BEST_SCORE}
  %one = zext i1 %poor to i64
  %richer = add i64 %score, %one
  store i64 %richer, ptr %scores
  br label %done
spin_on:
  call void @llvm.x86.sse2.pause()
  %now = call i64 @llvm.readcyclecounter()
  %spent = sub i64 %now, %started
  %gap = sub i64 %now, %earlier
  %gaps = mul i64 %gap, {SPIN_TICKS}
  %crowds = mul i64 %most, {CROWDED_TICKS}
  %crowded = icmp uge i64 %gaps, %crowds
  %late = icmp uge i64 %spent, %most
  %over = or i1 %crowded, %late
  br i1 %over, label %failed, label %spin
failed:
  %price = select i1 %crowded, i64 {CROWDED_SPIN}, i64 {FAILED_SPIN}
  %poorer = sub i64 %score, %price
  store i64 %poorer, ptr %scores
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
  %overdue = icmp ugt i64 %took, %patience
  br i1 %overdue, label %give_up, label %sleep
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
define i64 @{WATCH}(i64 %state) #1 {{
entry:
  %words = inttoptr i64 %state to ptr
  %most = load i64, ptr %words
  %gaps = getelementptr i8, ptr %words, i64 8
  %longest = load i64, ptr %gaps
  %counts = getelementptr i8, ptr %words, i64 16
  %count = load i64, ptr %counts
  %entries = getelementptr i8, ptr %words, i64 24
  %started = call i64 @llvm.readcyclecounter()
  br label %round
round:
  %earlier = phi i64 [ %started, %entry ], [ %now, %on ]
  br label %look
look:
  %index = phi i64 [ 0, %round ], [ %next, %same ]
  %offset = shl i64 %index, 4
  %entry_at = getelementptr i8, ptr %entries, i64 %offset
  %address = load i64, ptr %entry_at
  %known_at = getelementptr i8, ptr %entry_at, i64 8
  %known = load i64, ptr %known_at
  %word = inttoptr i64 %address to ptr
  %half = load volatile i16, ptr %word
  %seen = zext i16 %half to i64
  %equal = icmp eq i64 %seen, %known
  br i1 %equal, label %same, label %changed
changed:
  ret i64 {CHANGED}
same:
  %next = add i64 %index, 1
  %more = icmp ult i64 %next, %count
  br i1 %more, label %look, label %pause
pause:
  call void @llvm.x86.sse2.pause()
  %now = call i64 @llvm.readcyclecounter()
  %gap = sub i64 %now, %earlier
  %crowded = icmp ugt i64 %gap, %longest
  br i1 %crowded, label %crowd, label %on
crowd:
  ret i64 {CROWDED}
on:
  %spent = sub i64 %now, %started
  %may = icmp ult i64 %spent, %most
  br i1 %may, label %round, label %vain
vain:
  ret i64 {IN_VAIN}
}}
define i64 @{DRAINS}(i64 %state) #1 {{
entry:
  %words = inttoptr i64 %state to ptr
{"".join(_field(name, f"{name}_v") for name in DRAIN[:DRAIN.index("next_available")])}
{"".join(_field(name) for name in DRAIN[DRAIN.index("next_available"):])}
  %bell_word = inttoptr i64 %bell_v to ptr
  %available_ring = inttoptr i64 %available_v to ptr
  %available_index = getelementptr i8, ptr %available_ring, i64 2
  %available_heads = getelementptr i8, ptr %available_ring, i64 4
  %count = add i64 %mask_v, 1
  %event_offset = shl i64 %count, 1
  %event_word = getelementptr i8, ptr %available_heads, i64 %event_offset
  %used_ring = inttoptr i64 %used_v to ptr
  %used_index = getelementptr i8, ptr %used_ring, i64 2
  %used_elements = getelementptr i8, ptr %used_ring, i64 4
  %descriptors = inttoptr i64 %table_v to ptr
  %memory = inttoptr i64 %host_v to ptr
  %target = inttoptr i64 %buffer_v to ptr
  %started = call i64 @llvm.readcyclecounter()
  store i64 0, ptr %filled
  store i64 0, ptr %settled
  br label %round
round:
  %earlier = phi i64 [ %started, %entry ], [ %now, %pause ], [ %now, %push ]
  %last = phi i64 [ %started, %entry ], [ %last, %pause ], [ %now, %push ]
  %first = phi i64 [ %started, %entry ], [ %first, %pause ], [ %began, %push ]
  %now = call i64 @llvm.readcyclecounter()
  %rings = load volatile i16, ptr %bell_word
  %rung = zext i16 %rings to i64
  %called = icmp ne i64 %rung, %known_v
  br i1 %called, label %changed, label %ring
changed:
  ret i64 {CHANGED}
ring:
  %index16 = load atomic volatile i16, ptr %available_index acquire, align 2
  %index = zext i16 %index16 to i64
  %next = load i64, ptr %next_available
  %ahead = sub i64 %index, %next
  %waiting = and i64 %ahead, 65535
  %none = icmp eq i64 %waiting, 0
  br i1 %none, label %quiet, label %some
some:
  %too_many = icmp ugt i64 %waiting, %count
  br i1 %too_many, label %changed, label %take
take:
  %slot = and i64 %next, %mask_v
  %slot_offset = shl i64 %slot, 1
  %head_word = getelementptr i8, ptr %available_heads, i64 %slot_offset
  %head16 = load volatile i16, ptr %head_word
  %head = zext i16 %head16 to i64
  %beyond = icmp ugt i64 %head, %mask_v
  br i1 %beyond, label %changed, label %describe
describe:
  %descriptor_offset = shl i64 %head, 4
  %descriptor = getelementptr i8, ptr %descriptors, i64 %descriptor_offset
  %address = load volatile i64, ptr %descriptor
  %length_word = getelementptr i8, ptr %descriptor, i64 8
  %length32 = load volatile i32, ptr %length_word
  %length = zext i32 %length32 to i64
  %flags_word = getelementptr i8, ptr %descriptor, i64 12
  %flags = load volatile i16, ptr %flags_word
  %special = icmp ne i16 %flags, 0
  br i1 %special, label %changed, label %range
range:
  %offset = sub i64 %address, %base_v
  %outside = icmp ugt i64 %offset, %size_v
  br i1 %outside, label %changed, label %end
end:
  %behind = sub i64 %size_v, %offset
  %over = icmp ugt i64 %length, %behind
  br i1 %over, label %changed, label %fit
fit:
  %held = load i64, ptr %filled
  %free = sub i64 %room_v, %held
  %large = icmp ugt i64 %length, %free
  br i1 %large, label %changed, label %copy
copy:
  %source = getelementptr i8, ptr %memory, i64 %offset
  %place = getelementptr i8, ptr %target, i64 %held
  %empty = icmp eq i64 %length, 0
  br i1 %empty, label %push, label %byte
byte:
  %at = phi i64 [ 0, %copy ], [ %after, %byte ]
  %from = getelementptr i8, ptr %source, i64 %at
  %to = getelementptr i8, ptr %place, i64 %at
  %octet = load volatile i8, ptr %from
  store volatile i8 %octet, ptr %to
  %after = add i64 %at, 1
  %more = icmp ult i64 %after, %length
  br i1 %more, label %byte, label %push
push:
  %full = add i64 %held, %length
  store i64 %full, ptr %filled
  %nothing = icmp eq i64 %held, 0
  %began = select i1 %nothing, i64 %now, i64 %first
  %answers = load i64, ptr %next_used
  %element = and i64 %answers, %mask_v
  %element_offset = shl i64 %element, 3
  %element_id = getelementptr i8, ptr %used_elements, i64 %element_offset
  %element_length = getelementptr i8, ptr %element_id, i64 4
  %id = trunc i64 %head to i32
  store volatile i32 %id, ptr %element_id
  store volatile i32 0, ptr %element_length
  %one_more = add i64 %answers, 1
  %answered = and i64 %one_more, 65535
  store i64 %answered, ptr %next_used
  %answered16 = trunc i64 %answered to i16
  store atomic volatile i16 %answered16, ptr %used_index release, align 2
  %following = add i64 %next, 1
  %taken = and i64 %following, 65535
  store i64 %taken, ptr %next_available
  store i64 0, ptr %settled
  br label %round
quiet:
  %gap_now = sub i64 %now, %earlier
  %crowded = icmp ugt i64 %gap_now, %gap_v
  br i1 %crowded, label %crowd, label %gather
crowd:
  ret i64 {CROWDED}
gather:
  %gathered = load i64, ptr %filled
  %any = icmp ne i64 %gathered, 0
  %age = sub i64 %now, %first
  %old = icmp ugt i64 %age, %longest_v
  %enough = and i1 %any, %old
  br i1 %enough, label %hand_over, label %settle_look
hand_over:
  ret i64 {GATHERED}
settle_look:
  %silence = sub i64 %now, %last
  %done_before = load i64, ptr %settled
  %not_yet = icmp eq i64 %done_before, 0
  %calm = icmp ugt i64 %silence, %settle_v
  %should = and i1 %not_yet, %calm
  br i1 %should, label %ask, label %idle_look
ask:
  store i64 1, ptr %settled
  %event16 = load volatile i16, ptr %event_word
  %event = zext i16 %event16 to i64
  %ours = load i64, ptr %next_used
  %told = load i64, ptr %signalled
  %past_event = sub i64 %ours, %event
  %past_less = sub i64 %past_event, 1
  %past = and i64 %past_less, 65535
  %fresh_raw = sub i64 %ours, %told
  %fresh = and i64 %fresh_raw, 65535
  %wanted = icmp ult i64 %past, %fresh
  br i1 %wanted, label %interrupt, label %unwanted
interrupt:
  ret i64 {WANTED}
unwanted:
  store i64 %ours, ptr %signalled
  br label %idle_look
idle_look:
  %idle_now = icmp ugt i64 %silence, %idle_v
  br i1 %idle_now, label %vain, label %pause
vain:
  ret i64 {IN_VAIN}
pause:
  call void @llvm.x86.sse2.pause()
  br label %round
}}
"""
