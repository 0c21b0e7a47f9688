"""Builds the engine's image: `python -m kvmcore.engine.build [FILE]`, started by loader.py when there is
none.

Traces all semantics and routines, compiles them with LLVM in three processes, links and writes the image atomically. Nothing
else of tier 1 loads LLVM; it ends when the file is there.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import llvmlite.binding as llvm

from kvmcore.engine import client_code, image, running, templates
from kvmcore.engine.exits import ExitKind
from kvmcore.engine.interpreter import emit
from kvmcore.engine.link import link, pieces
from kvmcore.ir.llvm_text import Emitter

#: What Python calls. Saves the host's MXCSR; a machine that is stopped lets nobody in.
_ENTRY = """
define i64 @run(i64 %s) #1 {{
  %sp = inttoptr i64 %s to ptr
  %inp = getelementptr i8, ptr %sp, i64 {running}
  %old = atomicrmw xchg ptr %inp, i32 1 seq_cst
  %mp = getelementptr i8, ptr %sp, i64 {machine}
  %m = load ptr, ptr %mp
  %stop = load atomic i64, ptr %m seq_cst, align 8
  %stopped = icmp ne i64 %stop, 0
  %kp = getelementptr i8, ptr %sp, i64 {exit_kind}
  br i1 %stopped, label %out, label %in
in:
  %hp = getelementptr i8, ptr %sp, i64 {host_mxcsr}
  call void @llvm.x86.sse.stmxcsr(ptr %hp)
  %icp = getelementptr i8, ptr %sp, i64 {icount}
  %ic = load i64, ptr %icp
  %tp = getelementptr i8, ptr %sp, i64 {tlb}
  %t = load i64, ptr %tp
  %base = ptrtoint ptr @decode to i64
  call preserve_nonecc void @enter(i64 poison, i64 %s, i64 poison,
      i64 %base, i64 %ic, i64 %t, i64 poison, i64 poison, i64 poison)
  call void @llvm.x86.sse.ldmxcsr(ptr %hp)
  %left = atomicrmw xchg ptr %inp, i32 0 seq_cst
  %k = load i32, ptr %kp
  %k64 = zext i32 %k to i64
  ret i64 %k64
out:
  store atomic i32 0, ptr %inp release, align 4
  ret i64 {stopped}
}}
define i64 @atomic_or64(i64 %p, i64 %v) #1 {{
  %pp = inttoptr i64 %p to ptr
  %r = atomicrmw or ptr %pp, i64 %v seq_cst
  ret i64 %r
}}
define i64 @atomic_and64(i64 %p, i64 %v) #1 {{
  %pp = inttoptr i64 %p to ptr
  %r = atomicrmw and ptr %pp, i64 %v seq_cst
  ret i64 %r
}}
define i64 @signal(i64 %s, i64 %flags) #1 {{
  %sp = inttoptr i64 %s to ptr
  %ap = getelementptr i8, ptr %sp, i64 {attention}
  %f = trunc i64 %flags to i32
  %r = atomicrmw or ptr %ap, i32 %f seq_cst
  %lp = getelementptr i8, ptr %sp, i64 {limit}
  store atomic i64 0, ptr %lp seq_cst, align 8
  ret i64 0
}}
define i64 @decode_record(i64 %raw, i64 %offset) #1 {{
  %r = call fastcc {{i64, i64}} @decode_word(i64 %raw, i64 %offset)
  %v = extractvalue {{i64, i64}} %r, 0
  ret i64 %v
}}
define i64 @ticks() #1 {{
  %r = call i64 @llvm.readcyclecounter()
  ret i64 %r
}}
"""

_RUN_ONCE = """
define hidden fastcc {i64, i64} @run_once(i64 %s) #1 {
  %k = call i64 @run(i64 %s)
  %a = insertvalue {i64, i64} poison, i64 %k, 0
  %b = insertvalue {i64, i64} %a, i64 0, 1
  ret {i64, i64} %b
}
"""
#: A function of running.EXPORTS, for Python.
_EXPORT = """
define i64 @python_{name}({parameters}) #1 {{
  %r = call fastcc {{i64, i64}} @{name}({parameters})
  %v = extractvalue {{i64, i64}} %r, 0
  ret i64 %v
}}
"""

#: What regions call: all registers but the result's are as they were, so that a slow path costs a region nothing.
_FOR_REGIONS = """
define hidden preserve_mostcc i64 @region_load_{size}(i64 %s, i64 %va) #1 {{
  %r = call fastcc {{i64, i64}} @again_load_{size}(i64 %s, i64 %va)
  %v = extractvalue {{i64, i64}} %r, 0
  %k = extractvalue {{i64, i64}} %r, 1
  %a = add i64 %s, {region_status}
  %p = inttoptr i64 %a to ptr
  store i64 %k, ptr %p
  ret i64 %v
}}
define hidden preserve_mostcc i64 @region_store_{size}(i64 %s, i64 %va, i64 %value) #1 {{
  %r = call fastcc {{i64, i64}} @again_store_{size}(i64 %s, i64 %va, i64 %value)
  %k = extractvalue {{i64, i64}} %r, 1
  %a = add i64 %s, {region_status}
  %p = inttoptr i64 %a to ptr
  store i64 %k, ptr %p
  ret i64 0
}}
"""

#: (a page's copy, its bytes in memory) -> whether they differ. In vectors, so not written over Values: after every fence.i
#: each page that is entered again is compared, and a kernel that patches itself does thousands of them.
_DIFFER = """
define hidden fastcc {i64, i64} @differ(i64 %a, i64 %b) #2 {
entry:
  br label %next
