"""What each effect of a traced instruction means natively: one handler, as IR text.

A handler has two flavours. The fast one looks its memory accesses up in the TLB and jumps to the slow one when that
fails; the slow one, out of line, does them by calls into softmmu.py, which can do every access. Called by
interpreter.py. Never decides what an instruction does.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvmcore.engine import hart_state, layout
from kvmcore.engine.exits import ExitKind
from kvmcore.engine.native import CONVENTION, SIGNATURE, arguments
from kvmcore.ir.emit import Writer, emit_tree, name, typed
from kvmcore.ir.trace import Block, Op
from kvmcore.ir.value import Value

#: Effects that can end the instruction before anything of it has happened.
MEMORY = {"load", "store", "load_reserved", "store_conditional", "amo", "zero_block", "check_block"}
#: Effects after which it must not be started again.
_COMMITS = {"set_x", "set_f", "set", "set_at", "atomic_field", "store", "store_conditional", "amo", "fence_i"}
#: Writing one of these fields can make an interrupt due.
_INTERRUPT_FIELDS = {"sip", "sie", "stimecmp", "eidelivery", "eithreshold", "eip", "eie"}
LIKELY, UNLIKELY = ", !prof !1", ", !prof !0"


class LoweringError(Exception):
    """A trace that cannot become a handler."""


def operations(block: Block) -> Iterator[Op]:
    """All operations of a tree."""
    yield from block.ops
    for successor in (block.if_true, block.if_false):
        if successor is not None:
            yield from operations(successor)


def check_order(handler: str, block: Block, committed: bool = False) -> None:
    """LoweringError if a path accesses memory after it has changed something: it could not be restarted."""
    for op in block.ops:
        if committed and op.opcode in MEMORY:
            raise LoweringError(f"{handler}: {op.opcode} after an effect")
        committed = committed or op.opcode in _COMMITS
    for successor in (block.if_true, block.if_false):
        if successor is not None:
            check_order(handler, successor, committed)


class StateLowering:
    """Effects on the hart's fields; shared by handlers and routines."""

    def state_effect(self, out: Writer, op: Op) -> bool:
        """Write `op` if it is about state; whether it was."""
        method = getattr(self, f"_state_{op.opcode}", None)
        if method is None:
            return False
        method(out, op)
        return True

    def _field(self, out: Writer, field: str) -> tuple[str, int]:
        pointer = out.let(f"getelementptr i8, ptr %sp, i64 {hart_state.offset(field)}", "p")
        return pointer, hart_state.BY_NAME[field].bits

    def _element(self, out: Writer, field: str, index: Value) -> tuple[str, int]:
        pointer, bits = self._field(out, field)
        return out.let(f"getelementptr i{bits}, ptr {pointer}, i64 {name(index)}", "p"), bits

    def _register(self, out: Writer, file: str, index: Value) -> str:
        pointer = "%sp" if file == "x" else self._field(out, file)[0]
        wide = str(index.const) if index.const is not None else out.let(f"zext i8 {name(index)} to i64")
        return out.let(f"getelementptr i64, ptr {pointer}, i64 {wide}", "p")

    def _touched(self, out: Writer, field: str) -> None:
        if field in _INTERRUPT_FIELDS:
            pointer, bits = self._field(out, "interrupt_hint")
            out.put(f"store volatile i{bits} 1, ptr {pointer}")

    def _state_get_x(self, out: Writer, op: Op) -> None:
        out.put(f"{_result(op)} = load i64, ptr {self._register(out, 'x', op.args[0])}")

    def _state_get_f(self, out: Writer, op: Op) -> None:
        out.put(f"{_result(op)} = load i64, ptr {self._register(out, 'f', op.args[0])}")

    def _state_set_x(self, out: Writer, op: Op) -> None:
        out.put(f"store {typed(op.args[1])}, ptr {self._register(out, 'x', op.args[0])}")

    def _state_set_f(self, out: Writer, op: Op) -> None:
        out.put(f"store {typed(op.args[1])}, ptr {self._register(out, 'f', op.args[0])}")

    def _state_get(self, out: Writer, op: Op) -> None:
        field = str(op.attrs[0])
        pointer, bits = self._field(out, field)
        if field == "fflags":
            out.put(f"{_result(op)} = call i8 @read_fflags(i64 %s)")
            return
        volatile = "volatile " if hart_state.BY_NAME[field].shared else ""
        out.put(f"{_result(op)} = load {volatile}i{bits}, ptr {pointer}")

    def _state_set(self, out: Writer, op: Op) -> None:
        field = str(op.attrs[0])
        pointer, _ = self._field(out, field)
        volatile = "volatile " if hart_state.BY_NAME[field].shared else ""
        if field in ("fflags", "frm"):
            out.put(f"call void @write_{field}(i64 %s, {typed(op.args[0])})")
            return
        out.put(f"store {volatile}{typed(op.args[0])}, ptr {pointer}")
        self._touched(out, field)

    def _state_get_at(self, out: Writer, op: Op) -> None:
        pointer, bits = self._element(out, str(op.attrs[0]), op.args[0])
        out.put(f"{_result(op)} = load volatile i{bits}, ptr {pointer}")

    def _state_set_at(self, out: Writer, op: Op) -> None:
        pointer, _ = self._element(out, str(op.attrs[0]), op.args[0])
        out.put(f"store volatile {typed(op.args[1])}, ptr {pointer}")
        self._touched(out, str(op.attrs[0]))

    def _state_atomic_field(self, out: Writer, op: Op) -> None:
        operation, field = str(op.attrs[0]), str(op.attrs[1])
        pointer, _ = self._element(out, field, op.args[0])
        out.put(f"{_result(op)} = atomicrmw volatile {operation} ptr {pointer}, {typed(op.args[1])} seq_cst")
        self._touched(out, field)

    def _state_time(self, out: Writer, op: Op) -> None:
        out.put(f"{_result(op)} = call i64 @read_time(i64 %s)")

    def _state_routine(self, out: Writer, op: Op) -> None:
        out.put(f"{_result(op)} = call i64 @{op.attrs[0]}(i64 %s)")


