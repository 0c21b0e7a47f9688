"""Copies and patches templates: a page's instructions become machine code, natively, in some tens of nanoseconds each.

Called by the translator (Image.assemble); written over Values as softmmu.py is, collected by routines.py. The table of
templates is what templates.py has made when the image was built. The result is the *code* of a page, with nothing in it that
depends on where the page is decoded, followed by a list of *heads*: halfwords whose records may lead to the code (`install`).

One pass decodes what is wanted and finds where runs of instructions begin anew (`leaders`), one emits, one makes what stands
apart: for each exit the way back to the interpreter, for each branch what happens when it is taken, for each head the way in.
"""

from __future__ import annotations

import ctypes

from kvmcore.engine import machine_state
from kvmcore.engine.hart_state import X0_SINK
from kvmcore.engine.native_hart import FunctionHart, call, load, param, returns, store
from kvmcore.ir.value import Value, select, u64

_U64, _U32, _U16, _U8 = ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint16, ctypes.c_uint8
#: Bytes of a page's code at most, its heads included; so a place in it has 20 bits.
MOST = 1 << 20
_ROOM = MOST - (64 << 10)
"""Emission ends here; exits, entries and heads come behind it."""
_FIXES = 8192
_STRAIGHT = 24
"""Instructions after which code may be entered again at the latest: the interpreter does what is behind a miss, or behind a
region's end, up to there."""
HALVES = 2048
"""Halfwords of a page."""

#: Templates that are no instruction's, by their numbers in the table (templates.py has their meaning).
STUBS = ("sync", "go", "exit", "taken", "back", "entry", "load_miss", "store_miss")
SYNC, GO, EXIT, TAKEN, BACK, ENTRY, LOAD_MISS, STORE_MISS = range(len(STUBS))

#: Kinds of patches: a number out of the record; a word of Work; a jump whose target is not known yet.
OPERAND, WORD, LATER = range(3)
LATER_EXIT, LATER_TAKEN, LATER_LOAD_MISS, LATER_STORE_MISS = range(4)


class Table(ctypes.Structure):
    """Head of the table of templates; the others are byte offsets in it."""

    _fields_ = [("map", _U64), ("groups", _U64), ("templates", _U64)]


class Group(ctypes.Structure):
    """Of a handler: its templates, one for each way to come by its operands (variant), and what the assembler has to know.

    rs1, rs2, rd: the operand's byte in the record, or 0. shift, bits, scale: where a near branch has its offset, or an access
    its displacement; bits 0: it is neither.
    """

    _fields_ = [
        ("variants", _U16 * 54),
        ("rs1", _U8),
        ("rs2", _U8),
        ("rd", _U8),
        ("ends", _U8),  # control never reaches the next instruction
        ("shift", _U8),
        ("bits", _U8),
        ("scale", _U8),
        ("result", _U8),  # rd's new value is in a0 afterwards
        ("access", _U8),  # 1 load, 2 store; 0: it has no access that may share a look
        ("size", _U8),  # of the access
        ("signed", _U8),  # the displacement is
    ]


class Template(ctypes.Structure):
    """Machine code, padded to 8 bytes, and its patches, by byte offsets in the table."""

    _fields_ = [("code", _U32), ("length", _U32), ("patches", _U32), ("count", _U32)]


class Patch(ctypes.Structure):
    """value = number * factor + addend, minus the place's own address if `relative`; `size` 1, 4 or 8 bytes at `at`.

    number: of a record's operand, `bits` bits from bit `shift` on; or the word of Work at byte offset `word`. If `flip` is
    not 0, one byte will do for a value that fits it, once these bits of the byte `back` bytes before have changed.
    """

    _fields_ = [
        ("addend", ctypes.c_int64),
        ("factor", _U16),
        ("word", _U16),
        ("at", _U16),
        ("kind", _U8),
        ("size", _U8),
        ("shift", _U8),
        ("bits", _U8),
        ("signed", _U8),
        ("relative", _U8),
        ("back", _U8),
        ("flip", _U8),
        ("pad", _U16),
    ]


