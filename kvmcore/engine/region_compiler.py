"""Regions to machine code, by LLVM. The translator's; no other process imports it.

A region's object file is linked into a blob that depends on nothing but its parameters (link.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import llvmlite.binding as llvm

from kvmcore.engine.link import link
from kvmcore.engine.region_code import RegionEmitter
from kvmcore.engine.regions import Code, Region

#: Constant hoisting hides from instruction selection that addw is an addition and a sign extension. Loop strength reduction
#: sees every exit's addresses as worth a register.
_OPTIONS = ("--disable-constant-hoisting", "--disable-lsr")


@cache
def _machine() -> llvm.TargetMachine:
    for option in _OPTIONS:
        llvm.set_option("", option)
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=1,
        reloc="pic",
        codemodel="small",
    )


def compile_region(code: Code, region: Region, offsets: Mapping[str, int], identities: Mapping[int, int]) -> bytes:
    """Position-independent machine code; its entry is at its beginning."""
    blob, functions = link(optimised(RegionEmitter(code, region, offsets, identities).text()))
    assert functions["region"] == 0
    return blob


def optimised(text: str) -> bytes:
    """LLVM IR text to an object file."""
    machine = _machine()
    module = llvm.parse_assembly(text)
    module.triple = llvm.get_default_triple()
    module.data_layout = str(machine.target_data)
    passes = llvm.create_new_module_pass_manager()
    passes.add_sroa_pass()
    passes.add_instruction_combine_pass()
    passes.add_simplify_cfg_pass()
    passes.run(module, llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=1)))
    return bytes(machine.emit_object(module))