class HandlerLowering(StateLowering):
    """One handler. near: branches stay in the page. slow: memory by calls. plain: its accesses may become MMIO."""

    def __init__(self, handler: str, length: int, near: bool, slow: bool, plain: bool) -> None:
        self._handler, self._length, self._near, self._slow, self._plain = handler, length, near, slow, plain
        self.path: object = ("", False)

    def function(self, tree: Block) -> str:
        """The whole definition."""
        out = Writer()
        out.put("%sp = inttoptr i64 %s to ptr")
        emit_tree(out, tree, self)
        suffix = ".slow" if self._slow else ""
        head = f"define internal {CONVENTION} void @{self._handler}{suffix}({SIGNATURE}) #{1 if self._slow else 0} {{"
        return "\n".join([head, "entry:", *out.lines, "}", ""])

    def effect(self, out: Writer, op: Op) -> None:
        if self.state_effect(out, op):
            return
        method = getattr(self, f"_lower_{op.opcode}", None)
        if method is None:
            raise LoweringError(f"{self._handler}: no lowering for {op.opcode}")
        method(out, op)

    # -- going on ----------------------------------------------------------------------------------------------------
    def _tail(self, out: Writer, target: str, **changed: str) -> None:
        out.put(f"musttail call {CONVENTION} void @{target}({arguments(**changed)})")
        out.end("ret void")

    def _dispatch(self, out: Writer, **changed: str) -> None:
        ip = out.let(f"inttoptr i64 {changed['ip']} to ptr", "p")
        record = out.let(f"load atomic i64, ptr {ip} unordered, align 8", "rec")
        offset = out.let(f"lshr i64 {record}, 32")
        address = out.let(f"add i64 {offset}, %base")
        target = out.let(f"inttoptr i64 {address} to ptr", "p")
        out.put(f"musttail call {CONVENTION} void {target}({arguments(**changed, rec=record)})")
        out.end("ret void")

    def _retired(self, out: Writer) -> str:
        return out.let("add i64 %icount, 1", "icount")

    def _store_state(self, out: Writer, field: str, value: str) -> None:
        pointer, bits = self._field(out, field)
        out.put(f"store i{bits} {value}, ptr {pointer}")

    def _load_state(self, out: Writer, field: str, volatile: bool = False) -> str:
        pointer, bits = self._field(out, field)
        return out.let(f"load {'volatile ' if volatile else ''}i{bits}, ptr {pointer}")

    def _pc(self, out: Writer) -> str:
        distance = out.let("sub i64 %ip, %abase")
        return out.let(f"ashr i64 {distance}, 2", "pc")

    def _lower_pc(self, out: Writer, op: Op) -> None:
        distance = out.let("sub i64 %ip, %abase")
        out.put(f"{_result(op)} = ashr i64 {distance}, 2")

    @property
    def _context(self) -> str:
        """Condition: the fetch context has changed; "" if it cannot have."""
        assert isinstance(self.path, tuple)
        return str(self.path[0])

    @property
    def _refetch(self) -> bool:
        """The next instruction must be translated anew."""
        assert isinstance(self.path, tuple)
        return bool(self.path[1])

    def _lower_next(self, out: Writer, op: Op) -> None:
        if self._refetch or self._context:
            target = out.let(f"add i64 {self._pc(out)}, {self._length}")
            if self._refetch:
                self._store_state(out, "pc", target)
                self._tail(out, "fetch", icount=self._retired(out))
                return
            same, moved = out.fresh("same"), out.fresh("moved")
            out.end(f"br i1 {self._context}, label %{moved}, label %{same}")
            out.label(moved)
            self._store_state(out, "pc", target)
            self._tail(out, "fetch", icount=self._retired(out))
            out.label(same)
            following = out.let(f"add i64 %ip, {self._length * 4}", "ip")
            self._dispatch(out, ip=following, icount=self._retired(out), tlb=self._load_state(out, "tlb"))
            return
        following = out.let(f"add i64 %ip, {self._length * 4}", "ip")
        self._dispatch(out, ip=following, icount=self._retired(out))

    def _go(self, out: Writer, ip: str, abase: str = "%abase") -> None:
        """A taken branch to a known record."""
        retired = self._retired(out)
        limit = self._load_state(out, "limit", volatile=True)
        due = out.let(f"icmp uge i64 {retired}, {limit}")
        poll, on = out.fresh("poll"), out.fresh("on")
        out.end(f"br i1 {due}, label %{poll}, label %{on}{UNLIKELY}")
        out.label(poll)
        self._tail(out, "branch_poll", ip=ip, abase=abase, icount=retired)
        out.label(on)
        self._dispatch(out, ip=ip, abase=abase, icount=retired)

    def _lower_branch(self, out: Writer, op: Op) -> None:
        if self._near:
            distance = out.let(f"shl i64 {name(op.args[0])}, 2")
            self._go(out, out.let(f"add i64 %ip, {distance}", "ip"))
        else:
            self._indirect(out, out.let(f"add i64 {self._pc(out)}, {name(op.args[0])}"))

    def _lower_jump(self, out: Writer, op: Op) -> None:
        if self._context:  # translation has changed: registers of the engine are stale
            self._store_state(out, "pc", name(op.args[0]))
            self._tail(out, "fetch", icount=self._retired(out))
        else:
            self._indirect(out, name(op.args[0]))

    def _indirect(self, out: Writer, target: str) -> None:
        page = out.let(f"and i64 {target}, -4096")
        shifted = out.let(f"lshr i64 {target}, {12 - 4}")
        index = out.let(f"and i64 {shifted}, {(layout.FETCH_ENTRIES - 1) * layout.FETCH_ENTRY}")
        table = self._load_state(out, "fetch_tlb")
        address = out.let(f"add i64 {table}, {index}")
        entry = out.let(f"inttoptr i64 {address} to ptr", "p")
        tag = out.let(f"load i64, ptr {entry}")
        known = out.let(f"icmp eq i64 {tag}, {page}")
        hit, miss = out.fresh("hit"), out.fresh("miss")
        out.end(f"br i1 {known}, label %{hit}, label %{miss}{LIKELY}")
        out.label(miss)
        self._store_state(out, "pc", target)
        self._tail(out, "fetch", icount=self._retired(out))
        out.label(hit)
        pointer = out.let(f"getelementptr i8, ptr {entry}, i64 8", "p")
        abase = out.let(f"load i64, ptr {pointer}", "abase")
        scaled = out.let(f"shl i64 {target}, 2")
        self._go(out, out.let(f"add i64 {abase}, {scaled}", "ip"), abase)

    def _lower_check_interrupts(self, out: Writer, op: Op) -> None:
        """Only if the hint says that one may be due; otherwise go on as if nothing had been asked."""
        hint = self._load_state(out, "interrupt_hint", volatile=True)
        quiet = out.let(f"icmp eq i8 {hint}, 0")
        look, on = out.fresh("look"), out.fresh("on")
        out.end(f"br i1 {quiet}, label %{on}, label %{look}")
        out.label(look)
        target = name(op.args[0]) if op.args else out.let(f"add i64 {self._pc(out)}, {self._length}")
        self._store_state(out, "pc", target)
        self._tail(out, "resume", icount=self._retired(out))
        out.label(on)
        if op.args:
            self._lower_jump(out, op)
        else:
            self._lower_next(out, op)

    def _lower_trap(self, out: Writer, op: Op) -> None:
        self._store_state(out, "trap_cause", name(op.args[0]))
        if len(op.args) == 2:
            self._store_state(out, "trap_value", name(op.args[1]))
            self._tail(out, "take_trap")
        else:
            self._tail(out, "take_trap_bits")

    def _lower_exit(self, out: Writer, op: Op) -> None:
        kind = str(op.attrs[0])
        if kind == "WFI":
            self._tail(out, "wait_for_interrupt")
            return
        self._store_state(out, "exit_kind", str(int(ExitKind[kind])))
        self._tail(out, "leave_bits")

    def _lower_instret(self, out: Writer, op: Op) -> None:
        out.put(f"{_result(op)} = add i64 %icount, 0")

    # -- memory ------------------------------------------------------------------------------------------------------
    def _look_up(self, out: Writer, address: Value, size: int, tag_offset: int) -> str:
        """Host address of a virtual one, by the TLB; the slow flavour takes over where it does not know."""
        last = name(address) if size == 1 else out.let(f"add i64 {name(address)}, {size - 1}")
        page = out.let(f"and i64 {last}, -4096")
        shifted = out.let(f"lshr i64 {name(address)}, {12 - 5}")
        index = out.let(f"and i64 {shifted}, {(layout.DATA_ENTRIES - 1) * layout.DATA_ENTRY}")
        entry_address = out.let(f"add i64 %tlb, {index}")
        entry = out.let(f"inttoptr i64 {entry_address} to ptr", "entry")
        tag_pointer = out.let(f"getelementptr i8, ptr {entry}, i64 {tag_offset}", "p")
        tag = out.let(f"load i64, ptr {tag_pointer}")
        known = out.let(f"icmp eq i64 {tag}, {page}")
        hit, miss = out.fresh("hit"), out.fresh("miss")
        out.end(f"br i1 {known}, label %{hit}, label %{miss}{LIKELY}")
        out.label(miss)
        self._tail(out, f"{self._handler}.slow")
        out.label(hit)
        pointer = out.let(f"getelementptr i8, ptr {entry}, i64 {layout.ADDEND}", "p")
        addend = out.let(f"load i64, ptr {pointer}")
        return out.let(f"add i64 {addend}, {name(address)}", "host")

    def _call(self, out: Writer, function: str, *args: str) -> None:
        """A helper that returns a status; goes on only if that is OK."""
        status = out.let(f"call i64 @{function}({', '.join('i64 ' + arg for arg in args)})", "status")
        done = out.let(f"icmp eq i64 {status}, 0")
        good, bad = out.fresh("good"), out.fresh("bad")
        out.end(f"br i1 {done}, label %{good}, label %{bad}")
        out.label(bad)
        self._store_state(out, "status", status)
        self._tail(out, "fault")
        out.label(good)

    def _host_address(self, out: Writer, address: Value, size: int, write: bool) -> str:
        if not self._slow:
            return self._look_up(out, address, size, layout.TAG_WRITE if write else layout.TAG_READ)
        kind = "store" if write else "load"
        self._call(out, f"host_address_{kind}", "%s", "%tlb", name(address), str(size), "0")
        return self._load_state(out, "slow_value")

    def _lower_load(self, out: Writer, op: Op) -> None:
        assert op.result is not None
        bits = op.result.width
        if not self._slow:
            host = self._look_up(out, op.args[0], bits // 8, layout.TAG_READ)
            pointer = out.let(f"inttoptr i64 {host} to ptr", "p")
            out.put(f"{_result(op)} = load volatile i{bits}, ptr {pointer}, align 1")
            return
        self._call(out, "slow_load", "%s", "%tlb", name(op.args[0]), str(bits // 8), str(int(self._plain)))
        value = self._load_state(out, "slow_value")
        out.put(f"{_result(op)} = trunc i64 {value} to i{bits}" if bits < 64 else f"{_result(op)} = add i64 {value}, 0")

    def _lower_store(self, out: Writer, op: Op) -> None:
        address, value = op.args
        bits = value.width
        if not self._slow:
            host = self._look_up(out, address, bits // 8, layout.TAG_WRITE)
            pointer = out.let(f"inttoptr i64 {host} to ptr", "p")
            out.put(f"store volatile {typed(value)}, ptr {pointer}, align 1")
            return
        wide = out.let(f"zext {typed(value)} to i64") if bits < 64 else name(value)
        self._call(out, "slow_store", "%s", "%tlb", name(address), str(bits // 8), str(int(self._plain)), wide)

    def _lower_amo(self, out: Writer, op: Op) -> None:
        operation = {"swap": "xchg", "minu": "umin", "maxu": "umax"}.get(str(op.attrs[0]), str(op.attrs[0]))
        address, value = op.args
        host = self._host_address(out, address, value.width // 8, write=True)
        pointer = out.let(f"inttoptr i64 {host} to ptr", "p")
        out.put(f"{_result(op)} = atomicrmw volatile {operation} ptr {pointer}, {typed(value)} seq_cst")

    def _lower_load_reserved(self, out: Writer, op: Op) -> None:
        assert op.result is not None
        bits = op.result.width
        host = self._host_address(out, op.args[0], bits // 8, write=False)
        pointer = out.let(f"inttoptr i64 {host} to ptr", "p")
        out.put(f"{_result(op)} = load atomic volatile i{bits}, ptr {pointer} seq_cst, align {bits // 8}")
        wide = out.let(f"zext i{bits} {_result(op)} to i64") if bits < 64 else _result(op)
        self._store_state(out, "reservation_address", host)
        self._store_state(out, "reservation_value", wide)
        self._store_state(out, "reservation_size", str(bits // 8))
        self._store_state(out, "reservation_valid", "1")

    def _lower_store_conditional(self, out: Writer, op: Op) -> None:
        address, value = op.args
        bits = value.width
        host = self._host_address(out, address, bits // 8, write=True)
        valid = out.let(f"icmp ne i8 {self._load_state(out, 'reservation_valid')}, 0")
        there = out.let(f"icmp eq i64 {self._load_state(out, 'reservation_address')}, {host}")
        fits = out.let(f"icmp eq i64 {self._load_state(out, 'reservation_size')}, {bits // 8}")
        both = out.let(f"and i1 {valid}, {there}")
        held = out.let(f"and i1 {both}, {fits}")
        self._store_state(out, "reservation_valid", "0")
        begin, attempt, done = out.fresh("begin"), out.fresh("attempt"), out.fresh("done")
        out.label(begin)
        out.end(f"br i1 {held}, label %{attempt}, label %{done}")
        out.label(attempt)
        expected = self._load_state(out, "reservation_value")
        if bits < 64:
            expected = out.let(f"trunc i64 {expected} to i{bits}")
        pointer = out.let(f"inttoptr i64 {host} to ptr", "p")
        pair = out.let(
            f"cmpxchg volatile ptr {pointer}, i{bits} {expected}, {typed(value)} seq_cst seq_cst"
        )
        swapped = out.let(f"extractvalue {{ i{bits}, i1 }} {pair}, 1")
        failed = out.let(f"xor i1 {swapped}, true")
        out.label(done)
        out.put(f"{_result(op)} = phi i1 [ true, %{begin} ], [ {failed}, %{attempt} ]")

    def _lower_zero_block(self, out: Writer, op: Op) -> None:
        self._call(out, "zero_block", "%s", "%tlb", name(op.args[0]), str(op.attrs[0]))

    def _lower_check_block(self, out: Writer, op: Op) -> None:
        self._call(out, "check_block", "%s", "%tlb", name(op.args[0]))

    def _lower_fence(self, out: Writer, op: Op) -> None:
        """x86 keeps all orders but an earlier write against a later read."""
        pred = out.let(f"and i8 {name(op.args[0])}, 5")
        succ = out.let(f"and i8 {name(op.args[1])}, 10")
        writes, reads = out.let(f"icmp ne i8 {pred}, 0"), out.let(f"icmp ne i8 {succ}, 0")
        needed = out.let(f"and i1 {writes}, {reads}")
        full, after = out.fresh("full"), out.fresh("after")
        out.end(f"br i1 {needed}, label %{full}, label %{after}")
        out.label(full)
        out.put("fence seq_cst")
        out.label(after)

    # -- translation ---------------------------------------------------------------------------------------------------
    def _lower_fence_i(self, out: Writer, op: Op) -> None:
        out.put("call void @fence_i(i64 %s)")
        self.path = (self._context, True)

    def _lower_sfence_vma(self, out: Writer, op: Op) -> None:
        has_address, has_asid = op.attrs
        address = name(op.args[0]) if has_address else "0"
        asid = name(op.args[-1]) if has_asid else "0"
        kind = int(bool(has_address)) | int(bool(has_asid)) << 1
        out.put(f"call void @sfence_vma(i64 %s, i64 {address}, i64 {asid}, i64 {kind})")
        self.path = (self._context, True)

    def _lower_context_changed(self, out: Writer, op: Op) -> None:
        status = out.let("call i64 @context_changed(i64 %s)")
        self.path = (out.let(f"icmp ne i64 {status}, 0"), self._refetch)


def _result(op: Op) -> str:
    assert op.result is not None
    return name(op.result)