MEM, ZERO, LAST = range(3)
"""How an instruction comes by a source register: from the hart's block; it is x0; it is what the last one has left in a0."""


ALONE, LEAD, FOLLOW = range(3)
"""How an access comes to its host address: by a look of its own; by one for all that share it; by such a look done before."""
_REACH = 128
"""Bytes from the first to the last that share a look at most. If they lie on two pages, the interpreter does all of it."""


def variant(rs1: int, rs2: int, sink: int, share: int) -> int:
    """Index in Group.variants; sink: the result goes nowhere."""
    return rs1 + 3 * rs2 + 9 * sink + 18 * share


_NOTHING = 64
"""No register's number; its low five bits are x0's."""


class Work(ctypes.Structure):
    """What the assembler works on. In: table, out, base, wanted, content. Out: `used` bytes at `out`, the heads at `list`."""

    _fields_ = [
        ("table", _U64),  # address of the Table
        ("out", _U64),  # address of MOST bytes
        ("base", _U64),  # where they will be, relative to what records are relative to
        ("used", _U64),
        ("list", _U64),  # offset of the list of heads
        ("open", _U64),  # 1: the last instruction goes on here
        ("before", _U64),  # instructions since ic was exact
        ("count", _U64),  # and with this one
        ("last", _U64),  # register whose value is in a0
        ("offset", _U64),  # of the instruction, in the page
        ("record", _U64),
        ("packed", _U64),  # resume's argument
        ("start", _U64),  # offset of the instruction's code
        ("again", _U64),  # refill's argument
        ("wants", _U64),  # bytes that a look is for, in units of 8
        ("shared", _U64),  # register whose accesses share a look, or 0
        ("upto", _U64),  # offset of the last of them
        ("kind", _U64),  # the look is good for: 1 loads, 2 stores as well
        ("low", _U64),  # of what it covers, relative to the register: the first byte
        ("high", _U64),  # the last byte
        ("to", _U64),  # offset of the record that a branch goes to
        ("target", _U64),  # place of the code that it goes to
        ("exit", _U64),  # place of the way back to the interpreter
        ("exit_of", _U64),  # whose it is: offset of the instruction + 1
        ("end", _U64),  # where the template that is being patched ends
        ("zero", _U64),
        ("fix_count", _U64),
        ("head_count", _U64),
        ("records", _U64 * HALVES),
        # place | start << 32, then kind | offset << 8 | wants << 24 | before << 32 | last << 48:
        ("fixes", _U64 * (2 * _FIXES)),
        ("places", _U32 * (HALVES + 2)),  # 1 + offset of the code of a leader
        ("heads", _U16 * HALVES),
        ("groups", _U16 * HALVES),
        ("leaders", _U8 * (HALVES + 8)),
        ("wanted", _U8 * (HALVES + 8)),
        ("content", _U8 * (2 * HALVES + 8)),
    ]


_ITEM = {"records": 8, "places": 4, "heads": 2, "groups": 2, "leaders": 1, "wanted": 1, "content": 1}
"""Bytes of an element of Work's arrays."""
WORD_OF: dict[str, int] = {name: getattr(Work, name).offset for name, *_ in Work._fields_}


def _get(w: Value, name: str) -> Value:
    return load(w + WORD_OF[name])


def _put(w: Value, name: str, value: Value | int) -> None:
    store(w + WORD_OF[name], value if isinstance(value, Value) else u64(value))


def _field(at: Value, of: type[ctypes.Structure], name: str) -> Value:
    """A field of one of the structures above, as 64 bits."""
    place = getattr(of, name)
    return load(at + place.offset, 8 * place.size, "plain", 1).zext(64)


def _item(w: Value, name: str, index: Value) -> Value:
    """Element of one of Work's arrays."""
    return w + WORD_OF[name] + index * _ITEM[name]


def _group(w: Value, half: Value) -> Value:
    """Address of the group of the instruction at a halfword."""
    table = _get(w, "table")
    number = load(_item(w, "groups", half), 16).zext(64)
    return table + _field(table, Table, "groups") + number * ctypes.sizeof(Group)


