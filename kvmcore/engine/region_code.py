"""A region as the text of one LLVM function with a handler's signature.

Guest registers are variables (allocas that LLVM turns into SSA): loaded at the entry, those that may have changed
stored at every exit. Whatever is rare leaves: a trap or an instruction's odd case goes back to the interpreter at
that instruction ("aside"). Everything is relative to the parameters, so the code runs wherever it is mapped.
Runs in the translator; the text is parsed by region_compiler.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvmcore.engine import hart_state, machine_state
from kvmcore.engine.region_floats import Floats
from kvmcore.engine.region_hart import trace
from kvmcore.engine.region_loops import in_loops, inner_loop
from kvmcore.engine.region_pointers import Pointer, Pointers, access_of
from kvmcore.engine.region_words import Words
from kvmcore.engine.regions import Block, Code, Region, Step
from kvmcore.ir.llvm_text import HANDLER_PARAMETERS, Emitter, literal, typed
from kvmcore.ir.trace import Block as TraceBlock
from kvmcore.ir.trace import Op
from kvmcore.ir.value import Value
from kvmcore.isa import rv64d

_PARAMETERS = ", ".join(f"i64 %{name}" for name in HANDLER_PARAMETERS)
_LIKELY, _UNLIKELY = "!prof !0", "!prof !1"
_STATE, _GUEST, _TLB = "!tbaa !2", "!tbaa !3", "!tbaa !4"
_METADATA = """
!0 = !{!"branch_weights", i32 10000, i32 1}
!1 = !{!"branch_weights", i32 1, i32 10000}
!2 = !{!6, !6, i64 0}
!3 = !{!7, !7, i64 0}
!4 = !{!8, !8, i64 0}
!5 = !{!"softkvm"}
!6 = !{!"state", !5}
!7 = !{!"guest", !5}
!8 = !{!"tlb", !5}
"""
#: Return sites that a return is compared with at most.
_COMPARED = 6
_DATA_MASK = (hart_state.DATA_TLB_ENTRIES - 1) << 5
_FETCH_MASK = hart_state.FETCH_TLB_ENTRIES - 1


@dataclass(slots=True)
class _Place:
    """Where the emission is: a step of a block, what may have been written so far, steps done in this block."""

    block: Block
    step: Step
    done: int
    dirty: frozenset[str]
    prefix: str


class RegionEmitter(Emitter):
    """Writes one region. `offsets`: the image's functions, relative to what records are relative to."""

    def __init__(
        self, code: Code, region: Region, offsets: Mapping[str, int], identities: Mapping[int, int]
    ) -> None:
        """`identities`: of the pages other than the head's, by number (see PAGE_IDENTITY in machine_state.py)."""
        super().__init__()
        self._code, self._region, self._offsets, self._identities = code, region, offsets, identities
        self._traces = {step.delta: trace(step, f"i{_label(step.delta)}.") for step in region.steps}
        self._written = {delta: _registers(blocks, "setreg") for delta, blocks in self._traces.items()}
        self._dirty_in = self._dataflow()
        loops = in_loops(region.blocks, self._successors)
        self._pointers = Pointers(region, self._traces, self._written, self._successors, loops)
        self._floats = Floats(region.blocks, self._traces, self._successors)
        self._singles: set[str] = set()
        """Registers that hold singles before the step that is being written: their variable is f1.s, not f1."""
        self._words = Words(region.blocks, self._traces, self._successors)
        self._now_words: set[str] = set()
        """Registers that hold words where the emission is: their variable is x1.w, not x1."""
        self._words_before: set[str] = set()
        """The same before the step."""
        self._peeled = inner_loop(region.blocks, self._successors)
        self._copy = ""
        self._checked: set[str] = set()
        """Pointers that have been looked up since this block began, or since they were set."""
        self._void: set[str] = set()
        """Pointers that have been set since, and not looked up."""
        self._asked_first = any(_asks(self._traces[step.delta]) for step in region.blocks[0].steps)
        self._fp_in = self._fp_dataflow()
        self._fp_known = False
        self._first: list[str] = []
        self._lines: list[str] = []
        self._place: _Place

    def text(self) -> str:
        """The module."""
        used: set[str] = set()
        for blocks in self._traces.values():
            used |= _registers(blocks, "getreg") | _registers(blocks, "setreg")
        if self._asked_first:
            head = self._region.blocks[0]
            self._place = _Place(head, head.steps[0], 0, frozenset(), "entry")
            self._fp_ready()
        if self._floats.at[0]:
            self._unbox_first(sorted(self._floats.at[0]))
        self._first, self._lines = self._lines, []
        peeled = self._peeled
        for copy in ("e", ""):
            self._copy = copy
            for block in self._region.blocks.values():
                if not copy or block.start in peeled:
                    self._block(block)
        entry = ["entry:", "  %pc4 = sub i64 %ip, %ab", "  %pc0 = ashr i64 %pc4, 2", "  %icv = alloca i64"]
        entry.append("  store i64 %ic, ptr %icv")
        for name in sorted(used):
            kind = _kind(name)
            entry += [f"  %{name} = alloca {kind}", *(f"  {line}" for line in self._register(name, f"init.{name}"))]
            entry += [f"  %init.{name} = load {kind}, ptr %init.{name}.p, {_STATE}"]
            entry += [f"  store {kind} %init.{name}, ptr %{name}"]
            entry.append(f"  %{name}.w = alloca i32" if name[0] == "x" else f"  %{name}.s = alloca float")
        for pointer in self._pointers.all:
            for variable in ("gd", "cb", "cs", "ca") if pointer.kept else ("gd",):
                entry += [f"  %{variable}.{pointer.name} = alloca i64", f"  store i64 0, ptr %{variable}.{pointer.name}"]
        body = "\n".join([*entry, *self._first, f"  br label %{'e' if peeled else ''}B0", *self._lines])
        self.raw(f"define preserve_nonecc void @region({_PARAMETERS}) #0 {{\n{body}\n}}\n")
        return self.module() + _METADATA

    # -- what may have been written ----------------------------------------------------------------------------
    def _dataflow(self) -> dict[int, frozenset[str]]:
        """For each block the registers that may have been written between the region's entry and its start."""
        blocks = self._region.blocks
        found: dict[int, frozenset[str]] = {start: frozenset() for start in blocks}
        waiting = list(blocks)
        while waiting:
            block = blocks[waiting.pop()]
            out = found[block.start].union(*(self._written[step.delta] for step in block.steps))
            for successor in self._successors(block.steps[-1]):
                if successor in blocks and not out <= found[successor]:
                    found[successor] |= out
                    waiting.append(successor)
        return found

    def _fp_dataflow(self) -> set[int]:
        """Blocks that are reached only through floating-point instructions, so that fpready holds at their start."""
        blocks = self._region.blocks
        asks = {step.delta for step in self._region.steps if _asks(self._traces[step.delta])}
        known = set(blocks) if self._asked_first else set(blocks) - {0}
        while True:
            lost = {
                successor
                for start, block in blocks.items()
                if start not in known and not any(step.delta in asks for step in block.steps)
                for successor in self._successors(block.steps[-1])
                if successor in known
            }
            if not lost:
                return known
            known -= lost

    def _successors(self, step: Step) -> list[int]:
        if step.kind == "jalr":
            return self._region.return_sites if step.returns else []
        if step.kind == "jal":
            return [step.target]
        return [step.next, step.target] if step.kind == "branch" else [step.next]

    # -- blocks ------------------------------------------------------------------------------------------------
    def _out(self, *lines: str) -> None:
        self._lines.extend(f"  {line}" for line in lines)

    def _label(self, name: str) -> None:
        self._lines.append(f"{name}:")

    def _block(self, block: Block) -> None:
        dirty = self._dirty_in[block.start]
        self._fp_known = block.start in self._fp_in
        self._singles = set(self._floats.at[block.start])
        self._now_words = set(self._words.at[block.start])
        self._checked, self._void = set(), set()
        self._label(f"{self._copy}B{_label(block.start)}")
        for index, step in enumerate(block.steps):
            prefix = f"{self._copy}i{_label(step.delta)}"
            self._place = _Place(block, step, index, dirty, prefix)
            self._out(f"br label %{prefix}.b0")
            words = self._words.after(step, self._now_words)
            self._step(trace(step, f"{prefix}.") if self._copy else self._traces[step.delta])
            self._now_words = words
            dirty |= self._written[step.delta]
            self._singles = self._floats.after(step, self._singles)
            if index + 1 < len(block.steps):
                self._label(f"{prefix}.next")
        last = block.steps[-1]
        if last.kind in ("plain", "branch"):  # falls out of the block's end
            self._place = _Place(block, last, len(block.steps), dirty, f"{self._copy}i{_label(last.delta)}")
            self._label(f"{self._place.prefix}.next")
            self._go_to(last.next, taken=False)

    def _step(self, blocks: list[TraceBlock]) -> None:
        place = self._place
        self._words_before = set(self._now_words)
        words = {blocks[0].number: self._words_before}  # what they are at the beginning of each path
        for block in blocks:
            self._now_words = set(words[block.number])
            self._label(f"{place.prefix}.b{block.number}")
            for op in block.ops:
                self._operation(op)
            if block.condition is not None:
                assert block.if_true is not None
                assert block.if_false is not None
                words[block.if_true.number] = words[block.if_false.number] = self._now_words
                yes, no = (f"label %{place.prefix}.b{side.number}" for side in (block.if_true, block.if_false))
                weights = ""
                if _leaves(block.if_true) != _leaves(block.if_false):
                    weights = ", " + (_UNLIKELY if _leaves(block.if_true) else _LIKELY)
                elif self._copy and self._ends_loop(block.if_true) != self._ends_loop(block.if_false):
                    weights = ", " + (_UNLIKELY if self._ends_loop(block.if_true) else _LIKELY)
                self._out(f"br i1 {literal(block.condition)}, {yes}, {no}{weights}")

    def _ends_loop(self, block: TraceBlock) -> bool:
        """Whether a path of a step leads out of the loop that the region begins with."""
        step = self._place.step
        if not block.ops or block.ops[-1].opcode not in ("goto", "next"):
            return False
        last = block.ops[-1]
        return (step.next if last.opcode == "next" else step.delta + int(str(last.attrs[0]))) not in self._peeled

    def _operation(self, op: Op) -> None:
        name = op.result.name if op.result is not None else ""
        place = self._place
        match op.opcode:
            case "getreg":
                self._get_register(str(op.attrs[0]), name)
            case "setreg":
                self._set_register(str(op.attrs[0]), op.args[0])
            case "pc":
                self._out(f"%{name} = add i64 %pc0, {place.step.delta}")
            case "gload":
                assert op.result is not None
                self._guest_load(op, name, op.result.width)
            case "gstore":
                self._guest_store(op)
            case "ghost":
                self._guest_host(op, name)
            case "fpready":
                self._fp_ready()
            case "next":
                self._out(f"br label %{place.prefix}.next")
            case "goto":
                place.done += 1
                place.dirty |= self._written[place.step.delta]
                self._go_to(place.step.delta + int(str(op.attrs[0])), taken=True)
                place.done -= 1
            case "jump":
                if place.step.known is None:
                    self._jump(literal(op.args[0]))
                else:
                    place.done += 1
                    place.dirty |= self._written[place.step.delta]
                    self._go_to(place.step.known, taken=True)
                    place.done -= 1
            case "aside":
                self._aside()
            case "load" | "store":
                lines = self._op(op)
                if "volatile" not in lines[-1] and "atomic" not in lines[-1]:
                    lines[-1] += f", {_STATE}"
                self._out(*lines)
            case _:
                self._out(*self._op(op))

    # -- going on ------------------------------------------------------------------------------------------------
    def _count(self) -> str:
        """The name of `ic` with this block's finished steps counted."""
        before, after = self.fresh(), self.fresh()
        self._out(f"%{before} = load i64, ptr %icv", f"%{after} = add i64 %{before}, {self._place.done}")
        return f"%{after}"

    def _go_to(self, delta: int, taken: bool) -> None:
        """On to another block, or out of the region."""
        inside = delta in self._region.blocks
        backward = delta <= self._place.step.delta
        count = self._count()
        if taken and (backward or not inside):
            self._poll(count, self._address(delta), "poll_region" if inside else "poll")
        if inside:
            self._enter(delta, count)
        else:
            self._leave(delta, count)

    def _enter(self, delta: int, count: str) -> None:
        """On to a block. On another page than the head's, what is mapped there must be what was translated.

        The head's page is what the region was entered by, and translations change only outside of regions.
        """
        copy = self._copy if delta in self._peeled else ""
        page = self._code.page(delta)
        if page not in (0, self._code.page(self._place.step.delta)):
            n = self.fresh()
            target = self._address(delta)
            self._fetch_entry(target, n)
            self._out(
                f"%{n}pb = shl i64 %{n}g, 2",
                f"%{n}pa = add i64 %{n}pb, %{n}b",
                f"%{n}ia = add i64 %{n}pa, {machine_state.PAGE_IDENTITY - machine_state.PAGE_RECORDS}",
                f"%{n}ix = inttoptr i64 %{n}ia to ptr",
                f"%{n}id = load i64, ptr %{n}ix, {_TLB}",
                f"%{n}same = icmp eq i64 %{n}id, {self._identities[page]}",
                f"br i1 %{n}same, label %{n}.in, label %{n}.out, {_LIKELY}",
            )
            self._label(f"{n}.out")
            self._spill()
            self._dispatch_at(target, n, count)
            self._label(f"{n}.in")
        for name in sorted(self._singles - self._floats.at[delta]):
            n = self.fresh()
            self._out(f"%{n}d = bitcast i64 {self._boxed(name)} to double", f"store double %{n}d, ptr %{name}")
        for name in sorted(self._now_words - self._words.at[delta]):
            self._out(f"store i64 {self._extended(name)}, ptr %{name}")
        self._out(f"store i64 {count}, ptr %icv", f"br label %{copy}B{_label(delta)}")

    def _address(self, delta: int) -> str:
        pc = self.fresh()
        self._out(f"%{pc} = add i64 %pc0, {delta}")
        return f"%{pc}"

    def _poll(self, count: str, pc: str, routine: str) -> None:
        """Where other threads, time and interrupts are looked at, as at every taken branch of tier 1."""
        n = self.fresh()
        self._out(
            f"%{n}a = add i64 %s, {hart_state.offset('limit')}",
            f"%{n}p = inttoptr i64 %{n}a to ptr",
            f"%{n}l = load volatile i64, ptr %{n}p",
            f"%{n}c = icmp uge i64 {count}, %{n}l",
            f"br i1 %{n}c, label %{n}.poll, label %{n}.go, {_UNLIKELY}",
        )
        self._label(f"{n}.poll")
        self._spill()
        self._tail(routine, count, a0=pc)
        self._label(f"{n}.go")

    def _leave(self, delta: int, count: str) -> None:
        """By the record of an instruction of the head's page, by the fetch TLB elsewhere."""
        self._spill()
        if self._code.page(delta) == 0:
            n = self.fresh()
            self._out(f"%{n} = add i64 %ip, {4 * delta}")
            self._dispatch(f"%{n}", "%ab", count)
        else:
            self._go(self._address(delta), count)

    def _aside(self) -> None:
        """The interpreter does this step from its beginning. The head's own record leads back here, so it is passed by."""
        count = self._count()
        if self._place.step.delta:
            self._leave(self._place.step.delta, count)
        else:
            self._spill()
            self._tail("interpret", count, a0="%pc0")

    def _jump(self, target: str) -> None:
        """To an address in a register: a return of a call of this region stays inside."""
        place = self._place
        place.done += 1
        place.dirty |= self._written[place.step.delta]
        count = self._count()
        for site in self._region.return_sites[:_COMPARED] if place.step.returns else ():
            n = self.fresh()
            expected = self._address(site)
            self._out(f"%{n} = icmp eq i64 {target}, {expected}")
            self._out(f"br i1 %{n}, label %{n}.yes, label %{n}.no")
            self._label(f"{n}.yes")
            if site <= place.step.delta:
                self._poll(count, expected, "poll_region")
            self._enter(site, count)
            self._label(f"{n}.no")
        self._poll(count, target, "poll")
        self._spill()
        self._go(target, count)
        place.done -= 1

    def _go(self, target: str, count: str) -> None:
        """HandlerHart.go: by the fetch TLB. Registers are in the hart's block already."""
        n = self.fresh()
        self._fetch_entry(target, n, count)
        self._dispatch_at(target, n, count)

    def _fetch_entry(self, target: str, n: str, count: str = "") -> None:
        """%n.b: what turns pc * 4 into the record's address. A miss leaves; without `count` registers are stored then."""
        self._out(
            f"%{n}i = lshr i64 {target}, 12",
            f"%{n}m = and i64 %{n}i, {_FETCH_MASK}",
            f"%{n}o = shl i64 %{n}m, 4",
            f"%{n}e = add i64 %tlb, %{n}o",
            f"%{n}ta = add i64 %{n}e, {hart_state.FETCH_TLB_OFFSET}",
            f"%{n}tp = inttoptr i64 %{n}ta to ptr",
            f"%{n}t = load i64, ptr %{n}tp, {_TLB}",
            f"%{n}g = and i64 {target}, -4096",
            f"%{n}h = icmp eq i64 %{n}t, %{n}g",
            f"br i1 %{n}h, label %{n}.hit, label %{n}.miss, {_LIKELY}",
        )
        self._label(f"{n}.miss")
        if not count:
            count = self._count()
            self._spill()
        self._tail("fetch_miss", count, a0=target)
        self._label(f"{n}.hit")
        self._out(
            f"%{n}ba = add i64 %{n}e, {hart_state.FETCH_TLB_OFFSET + 8}",
            f"%{n}bp = inttoptr i64 %{n}ba to ptr",
            f"%{n}b = load i64, ptr %{n}bp, {_TLB}",
        )

    def _dispatch_at(self, target: str, n: str, count: str) -> None:
        self._out(f"%{n}s = shl i64 {target}, 2", f"%{n}ip = add i64 %{n}s, %{n}b")
        self._dispatch(f"%{n}ip", f"%{n}b", count)

    def _dispatch(self, ip: str, ab: str, count: str) -> None:
        n = self.fresh()
        self._out(
            f"%{n}p = inttoptr i64 {ip} to ptr",
            f"%{n}o = load i32, ptr %{n}p",
            f"%{n}x = zext i32 %{n}o to i64",
            f"%{n}h = add i64 %base, %{n}x",
            f"%{n}t = inttoptr i64 %{n}h to ptr",
        )
        self._musttail(f"%{n}t", ip, ab, count, "poison")

    def _tail(self, handler: str, count: str, a0: str) -> None:
        """To a routine of the image."""
        n = self.fresh()
        self._out(f"%{n}a = add i64 %base, {self._offsets[handler]}", f"%{n}p = inttoptr i64 %{n}a to ptr")
        self._musttail(f"%{n}p", "%ip", "%ab", count, a0)

    def _musttail(self, target: str, ip: str, ab: str, count: str, a0: str) -> None:
        arguments = f"i64 {ip}, i64 %s, i64 {ab}, i64 %base, i64 {count}, i64 %tlb, i64 {a0}, i64 poison, i64 poison"
        self._out(f"musttail call preserve_nonecc void {target}({arguments})", "ret void")

    # -- registers -------------------------------------------------------------------------------------------------
    def _register(self, name: str, at: str) -> list[str]:
        number = int(name[1:])
        offset = hart_state.offset(name[0]) + 8 * number
        return [f"%{at}.a = add i64 %s, {offset}", f"%{at}.p = inttoptr i64 %{at}.a to ptr"]

    def _spill(self) -> None:
        for name in sorted(self._place.dirty):
            n, kind = self.fresh(), _kind(name)
            if name in self._singles:
                boxed = self._boxed(name)
                self._out(*self._register(name, n), f"store i64 {boxed}, ptr %{n}.p, {_STATE}")
                continue
            if name in self._now_words:
                extended = self._extended(name)
                self._out(*self._register(name, n), f"store i64 {extended}, ptr %{n}.p, {_STATE}")
                continue
            self._out(f"%{n} = load {kind}, ptr %{name}", *self._register(name, n))
            self._out(f"store {kind} %{n}, ptr %{n}.p, {_STATE}")

    def _get_register(self, name: str, result: str) -> None:
        if name in self._now_words:
            self._out(f"%{result} = add i64 {self._extended(name)}, 0")
            return
        if name[0] == "x":
            self._out(f"%{result} = load i64, ptr %{name}")
            return
        if name in self._singles:
            self._out(f"%{result} = add i64 {self._boxed(name)}, 0")
            return
        n = self.fresh()
        self._out(f"%{n} = load double, ptr %{name}", f"%{result} = bitcast double %{n} to i64")

    def _set_register(self, name: str, value: Value) -> None:
        if name[0] == "x":
            if name in self._words.after(self._place.step, self._words_before):
                n = self.fresh()
                self._out(f"%{n} = trunc {typed(value)} to i32", f"store i32 %{n}, ptr %{name}.w")
                self._now_words.add(name)
            else:
                self._out(f"store {typed(value)}, ptr %{name}")
                self._now_words.discard(name)
            pointer = self._pointers.set.get((self._place.step.delta, int(name[1:])))
            if pointer is not None:
                self._out(f"store i64 0, ptr %gd.{pointer.name}")
                self._checked.discard(pointer.name)
                self._void.add(pointer.name)
            return
        n = self.fresh()
        if name in self._floats.after(self._place.step, set()):
            self._out(f"%{n}t = trunc {typed(value)} to i32", f"%{n} = bitcast i32 %{n}t to float")
            self._out(f"store float %{n}, ptr %{name}.s")
            return
        self._out(f"%{n} = bitcast {typed(value)} to double", f"store double %{n}, ptr %{name}")

    def _boxed(self, name: str) -> str:
        """A single as the register has it; LLVM sees through this where it is read as a single."""
        n = self.fresh()
        self._out(
            f"%{n}s = load float, ptr %{name}.s",
            f"%{n}i = bitcast float %{n}s to i32",
            f"%{n}z = zext i32 %{n}i to i64",
            f"%{n} = or i64 %{n}z, {-1 << 32}",
        )
        return f"%{n}"

    def _extended(self, name: str) -> str:
        """A word as the register has it; LLVM sees through this where it is read as a word."""
        n = self.fresh()
        self._out(f"%{n}w = load i32, ptr %{name}.w", f"%{n} = sext i32 %{n}w to i64")
        return f"%{n}"

    def _unbox_first(self, names: list[str]) -> None:
        """At the region's entry: if one of them is no single, the interpreter does the first instruction."""
        n = self.fresh()
        head = self._region.blocks[0]
        self._place = _Place(head, head.steps[0], 0, frozenset(), "entry")
        both = "true"
        for name in names:
            self._out(
                f"%{n}{name}d = load double, ptr %{name}",
                f"%{n}{name}i = bitcast double %{n}{name}d to i64",
                f"%{n}{name}b = icmp uge i64 %{n}{name}i, {-1 << 32}",
                f"%{n}{name}a = and i1 {both}, %{n}{name}b",
                f"%{n}{name}t = trunc i64 %{n}{name}i to i32",
                f"%{n}{name}s = bitcast i32 %{n}{name}t to float",
                f"store float %{n}{name}s, ptr %{name}.s",
            )
            both = f"%{n}{name}a"
        self._out(f"br i1 {both}, label %{n}.yes, label %{n}.no, {_LIKELY}")
        self._label(f"{n}.no")
        self._aside()
        self._label(f"{n}.yes")

    def _fp_ready(self) -> None:
        """FS is dirty and frm is a mode of the host's; else the interpreter sees to it. Asked once in a row of blocks."""
        if self._fp_known:
            return
        self._fp_known = True
        n = self.fresh()
        at = hart_state.offset("mode")
        mask = 0xFF << 8 * (hart_state.offset("fs") - at) | 0xFC << 8 * (hart_state.offset("frm") - at)
        wanted = 3 << 8 * (hart_state.offset("fs") - at)
        self._out(
            f"%{n}a = add i64 %s, {at}",
            f"%{n}p = inttoptr i64 %{n}a to ptr",
            f"%{n}w = load i64, ptr %{n}p, {_STATE}",
            f"%{n}m = and i64 %{n}w, {mask}",
            f"%{n}c = icmp eq i64 %{n}m, {wanted}",
            f"br i1 %{n}c, label %{n}.yes, label %{n}.no, {_LIKELY}",
        )
        self._label(f"{n}.no")
        self._aside()
        self._label(f"{n}.yes")

    # -- guest memory ------------------------------------------------------------------------------------------------
    def _lookup(self, address: str, size: int, write: bool, n: str) -> None:
        """Branches to n.fast, where %n.hp is the pointer, or to n.slow.

        By what is known of the pointer since it was set; else, for all accesses by it at once, by the memory that it was in
        the last time, which does not move while a region runs, or by the TLB. If these lie on two pages, or may be read and
        not written, each access is looked up alone.
        """
        pointer = self._pointers.at.get(self._place.step.delta)
        if pointer is None:
            self._look_alone(address, size, write, f"{n}.1", f"{n}.slow")
            self._found(address, n, [f"{n}.1"])
            return
        ways = []
        if pointer.name not in self._void:
            ways.append(f"{n}.0")
            self._out(
                f"%{n}.0.d = load i64, ptr %gd.{pointer.name}",
                f"%{n}.0.c = icmp ne i64 %{n}.0.d, 0",
                f"br i1 %{n}.0.c, label %{n}.0.found, label %{n}.ask, {_LIKELY}",
            )
            self._label(f"{n}.0.found")
            self._out(f"br label %{n}.fast")
            self._label(f"{n}.ask")
        if pointer.name in self._checked:
            self._look_alone(address, size, write, f"{n}.1", f"{n}.slow")
            self._found(address, n, [*ways, f"{n}.1"])
            return
        self._void.discard(pointer.name)
        self._checked.add(pointer.name)
        self._look_together(address, pointer, n, ways)
        if pointer.high - pointer.low > size:
            self._label(f"{n}.alone")
            self._look_alone(address, size, write, f"{n}.1", f"{n}.slow")
            ways.append(f"{n}.1")
        self._found(address, n, ways)

    def _found(self, address: str, n: str, ways: list[str]) -> None:
        """Each of the ways has the difference in its .d, and comes here from its .found."""
        self._label(f"{n}.fast")
        self._out(
            f"%{n}.d = phi i64 " + ", ".join(f"[ %{way}.d, %{way}.found ]" for way in ways),
            f"%{n}.host = add i64 {address}, %{n}.d",
            f"%{n}.hp = inttoptr i64 %{n}.host to ptr",
        )

    def _probe(self, first: str, last: int, write: bool, n: str, miss: str) -> None:
        """The TLB, for the bytes from `first` to `last` ones behind it; goes to n.hit. On two pages it is a miss:
        the entry of the one cannot hold the other."""
        self._out(
            f"%{n}.i = lshr i64 {first}, 7",
            f"%{n}.m = and i64 %{n}.i, {_DATA_MASK}",
            f"%{n}.e = add i64 %tlb, %{n}.m",
            f"%{n}.ta = add i64 %{n}.e, {8 if write else 0}",
            f"%{n}.tp = inttoptr i64 %{n}.ta to ptr",
            f"%{n}.t = load i64, ptr %{n}.tp, {_TLB}",
            f"%{n}.l = add i64 {first}, {last}",
            f"%{n}.g = and i64 %{n}.l, -4096",
            f"%{n}.h = icmp eq i64 %{n}.t, %{n}.g",
            f"br i1 %{n}.h, label %{n}.hit, label %{miss}, {_LIKELY}",
        )
        self._label(f"{n}.hit")
        self._out(
            f"%{n}.da = add i64 %{n}.e, 16",
            f"%{n}.dp = inttoptr i64 %{n}.da to ptr",
            f"%{n}.d = load i64, ptr %{n}.dp, {_TLB}",
        )

    def _look_alone(self, address: str, size: int, write: bool, n: str, miss: str) -> None:
        self._probe(address, size - 1, write, n, miss)
        self._out(f"br label %{n}.found")
        self._label(f"{n}.found")
        self._out(f"br label %{n.rpartition('.')[0]}.fast")

    def _look_together(self, address: str, pointer: Pointer, n: str, ways: list[str]) -> None:
        """For all accesses by a pointer; misses go to n.alone, or to n.slow if this is the only one."""
        access = access_of(self._traces[self._place.step.delta])
        assert access is not None
        only = pointer.high - pointer.low == access.size
        first = address
        if pointer.low != access.offset:
            first = f"%{n}.first"
            self._out(f"{first} = add i64 {address}, {pointer.low - access.offset}")
        if pointer.kept:
            ways.append(f"{n}.2")
            self._out(
                f"%{n}.2.cb = load i64, ptr %cb.{pointer.name}",
                f"%{n}.2.cs = load i64, ptr %cs.{pointer.name}",
                f"%{n}.2.cd = sub i64 {first}, %{n}.2.cb",
                f"%{n}.2.ch = icmp ult i64 %{n}.2.cd, %{n}.2.cs",
                f"br i1 %{n}.2.ch, label %{n}.2.found, label %{n}.look, {_LIKELY}",
            )
            self._label(f"{n}.2.found")
            self._out(
                f"%{n}.2.d = load i64, ptr %ca.{pointer.name}",
                f"store i64 %{n}.2.d, ptr %gd.{pointer.name}",
                f"br label %{n}.fast",
            )
            self._label(f"{n}.look")
        ways.append(f"{n}.3")
        self._probe(first, pointer.high - pointer.low - 1, pointer.writes, f"{n}.3", f"{n}.slow" if only else f"{n}.alone")
        self._out(f"store i64 %{n}.3.d, ptr %gd.{pointer.name}")
        if pointer.kept:
            self._out(
                f"%{n}.3.ma = add i64 %{n}.3.e, 24",
                f"%{n}.3.mp = inttoptr i64 %{n}.3.ma to ptr",
                f"%{n}.3.mask = load i64, ptr %{n}.3.mp, {_TLB}",
                f"%{n}.3.cb = and i64 {first}, %{n}.3.mask",
                f"%{n}.3.cs = sub i64 {1 - (pointer.high - pointer.low)}, %{n}.3.mask",
                f"store i64 %{n}.3.cb, ptr %cb.{pointer.name}",
                f"store i64 %{n}.3.cs, ptr %cs.{pointer.name}",
                f"store i64 %{n}.3.d, ptr %ca.{pointer.name}",
            )
        self._out(f"br label %{n}.3.found")
        self._label(f"{n}.3.found")
        self._out(f"br label %{n}.fast")

    def _call(self, function: str, arguments: str, n: str) -> None:
        """A routine of the image, from a slow path; an access that it could not do is the interpreter's."""
        self._out(
            f"%{n}.fa = add i64 %base, {self._offsets[function]}",
            f"%{n}.fp = inttoptr i64 %{n}.fa to ptr",
            f"%{n}.r = call preserve_mostcc i64 %{n}.fp(i64 %s, {arguments})",
            f"%{n}.sa = add i64 %s, {hart_state.offset('region_status')}",
            f"%{n}.sp = inttoptr i64 %{n}.sa to ptr",
            f"%{n}.st = load i64, ptr %{n}.sp, {_STATE}",
            f"%{n}.ok = icmp eq i64 %{n}.st, 0",
            f"br i1 %{n}.ok, label %{n}.did, label %{n}.not, {_LIKELY}",
        )
        self._label(f"{n}.not")
        self._aside()
        self._label(f"{n}.did")

    def _guest_load(self, op: Op, name: str, width: int) -> None:
        """A load into a floating-point register is made as one, which spares LLVM the way through an integer register."""
        address, n = literal(op.args[0]), self.fresh()
        double = width == 64 and self._place.step.row.function.__module__ == rv64d.__name__
        kind = "double" if double else f"i{width}"
        self._lookup(address, width // 8, False, n)
        self._out(f"%{n}.v = load volatile {kind}, ptr %{n}.hp, align 1, {_GUEST}", f"br label %{n}.done")
        self._label(f"{n}.slow")
        self._call(f"region_load_{width // 8}", f"i64 {address}", n)
        value = f"%{n}.r"
        if kind != "i64":
            self._out(f"%{n}.w = {'bitcast' if double else 'trunc'} i64 %{n}.r to {kind}")
            value = f"%{n}.w"
        self._out(f"br label %{n}.done")
        self._label(f"{n}.done")
        both = self.fresh() if double else name
        self._out(f"%{both} = phi {kind} [ %{n}.v, %{n}.fast ], [ {value}, %{n}.did ]")
        if double:
            self._out(f"%{name} = bitcast double %{both} to i64")

    def _guest_store(self, op: Op) -> None:
        address, value, n = literal(op.args[0]), op.args[1], self.fresh()
        self._lookup(address, value.width // 8, True, n)
        self._out(f"store volatile {typed(value)}, ptr %{n}.hp, align 1, {_GUEST}", f"br label %{n}.done")
        self._label(f"{n}.slow")
        wide = literal(value)
        if value.width < 64:
            self._out(f"%{n}.w = zext {typed(value)} to i64")
            wide = f"%{n}.w"
        self._call(f"region_store_{value.width // 8}", f"i64 {address}, i64 {wide}", n)
        self._out(f"br label %{n}.done")
        self._label(f"{n}.done")

    def _guest_host(self, op: Op, name: str) -> None:
        """The host's address of an atomic access; a miss is the interpreter's."""
        size, write = op.attrs
        n = self.fresh()
        self._lookup(literal(op.args[0]), int(str(size)), bool(write), n)
        self._out(f"br label %{n}.done")
        self._label(f"{n}.slow")
        self._aside()
        self._label(f"{n}.done")
        self._out(f"%{name} = add i64 %{n}.host, 0")


def _registers(blocks: list[TraceBlock], opcode: str) -> frozenset[str]:
    return frozenset(str(op.attrs[0]) for block in blocks for op in block.ops if op.opcode == opcode)


def _loaded(step: Step, written: frozenset[str]) -> frozenset[str]:
    """Registers that a step sets to something else than themselves moved by a little."""
    source = step.operands.get("rs1")
    along = step.row.function.__name__ in ("addi", "add", "sub", "c_addi") and f"x{source}" in written
    return frozenset() if along else written


def _asks(blocks: list[TraceBlock]) -> bool:
    """Whether every path through an instruction begins with fpready."""
    return any(op.opcode == "fpready" for op in blocks[0].ops)


def _kind(name: str) -> str:
    """LLVM's type of a register's variable."""
    return "i64" if name[0] == "x" else "double"


def _leaves(block: TraceBlock) -> bool:
    """Whether a path is seldom taken."""
    return bool(block.ops) and (block.ops[-1].opcode == "aside" or block.ops[0].opcode == "rare")


def _label(delta: int) -> str:
    """A delta in a name."""
    return str(delta) if delta >= 0 else f"m{-delta}"
