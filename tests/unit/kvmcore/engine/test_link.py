"""Functions compiled apart become one blob."""

from __future__ import annotations

import ctypes
import mmap

import pytest

from kvmcore.engine.build import compile_text
from kvmcore.engine.link import LinkError, link
from kvmcore.engine.native_hart import call, param, returns
from kvmcore.ir.llvm_text import Emitter
from kvmcore.ir.trace import Tracer
from kvmcore.ir.value import u64

_EXPORT = """
define i64 @python_{name}(i64 %p0) #1 {{
  %r = call fastcc {{i64, i64}} @{name}(i64 %p0)
  %v = extractvalue {{i64, i64}} %r, 0
  ret i64 %v
}}
"""


def _emitter() -> Emitter:
    """Four functions that call one another, to and fro."""
    emitter = Emitter()

    def chain(number: int) -> None:
        tracer = Tracer()
        tracer.trace(lambda: returns(call(f"f{number + 1}", param("p0") * 3)[0] + number))
        emitter.function(f"f{number}", 1, tracer.root)

    for number in range(3):
        chain(number)
    tracer = Tracer()

    def last() -> None:
        if param("p0") < 100:
            returns(*call("f0", param("p0") + 100))
        returns(param("p0") + u64(7))

    tracer.trace(last)
    emitter.function("f3", 1, tracer.root)
    for number in range(4):
        emitter.raw(_EXPORT.format(name=f"f{number}"))
    return emitter


def _expected(number: int, value: int) -> int:
    if number == 3:
        return _expected(0, value + 100) if value < 100 else value + 7
    return _expected(number + 1, value * 3) + number


@pytest.mark.parametrize("count", [1, 2, 3])
def test_what_is_compiled_apart_works_together(count: int) -> None:
    modules = _emitter().modules(count)
    assert len(modules) == count
    blob, functions = link(*map(compile_text, modules))
    assert min(functions, key=lambda name: functions[name]) == "f0", "what is first stays first"
    room = mmap.mmap(-1, -(-len(blob) // 4096) * 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    room.write(blob)
    base = ctypes.addressof(ctypes.c_char.from_buffer(room))
    word = ctypes.c_uint64
    for number in range(4):
        function = ctypes.CFUNCTYPE(word, word)(base + functions[f"python_f{number}"])
        assert [function(value) for value in (1, 50, 1000)] == [_expected(number, value) for value in (1, 50, 1000)]


def test_what_nobody_has_is_missed() -> None:
    with pytest.raises(LinkError, match="undefined: f"):
        link(compile_text(_emitter().modules(2)[0]))