def _goes_to(group: Value, record: Value, offset: Value) -> Value:
    """Where in the page a near branch goes to."""
    shift, bits = _field(group, Group, "shift"), _field(group, Group, "bits")
    number = (record << (u64(64) - shift - bits)).sar(u64(64) - bits)
    return offset + number * _field(group, Group, "scale")


def assemble(h: FunctionHart) -> None:
    """(address of a Work): all of it."""
    w = param("p0")
    for name in ("used", "open", "before", "exit_of", "zero", "fix_count", "head_count"):
        _put(w, name, 0)
    call("template_decode", w, u64(0))
    call("template_emit", w, u64(0))
    call("template_fix", w, u64(0))
    _put(w, "list", (_get(w, "used") + 7) & ~3)
    start = _get(w, "out") + _get(w, "list")
    store(start, _get(w, "head_count").trunc(32), "plain", 4)
    store(start + 4, _get(w, "list").trunc(32), "plain", 4)
    after = _get(w, "list") + 8 + _get(w, "head_count") * 4
    _put(w, "used", after)
    call("template_heads", w, u64(0))
    returns(u64(0))


def decode(h: FunctionHart) -> None:
    """(Work, offset): records and leaders from here on."""
    w, offset = param("p0"), param("p1")
    if offset >= 4096:
        returns(u64(0))
    half = offset >> 1
    if load(_item(w, "wanted", half), 8) == 0:
        returns(*call("template_decode", w, offset + 2))
    raw = load(_item(w, "content", offset), 32, "plain", 1)
    long = (raw & 3) == 3
    length = select(long, u64(4), u64(2))
    if offset + length > 4096:
        store(_item(w, "wanted", half), Value(8, 0))
        returns(u64(0))
    record, _ = call("decode_word", select(long, raw, raw & 0xFFFF).zext(64), offset)
    store(_item(w, "records", half), record)
    table = _get(w, "table")
    number = load(table + _field(table, Table, "map") + (((record & 0xFFFFFFFF) >> 4) << 1), 16, "plain", 1)
    store(_item(w, "groups", half), number)
    call("template_lead", w, offset, length)
    returns(*call("template_decode", w, offset + length))


def lead(h: FunctionHart) -> None:
    """(Work, offset, length): where code begins anew because of this instruction."""
    w, offset, length = param("p0"), param("p1"), param("p2")
    group = _group(w, offset >> 1)
    if (load(_item(w, "groups", offset >> 1), 16) == 0) | (_field(group, Group, "ends") != 0):
        store(_item(w, "leaders", (offset + length) >> 1), Value(8, 1))
    if (_field(group, Group, "bits") != 0) & (_field(group, Group, "access") == 0):
        target = _goes_to(group, load(_item(w, "records", offset >> 1)), offset)
        if target < 4096:
            store(_item(w, "leaders", target >> 1), Value(8, 1))
    returns(u64(0))