next:
  %at = phi i64 [ 0, %entry ], [ %after, %equal ]
  %aa = add i64 %a, %at
  %ba = add i64 %b, %at
  %ap = inttoptr i64 %aa to ptr
  %bp = inttoptr i64 %ba to ptr
  %av = load <32 x i64>, ptr %ap, align 8
  %bv = load <32 x i64>, ptr %bp, align 8
  %x = xor <32 x i64> %av, %bv
  %d = call i64 @llvm.vector.reduce.or.v32i64(<32 x i64> %x)
  %differs = icmp ne i64 %d, 0
  br i1 %differs, label %out, label %equal
equal:
  %after = add i64 %at, 256
  %done = icmp eq i64 %after, 4096
  br i1 %done, label %out, label %next
out:
  %r = phi i64 [ 1, %next ], [ 0, %equal ]
  %r0 = insertvalue {i64, i64} poison, i64 %r, 0
  %r1 = insertvalue {i64, i64} %r0, i64 0, 1
  ret {i64, i64} %r1
}
attributes #2 = { nounwind noinline }
"""


def build() -> bytes:
    """The content of the image file for this host."""
    from kvmcore.engine.hart_state import FIELDS, offset

    emitter = Emitter()
    emit(emitter)
    emitter.declare("declare void @llvm.x86.sse.stmxcsr(ptr)")
    emitter.declare("declare void @llvm.x86.sse.ldmxcsr(ptr)")
    emitter.declare("declare i64 @llvm.readcyclecounter()")
    emitter.raw(_ENTRY.format(stopped=int(ExitKind.STOPPED), **{field.name: offset(field.name) for field in FIELDS}))
    emitter.declare("declare i64 @llvm.vector.reduce.or.v32i64(<32 x i64>)")
    emitter.raw(_DIFFER)
    emitter.raw(_RUN_ONCE)
    for declaration in client_code.DECLARATIONS:
        emitter.declare(declaration)
    emitter.raw(client_code.TEXT)
    for name, count in running.EXPORTS.items():
        emitter.raw(_EXPORT.format(name=name, parameters=", ".join(f"i64 %p{index}" for index in range(count))))
    emitter.raw(_EXPORT.format(name="template_assemble", parameters="i64 %p0"))
    emitter.raw(_EXPORT.format(name="template_install", parameters="i64 %p0, i64 %p1, i64 %p2, i64 %p3"))
    emitter.raw(_EXPORT.format(name="know", parameters="i64 %p0, i64 %p1"))
    for size in (1, 2, 4, 8):
        emitter.raw(_FOR_REGIONS.format(size=size, region_status=offset("region_status")))
    first, second = emitter.modules(2)
    rest = _elsewhere(lambda: compile_text(second))
    made = templates.trace_all()
    template_code = _elsewhere(lambda: compile_text(made.text, "static"))
    code, functions = link(compile_text(first), rest())
    decode = functions["decode"]
    functions = {name: offset - decode for name, offset in functions.items()}
    table = templates.table(made, pieces(template_code()), functions)
    code += bytes(-len(code) % image.PAGE)
    return image.pack(code + table, functions | {"_decode_at": decode, "_templates_at": len(code) - decode})


def _elsewhere(work: Callable[[], bytes]) -> Callable[[], bytes]:
    """Begin it in a process of its own; what is returned waits for the result. RuntimeError: it came to nothing."""
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        status = 1
        try:
            os.close(reader)
            with os.fdopen(writer, "wb") as out:
                out.write(work())
            status = 0
        finally:
            os._exit(status)
    os.close(writer)

    def result() -> bytes:
        with os.fdopen(reader, "rb") as made:
            content = made.read()
        _, status = os.waitpid(process, 0)
        if status:
            raise RuntimeError(f"a process that compiles has ended with status {status}")
        return content

    return result


def compile_text(text: str, addresses: str = "pic") -> bytes:
    """LLVM IR text to an object file."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    llvm.initialize_native_asmparser()  # for system calls
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=2,
        reloc=addresses,
        codemodel="small",
    )
    module = llvm.parse_assembly(text)
    module.triple = llvm.get_default_triple()
    module.data_layout = str(machine.target_data)
    # Traces are straight and small: a whole O1 pipeline takes four times as long and finds nothing more.
    passes = llvm.create_new_module_pass_manager()
    passes.add_instruction_combine_pass()
    passes.add_tail_call_elimination_pass()  # a routine's call of itself becomes a loop
    passes.add_simplify_cfg_pass()
    passes.run(module, llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=1)))
    return bytes(machine.emit_object(module))


def main() -> int:
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else image.path()
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    content = build()
    fd, temporary = tempfile.mkstemp(dir=target.parent, prefix=".engine-")
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(content)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