def emit(h: FunctionHart) -> None:
    """(Work, offset): code from here on."""
    w, offset = param("p0"), param("p1")
    full = (_get(w, "used") > _ROOM // 2) | (_get(w, "fix_count") > _FIXES - 16)
    if (offset >= 4096) | full:
        returns(*call("template_close", w, offset))
    half = offset >> 1
    length = select((load(_item(w, "content", offset), 16, "plain", 1) & 3) == 3, u64(4), u64(2))
    wanted = load(_item(w, "wanted", half), 8) != 0
    if ~wanted | (load(_item(w, "groups", half), 16) == 0):
        call("template_close", w, offset)
        returns(*call("template_emit", w, offset + select(wanted, length, u64(2))))
    if (_get(w, "open") == 0) | (load(_item(w, "leaders", half), 8) != 0) | (_get(w, "before") >= _STRAIGHT):
        call("template_begin", w, offset)
    call("template_step", w, offset)
    returns(*call("template_emit", w, offset + length))


def close(h: FunctionHart) -> None:
    """(Work, offset): what comes here is the interpreter's; if the code before it goes on here, by its record."""
    w, offset = param("p0"), param("p1")
    if _get(w, "open") != 0:
        _put(w, "to", offset << 2)
        _put(w, "count", _get(w, "before"))
        _put(w, "open", 0)
        call("template_copy", w, u64(GO))
    returns(u64(0))


def begin(h: FunctionHart) -> None:
    """(Work, offset): a leader. ic is exact here, a0 holds nothing."""
    w, offset = param("p0"), param("p1")
    if (_get(w, "open") != 0) & (_get(w, "before") != 0):
        _put(w, "count", _get(w, "before"))
        call("template_copy", w, u64(SYNC))
    store(_item(w, "places", offset >> 1), (_get(w, "used") + 1).trunc(32))
    heads = _get(w, "head_count")
    store(_item(w, "heads", heads), (offset >> 1).trunc(16))
    _put(w, "head_count", heads + 1)
    _put(w, "open", 1)
    _put(w, "before", 0)
    _put(w, "last", _NOTHING)
    _put(w, "shared", 0)
    returns(u64(0))


def _source(w: Value, record: Value, byte: Value) -> Value:
    """How the instruction comes by the register whose number is in this byte of the record; 0: there is none."""
    number = (record >> (byte << 3)) & 0xFF
    way = select(number == 0, u64(ZERO), select(number == _get(w, "last"), u64(LAST), u64(MEM)))
    return select(byte == 0, u64(MEM), way)


def _covers(group: Value, record: Value) -> tuple[Value, Value]:
    """Of an access: its first byte, relative to the register, and its last one."""
    shift, bits = _field(group, Group, "shift"), _field(group, Group, "bits")
    top = record << (u64(64) - shift - bits)
    number = select(_field(group, Group, "signed") != 0, top.sar(u64(64) - bits), top >> (u64(64) - bits))
    first = number * _field(group, Group, "scale")
    return first, first + _field(group, Group, "size") - 1


def share(h: FunctionHart) -> None:
    """(Work, offset) of an access -> how it comes to its host address."""
    w, offset = param("p0"), param("p1")
    group, record = _group(w, offset >> 1), load(_item(w, "records", offset >> 1))
    kind, register = _field(group, Group, "access"), (record >> (_field(group, Group, "rs1") << 3)) & 0xFF
    first, last = _covers(group, record)
    within = (offset <= _get(w, "upto")) & (_get(w, "shared") != 0)
    same = within & (_get(w, "shared") == register)
    if same & (kind <= _get(w, "kind")):
        inside = ~first.slt(_get(w, "low")) & ~_get(w, "high").slt(last)
        returns(select(inside, u64(FOLLOW), u64(ALONE)))
    if (within & ~same) | (register == 0):
        returns(u64(ALONE))
    before, upto, low, high = (_get(w, name) for name in ("kind", "upto", "low", "high"))
    _put(w, "kind", kind)
    _put(w, "upto", offset)
    _put(w, "low", first)
    _put(w, "high", last)
    call("template_gather", w, offset, register, _get(w, "before"))
    if _get(w, "upto") != offset:
        _put(w, "shared", register)
        returns(u64(LEAD))
    _put(w, "kind", before)
    _put(w, "upto", upto)
    _put(w, "low", low)
    _put(w, "high", high)
    returns(u64(ALONE))


def gather(h: FunctionHart) -> None:
    """(Work, offset, register, instructions since ic was exact): widen what a look covers by the accesses behind this
    instruction, up to where the register changes or code can be entered.
    """
    w, offset, register, before = (param(f"p{index}") for index in range(4))
    group, record = _group(w, offset >> 1), load(_item(w, "records", offset >> 1))
    rd_byte = _field(group, Group, "rd")
    changes = (rd_byte != 0) & (((record >> (rd_byte << 3)) & 0xFF) == register)
    long = (load(_item(w, "content", offset), 16, "plain", 1) & 3) == 3
    after = offset + select(long, u64(4), u64(2))
    half = after >> 1
    if changes | (_field(group, Group, "ends") != 0) | (after >= 4096) | (before + 1 >= _STRAIGHT):
        returns(u64(0))
    there = (load(_item(w, "wanted", half), 8) != 0) & (load(_item(w, "groups", half), 16) != 0)
    if ~there | (load(_item(w, "leaders", half), 8) != 0):
        returns(u64(0))
    group, record = _group(w, half), load(_item(w, "records", half))
    kind = _field(group, Group, "access")
    if (kind != 0) & (((record >> (_field(group, Group, "rs1") << 3)) & 0xFF) == register):
        if kind > _get(w, "kind"):
            returns(u64(0))
        first, last = _covers(group, record)
        low, high = _get(w, "low"), _get(w, "high")
        low, high = select(first.slt(low), first, low), select(high.slt(last), last, high)
        if high - low < _REACH:
            _put(w, "low", low)
            _put(w, "high", high)
            _put(w, "upto", after)
    returns(*call("template_gather", w, after, register, before + 1))


def step(h: FunctionHart) -> None:
    """(Work, offset): one instruction."""
    w, offset = param("p0"), param("p1")
    record, group = load(_item(w, "records", offset >> 1)), _group(w, offset >> 1)
    before = _get(w, "before")
    _put(w, "offset", offset)
    _put(w, "start", _get(w, "used"))
    _put(w, "record", record)
    _put(w, "count", before + 1)
    rd_byte = _field(group, Group, "rd")
    rd = select(rd_byte == 0, u64(_NOTHING), (record >> (rd_byte << 3)) & 0xFF)
    rs1 = _source(w, record, _field(group, Group, "rs1"))
    rs2 = _source(w, record, _field(group, Group, "rs2"))
    how, wants = u64(ALONE), u64(1)
    if _field(group, Group, "access") != 0:
        how, _ = call("template_share", w, offset)
        wants = select(how == LEAD, (_get(w, "high") - _get(w, "low") + 8) >> 3, u64(1))
    _put(w, "wants", wants)
    index = rs1 + rs2 * 3 + select(rd == X0_SINK, u64(9), u64(0)) + how * 18
    call("template_copy", w, load(group + Group.variants.offset + (index << 1), 16, "plain", 1).zext(64))
    left = (_field(group, Group, "result") != 0) & (rd != X0_SINK)
    _put(w, "last", select(left, rd, u64(_NOTHING)))
    _put(w, "before", before + 1)
    _put(w, "open", select(_field(group, Group, "ends") == 0, u64(1), u64(0)))
    returns(u64(0))


def copy(h: FunctionHart) -> None:
    """(Work, number of a template): its code, patched."""
    w, number = param("p0"), param("p1")
    table = _get(w, "table")
    template = table + _field(table, Table, "templates") + number * ctypes.sizeof(Template)
    code, length = table + _field(template, Template, "code"), _field(template, Template, "length")
    _put(w, "end", _get(w, "base") + _get(w, "used") + length)
    patches = table + _field(template, Template, "patches")
    count = _field(template, Template, "count")
    done, _ = call("template_patch", w, patches, patches + count * ctypes.sizeof(Patch), code, u64(0))
    used = _get(w, "used")
    call("template_bytes", _get(w, "out") + used, code + done, length - done)
    _put(w, "used", used + length - done)
    returns(u64(0))


def copy_bytes(h: FunctionHart) -> None:
    """(to, from, size): up to 7 bytes more than that."""
    to, source, size = param("p0"), param("p1"), param("p2")
    if size.slt(1):
        returns(u64(0))
    store(to, load(source, 64, "volatile", 1), "volatile", 1)
    returns(*call("template_bytes", to + 8, source + 8, size - 8))


def patch(h: FunctionHart) -> None:
    """(Work, patches, their end, a template's code, how much of it is copied) -> how much is when they are done."""
    w, at, end, code, done = (param(f"p{index}") for index in range(5))
    if at == end:
        returns(done)
    upto, used = _field(at, Patch, "at"), _get(w, "used")
    call("template_bytes", _get(w, "out") + used, code + done, upto - done)
    _put(w, "used", used + upto - done)
    size, _ = call("template_number", w, at)
    returns(*call("template_patch", w, at + ctypes.sizeof(Patch), end, code, upto + size))


def number(h: FunctionHart) -> None:
    """(Work, a patch): it is put in -> its size in the template."""
    w, at = param("p0"), param("p1")
    place, word = _get(w, "used"), _field(at, Patch, "word")
    there = _get(w, "out") + place
    if _field(at, Patch, "kind") == LATER:
        count = _get(w, "fix_count")
        fix = w + WORD_OF["fixes"] + (count << 4)
        store(fix, place | (_get(w, "start") << 32))
        counts = (_get(w, "wants") << 24) | (_get(w, "before") << 32) | (_get(w, "last") << 48)
        store(fix + 8, word | (_get(w, "offset") << 8) | counts)
        _put(w, "fix_count", count + 1)
        _put(w, "used", place + 4)
        returns(u64(4))
    value, _ = call("template_value", w, at, place)
    size, flip = _field(at, Patch, "size"), _field(at, Patch, "flip")
    store(there, value, "plain", 1)
    if (flip != 0) & (value + 128 < 256):
        before = there - _field(at, Patch, "back")
        store(before, load(before, 8) ^ flip.trunc(8))
        _put(w, "used", place + 1)
        returns(size)
    _put(w, "used", place + size)
    returns(size)


def value_of(h: FunctionHart) -> None:
    """(Work, a patch, its place) -> the number."""
    w, at, place = param("p0"), param("p1"), param("p2")
    shift, bits = _field(at, Patch, "shift"), _field(at, Patch, "bits")
    top = _get(w, "record") << (u64(64) - shift - bits)
    operand = select(_field(at, Patch, "signed") != 0, top.sar(u64(64) - bits), top >> (u64(64) - bits))
    found = select(_field(at, Patch, "kind") == OPERAND, operand, load(w + _field(at, Patch, "word")))
    relative = select(_field(at, Patch, "relative") != 0, _get(w, "base") + place, u64(0))
    returns(found * _field(at, Patch, "factor") + _field(at, Patch, "addend") - relative)


def fix(h: FunctionHart) -> None:
    """(Work, index): jumps whose target was not known, from here on."""
    w, index = param("p0"), param("p1")
    if index == _get(w, "fix_count"):
        returns(u64(0))
    at = w + WORD_OF["fixes"] + (index << 4)
    place, start, what = load(at, 32).zext(64), load(at + 4, 32).zext(64), load(at + 8)
    kind, offset, wants = what & 0xFF, (what >> 8) & 0xFFFF, (what >> 24) & 0xFF
    before, last = (what >> 32) & 0xFFFF, what >> 48
    packed = (offset << 2) | (before << 16)
    _put(w, "offset", offset)
    _put(w, "count", before + 1)
    _put(w, "packed", packed)
    if kind == LATER_EXIT:
        call("template_exit", w)
        target = _get(w, "exit")
    elif kind == LATER_TAKEN:
        target, _ = call("template_taken", w)
    else:
        _put(w, "again", packed | (wants << 21) | ((last & 31) << 26) | ((_get(w, "base") + start) << 32))
        target = _get(w, "base") + _get(w, "used")
        call("template_copy", w, select(kind == LATER_LOAD_MISS, u64(LOAD_MISS), u64(STORE_MISS)))
    store(_get(w, "out") + place, (target - (_get(w, "base") + place + 4)).trunc(32), "plain", 1)
    returns(*call("template_fix", w, index + 1))


def make_exit(h: FunctionHart) -> None:
    """(Work): `exit` of the instruction at `offset`."""
    w = param("p0")
    offset = _get(w, "offset")
    if _get(w, "exit_of") == offset + 1:
        returns(u64(0))
    _put(w, "exit_of", offset + 1)
    _put(w, "exit", _get(w, "base") + _get(w, "used"))
    returns(*call("template_copy", w, u64(EXIT)))


def taken(h: FunctionHart) -> None:
    """(Work) -> where the near branch at `offset` goes to when it is taken. Forward at once; backward, and for a call, with a
    look at `limit`, and by the record, because a region may begin there.
    """
    w = param("p0")
    offset = _get(w, "offset")
    group, record = _group(w, offset >> 1), load(_item(w, "records", offset >> 1))
    to = _goes_to(group, record, offset)
    rd_byte = _field(group, Group, "rd")
    links = (rd_byte != 0) & (((record >> (rd_byte << 3)) & 0xFF) != X0_SINK)
    place = load(_item(w, "places", to >> 1), 32).zext(64)
    if (place != 0) & (to > offset) & ~links:
        _put(w, "target", _get(w, "base") + place - 1)
        here = _get(w, "base") + _get(w, "used")
        call("template_copy", w, u64(TAKEN))
        returns(here)
    call("template_exit", w)
    _put(w, "to", to << 2)
    here = _get(w, "base") + _get(w, "used")
    call("template_copy", w, u64(BACK))
    returns(here)


def heads(h: FunctionHart) -> None:
    """(Work, index): the ways in, from here on."""
    w, index = param("p0"), param("p1")
    if index == _get(w, "head_count"):
        returns(u64(0))
    half = load(_item(w, "heads", index), 16).zext(64)
    used = _get(w, "used")
    store(_get(w, "out") + _get(w, "list") + 8 + (index << 2), ((half << 20) | used).trunc(32), "plain", 4)
    _put(w, "to", half << 3)
    _put(w, "target", _get(w, "base") + load(_item(w, "places", half), 32).zext(64) - 1)
    call("template_copy", w, u64(ENTRY))
    returns(*call("template_heads", w, index + 1))


# -- in VM processes ---------------------------------------------------------------------------------------


def install(h: FunctionHart) -> None:
    """(decoded page, address of a list of heads, its place, what regions' records are at least): records lead to the code."""
    page, at, place, regions = param("p0"), param("p1"), param("p2"), param("p3")
    count, back = load(at, 32).zext(64), load(at + 4, 32).zext(64)
    returns(*call("template_lay", page, at + 8, at + 8 + count * 4, place - back, regions))


def lay(h: FunctionHart) -> None:
    """install(); (page, a head, the end of the list, place of the code, regions)."""
    page, at, end, code, regions = (param(f"p{index}") for index in range(5))
    if at == end:
        returns(u64(0))
    head = load(at, 32).zext(64)
    half = head >> 20
    there = page + machine_state.PAGE_RECORDS + half * machine_state.RECORD
    before = load(there, 64, "volatile")
    if (before & 0xFFFFFFFF) < regions:
        target = code + (head & (MOST - 1))
        if before == 0:  # who comes by here as the second of a pair needs the operands
            raw = load(page + machine_state.PAGE_COPY + (half << 1), 32, "plain", 1)
            record, _ = call("decode_word", select((raw & 3) == 3, raw, raw & 0xFFFF).zext(64), half << 1)
            store(there, (record & ~0xFFFFFFFF) | target, "volatile")
        else:
            store(there, (before & ~0xFFFFFFFF) | target, "volatile")
    returns(*call("template_lay", page, at + 4, end, code, regions))


FUNCTIONS = {
    "template_assemble": (1, assemble),
    "template_decode": (2, decode),
    "template_lead": (3, lead),
    "template_emit": (2, emit),
    "template_close": (2, close),
    "template_begin": (2, begin),
    "template_step": (2, step),
    "template_share": (2, share),
    "template_gather": (4, gather),
    "template_copy": (2, copy),
    "template_bytes": (3, copy_bytes),
    "template_patch": (5, patch),
    "template_number": (2, number),
    "template_value": (3, value_of),
    "template_fix": (2, fix),
    "template_exit": (1, make_exit),
    "template_taken": (1, taken),
    "template_heads": (2, heads),
    "template_install": (4, install),
    "template_lay": (5, lay),
}
