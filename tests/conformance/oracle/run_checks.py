"""The oracle's checks that run guest code (guest.py), in the order of the recording."""

from __future__ import annotations

import struct
import time

from protocol.abi import run_page, structs
from protocol.abi.structs_riscv import (
    CONFIG,
    CORE_NAMES,
    CSR_ID,
    ISA_EXT,
    SBI_EXT,
    SBI_HSM,
    SBI_IPI,
    SBI_RFENCE,
    SBI_SRST,
    SBI_TIME,
    one_reg,
)  # fmt: skip

from . import guest
from .port import RAM, Guest, Port

DEVICE = 0x10000000
DBCN, BASE_EXTENSION = 0x4442434E, 0x10
WFI_KICK_AFTER = 0.3
HSM_NUMBERS = (
    SBI_TIME, SBI_IPI, SBI_RFENCE, SBI_HSM, SBI_SRST, 0x504D55, DBCN, 0x53555350, 0x535441, 0x46574654,
    0x43505043, 0x4E41434C, 0x535345, 0x4D505859, 0x44425452, 0, 1, 8, 0x0A000000,
)  # fmt: skip
"""Extension ids that the recording probed: TIME IPI RFENCE HSM SRST PMU DBCN SUSP STA FWFT CPPC NACL SSE
MPXY DBTR...
"""


def mapping(port: Port, say) -> None:
    vm = port.create_vm()
    vm.result_handle("CREATE_VCPU", 0)
    vcpu = vm.vcpus[0]
    say("mmap vcpu 1 page", vcpu.mmap(0, 4096))
    say("mmap vcpu offset 64 pages no ring", vcpu.mmap(64 * 4096, 4096))
    say("mmap vcpu MAP_PRIVATE", vcpu.mmap(0, 4096, private=True))
    vm.close()


def mmio(port: Port, say) -> None:
    with Guest(port) as g:
        cpu = g.cpu
        mode, a0, sp = (cpu.get(port.core(name)) for name in ("mode", "a0", "sp"))
        say(f"reset regs: mode={mode} a0={a0:x} sp={sp:x}")
        cpu.set_pc("start", offset=0)
        g.immediate_exit = True
        say("RUN immediate_exit first", g.run())
        g.immediate_exit = False
        say("RUN mmio lw", g.run())
        g.answer(b"\x80" * 8)
        g.immediate_exit = True
        line = g.run()
        say("RUN complete by immediate_exit", f"{line} |a0={cpu.x('a0'):x}")
        say("RUN immediate_exit twice", g.run())
        g.immediate_exit = False
        say("RUN ld", g.run())
        g.answer(bytes.fromhex("0102030405060788"))
        say("RUN lbu", g.run())
        g.answer(b"\x99")
        line = g.run()
        say("RUN sb", f"{line} |a1={cpu.x('a1'):x} a2={cpu.x('a2'):x}")
        say("RUN sd", g.run())
        say("RUN misaligned lw (or error)", g.run())
        say("RUN after misaligned again", g.run())
        say("SET isa_ext after run SSTC(8)", cpu.set(one_reg(ISA_EXT, 8), 0))
        say("SET config mvendorid after run", cpu.set(one_reg(CONFIG, 2), 1))
        say("SET sbi_ext after run", cpu.set(one_reg(SBI_EXT, 9), 1))
        say("SET core pc after run", cpu.set_pc("loop"))
        say("GET_MP", cpu.mp_state_result())
        say("RUN infinite loop + SIGALRM", g.loop())
        say("SET_MP_STATE STOPPED", cpu.set_mp_state(5))
        say("RUN stopped vcpu + SIGALRM", g.loop())
        say("fork: vm ioctl", g.vm.from_another_process("CHECK_EXTENSION", 3))
        say("fork: vcpu ioctl", cpu.from_another_process("GET_MP_STATE", bytes(4)))
        g.vm.close_handle()
        say("vcpu ioctl after close(vm)", cpu.mp_state_result())


def call_sbi(g: Guest, eid: int, fid: int = 0, *args: int, forwarded: bool = False) -> str:
    """ecall with a7, a6, a0.. set. Those that are not forwarded are kicked out of the loop behind it."""
    for index in range(6):
        g.cpu.set_x(f"a{index}", args[index] if index < len(args) else 0)
    g.cpu.set_x("a6", fid)
    g.cpu.set_x("a7", eid)
    g.cpu.set_pc("do_ecall")
    return g.run() if forwarded else g.loop()


def sbi(port: Port, say) -> None:
    with Guest(port) as g:
        say("RUN ecall DBCN (default disabled) then loop?", call_sbi(g, DBCN))
    with Guest(port) as g:
        cpu = g.cpu
        say("enable DBCN", cpu.set(one_reg(SBI_EXT, 9), 1))
        line = call_sbi(g, DBCN, forwarded=True)
        say("RUN ecall DBCN enabled", f"{line} |pc=+{cpu.pc() - guest.BASE:x} a0={cpu.x('a0'):x}")
        g.answer_sbi(-7, 42)
        g.immediate_exit = True
        line = g.run()
        g.immediate_exit = False
        say("RUN complete SBI", f"{line} |a0={cpu.signed('a0')} a1={cpu.signed('a1')}")
        say("RUN ecall vendor ext 0x0A000001", call_sbi(g, 0x0A000001))
        say("RUN ecall vendor ext 0x09000001", call_sbi(g, 0x09000001, forwarded=True))
        g.finish()
        say("RUN ecall experimental 0x08000001", call_sbi(g, 0x08000001, forwarded=True))
        g.finish()
        say("RUN ecall legacy putchar", call_sbi(g, 1))
        line = call_sbi(g, SBI_SRST, 0, 0, 1, forwarded=True)
        say("RUN ecall SRST shutdown reason 1", f"{line} |mp after SRST={cpu.mp_state()}")
        say("RUN RUN after SRST", g.loop())
        cpu.set_mp_state(0)
        say("RUN ecall SRST cold reboot", call_sbi(g, SBI_SRST, 0, 1, 0, forwarded=True))
        cpu.set_mp_state(0)
        for fid in (0, 1, 2, 4):
            line = call_sbi(g, BASE_EXTENSION, fid)
            say("RUN ecall BASE", f"{line} |fid={fid} a0={cpu.x('a0'):x} a1={cpu.x('a1'):x}")
    with Guest(port) as g:
        for eid in HSM_NUMBERS:
            call_sbi(g, BASE_EXTENSION, 3, eid)
            say(f"probe {eid:x} -> a0={g.cpu.x('a0'):x} a1={g.cpu.x('a1'):x} exit={g.exit_reason}")


def traps(port: Port, say) -> None:
    with Guest(port) as g:
        cpu = g.cpu
        cpu.set(CSR_ID["stvec"], guest.at("loop"))
        debug = structs.GUEST_DEBUG.build
        say("GUEST_DEBUG ENABLE|SW_BP", cpu.result("SET_GUEST_DEBUG", debug(control=0x10001)))
        cpu.set_pc("breakpoint")
        say("RUN ebreak with debug", g.run())
        say("RUN ebreak again without moving pc", g.run())
        cpu.set_pc("breakpoint", offset=4)
        say("RUN after pc+4", g.run())
        cpu.result("SET_GUEST_DEBUG", debug())

        def trap(
            name: str, label: str, show: str = "scause", stvec: int = guest.at("loop"), **regs: int
        ) -> None:
            for csr in ("scause", "stval"):
                cpu.set(CSR_ID[csr], 0)
            cpu.set(CSR_ID["stvec"], stvec)
            for register, value in regs.items():
                cpu.set_x(register, value)
            cpu.set_pc(label)
            line = g.loop()
            shown = " ".join(f"{csr}={cpu.get(CSR_ID[csr]):x}" for csr in show.split())
            say(f"RUN {name}", f"{line} |{shown}" if shown else line)

        trap("ebreak no debug -> guest stvec", "breakpoint")
        trap("csrr seed", "seed_read", stvec=0)
        trap("csrw 0x7c0 custom M", "unknown_csr")
        trap("csrr hstatus", "hypervisor_csr", show="scause stval")
        cpu.set_x("t0", DEVICE)
        cpu.set_pc("amo")
        say("RUN amoadd to MMIO", g.run())
        cpu.set(CSR_ID["sstatus"], 0x2000)
        cpu.set_pc("fp_load")
        say("RUN fld from MMIO", g.run())
        cpu.set(port.core("pc"), 0x40000000)
        cpu.set(CSR_ID["scause"], 0)
        line = g.loop()
        say("RUN fetch from unmapped gpa", f"{line} |scause={cpu.get(CSR_ID['scause']):x}")


def write_from(g: Guest, address: int, count: int, step: int = 4096) -> str:
    """Run the writer: `count` stores of 8 zero bytes, `step` apart; then it stores to the device."""
    for register, value in (("t1", address), ("t2", step), ("t3", count)):
        g.cpu.set_x(register, value)
    g.cpu.set_pc("writer")
    return g.run()


def dirty(port: Port, say) -> None:
    with Guest(port, flags=1) as g:
        vm = g.vm
        first = g.log_words()
        vm.map(RAM + 0x4000000, 0x10000)
        vm.region(1, 2, 0x90000000, 0x10000, RAM + 0x4000000)
        line = write_from(g, 0x90000100, 1)
        say("RUN store to READONLY slot", f"{line} |dirty at start: {first[0]:x} {g.log_words()[0]:x}")
        g.finish()
        line = write_from(g, guest.BASE + 0x10000, 4)
        say("RUN dirty 4 pages", f"{line} |dirty: {g.log_words()[0]:x} |dirty 2nd read: {g.log_words()[0]:x}")
        if vm.enable_cap(168, 3) != "0":
            vm.enable_cap(168, 1)
        g.reset_slot()
        say(f"INITIALLY_SET first get: {g.log_words()[0]:x}")
        say(f"INITIALLY_SET second get (no clear): {g.log_words()[0]:x}")
        vm.clear_log(0, 0, g.pages, bytes([0xFF]) * (g.pages // 8))
        say(f"after clear: {g.log_words()[0]:x}")


def dirty_ring(port: Port, say) -> None:
    if port.compat == "6.12":
        return
    answer: list[str] = []
    with Guest(port, flags=1, before=lambda vm: answer.append(vm.enable_cap(223, 4096))) as g:
        vm, cpu = g.vm, g.cpu
        say("ring 4096", answer[0])
        say("DLOG with ring", vm.get_log(0))
        say("CLOG with ring", vm.clear_log(0, 0, 64))
        say("mmap ring", cpu.mmap(64 * 4096, 4096))
        say("mmap ring PROT_EXEC", cpu.mmap(64 * 4096, 4096, executable=True))
        say("mmap ring PRIVATE", cpu.mmap(64 * 4096, 4096, private=True))
        say("mmap across ring", cpu.mmap(63 * 4096, 8192))
        line = write_from(g, guest.BASE + 0x10000, 1000)
        entries = g.harvest(4096)
        flags, slot, offset = entries[0]
        say(
            "RUN ring full",
            f"{line} |harvested {len(entries)} first slot={slot} off={offset:x} flags={flags}",
        )
        say("RUN ring still full", g.run())
        say("RESET_DIRTY_RINGS", vm.result("RESET_DIRTY_RINGS"))
        say("RUN after reset", g.run())


def posted_writes(port: Port, say) -> None:
    with Guest(port) as g:
        vm, cpu = g.vm, g.cpu
        vm.result("REGISTER_COALESCED_MMIO", structs.COALESCED_MMIO_ZONE.build(addr=DEVICE, size=8))

        def run() -> tuple[str, int, int, tuple[int, ...]]:
            cpu.set_x("t0", DEVICE)
            cpu.set_x("t1", 0x1234)
            cpu.set_pc("posted")
            line = g.run()
            first, last = struct.unpack_from("<II", g.page, run_page.COALESCED_FIRST)
            return line, first, last, run_page.COALESCED_ENTRY.unpack_from(g.page, run_page.COALESCED_ENTRIES)

        line, first, last, entry = run()
        say(
            "RUN coalesced: 2 of 3 absorbed",
            f"{line} |first={first} last={last} gpa={entry[0]:x} len={entry[1]}",
        )
        g.finish()
        event = vm.eventfd()
        vm.ioeventfd(event, DEVICE, 4, match=0x1234)
        line, first, last, _ = run()
        say(
            "RUN ioeventfd vs coalesced same addr",
            f"{line} |eventfd={event.count()} first={first} last={last}",
        )


def waiting(port: Port, say) -> None:
    with Guest(port) as g:
        cpu = g.cpu
        cpu.set_pc("wait")
        say("RUN wfi no irq + SIGALRM", g.run(kick=WFI_KICK_AFTER))
        cpu.set(CSR_ID["sie"], 1 << 9)
        cpu.result("INTERRUPT", structs.INTERRUPT.build(irq=0xFFFFFFFF))
        cpu.set_pc("wait")
        say("RUN wfi with INTERRUPT_SET, sie.SEIE", g.run())


def lost_memory(port: Port, say) -> None:
    with Guest(port) as g:
        g.cpu.set_pc("loop")
        g.cpu.set(CSR_ID["stvec"], 0x1000)
        g.vm.region(0, 0, guest.BASE, 0, RAM)
        say("RUN run after memslot deletion", g.loop())
    with Guest(port) as g:
        g.cpu.set_pc("loop")
        g.vm.unmap(RAM, g.size)
        say("RUN run with hva unmapped", g.run())


def speed(port: Port, say) -> None:
    with Guest(port) as g:
        started, rounds = time.monotonic(), 200
        for _ in range(rounds):
            g.cpu.set_pc("mmio_lw")
            g.cpu.set_x("t0", DEVICE)
            g.run()
            g.finish()
        each = (time.monotonic() - started) / rounds
        say(f"mmio exit+set pc: {each * 1e6:.0f} us each (TCG)")


def seed(port: Port, say) -> None:
    with Guest(port) as g:
        g.cpu.set_pc("seed_write")
        say("RUN csrrw seed (Zkr)", g.run())
        run_page.U64.pack_into(g.page, run_page.CSR_RET_VALUE, 0xABCD)
        g.immediate_exit = True
        line = g.run()
        say("RUN complete csr", f"{line} |a0={g.cpu.x('a0'):x}")


def hart_states(port: Port, say) -> None:
    with Guest(port, cpus=2) as g:
        first, second = g.cpus
        say(f"vcpu1 mp={second.mp_state()}")
        first.set_pc("hart_start")
        line = g.run()
        before = (second.pc() - guest.BASE) & (1 << 64) - 1
        say(
            "RUN vcpu0 HSM hart_start(1)",
            f"{line} |vcpu1 mp={second.mp_state()} pc before run=+{before:x}",
        )
        g.cpu = second
        say("RUN vcpu1 first store a0", g.run())
        say("RUN vcpu1 a1", g.run())
        say("RUN vcpu1 satp", g.run())
        line = g.loop()
        say(
            "RUN vcpu1 HSM stop -> sleeps",
            f"{line} |vcpu1 mp={second.mp_state()} pc=+{second.pc() - guest.BASE:x}",
        )


def user_mode(port: Port, say) -> None:
    with Guest(port) as g:
        cpu = g.cpu
        answers = {cpu.set(port.core(name), 0) for name in CORE_NAMES}
        say("reset_state set core all + mode U", f"{answers.pop()} |mode={cpu.get(port.core('mode'))}")
        assert not answers
        cpu.set(CSR_ID["stvec"], guest.at("loop"))
        cpu.set_pc("do_ecall")
        line = g.loop()
        say(
            "RUN ecall from U mode",
            f"{line} |scause={cpu.get(CSR_ID['scause']):x} mode={cpu.get(port.core('mode'))}",
        )


def handles(port: Port, say) -> None:
    vm = port.create_vm()
    vm.result_handle("CREATE_VCPU", 0)
    vcpu = vm.vcpus[0]
    twin = vcpu.duplicate()
    vcpu.close_handle()
    say("ioctl on dup after close", twin.mp_state_result())
    twin.unmap_page()
    say("ioctl after munmap run", twin.mp_state_result())
    say("CREATE_VCPU 0 after close of vcpu fd", vm.result_handle("CREATE_VCPU", 0))
    twin.close_handle()
    say("CREATE_VCPU 0 after close of all vcpu fds", vm.result_handle("CREATE_VCPU", 0))
    vm.close()


def forged_page(port: Port, say) -> None:
    """The client writes exit reasons of its own into the shared page."""
    for reason in (35, 36, 6):
        for is_write in (0, 1):
            with Guest(port) as g:
                g.cpu.set_pc("start", offset=0)
                page = g.page
                run_page.U32.pack_into(page, run_page.EXIT_REASON, reason)
                run_page.U32.pack_into(page, run_page.MMIO_LEN, 4)
                page[run_page.MMIO_IS_WRITE] = is_write
                if reason == 35:
                    struct.pack_into("<qq", page, run_page.SBI_RET, 111, 222)
                elif reason == 36:
                    run_page.U64.pack_into(page, run_page.CSR_RET_VALUE, 0x14D)
                g.immediate_exit = True
                line = g.run()
                a0, a1 = (g.cpu.x(name) for name in ("a0", "a1"))
                shown = f"a0={a0:d} a1={a1:d}"
                say(f"RUN first RUN with forged exit_reason={reason} w={is_write}", f"{line} |{shown}")
    with Guest(port) as g:
        cpu = g.cpu

        def again(name: str) -> None:
            g.immediate_exit = False
            cpu.set_x("a0", 0)
            cpu.set_x("t0", DEVICE)
            cpu.set_pc("mmio_lw")
            g.blank_union()
            say(name, g.run())

        again("RUN mmio lw")
        run_page.U32.pack_into(g.page, run_page.EXIT_REASON, 0)
        say("RUN exit_reason cleared by user: re-executes", g.run())
        run_page.U32.pack_into(g.page, run_page.EXIT_REASON, 35)
        g.immediate_exit = True
        line = g.run()
        say("RUN exit_reason changed to SBI", f"{line} |a0={cpu.x('a0'):x}")
        again("RUN mmio lw")
        g.answer(b"\x05")
        g.page[run_page.MMIO_IS_WRITE] = 1
        g.immediate_exit = True
        line = g.run()
        say("RUN user flips is_write to 1", f"{line} |a0={cpu.x('a0'):x}")
        again("RUN mmio lw")
        cpu.set_pc("loop")
        g.immediate_exit = True
        say("RUN SET pc while MMIO pending then complete (pc+4)", g.run())


def limits(port: Port, say) -> None:
    vm = port.create_vm()
    vm.result_handle("CREATE_VCPU", 0)
    vm.result_handle("CREATE_VCPU", 7)
    say(f"second vcpu (id 7) mp={vm.vcpus[1].mp_state()}")
    vm.close()
    vm = port.create_vm()
    vm.result_handle("CREATE_VCPU", 5)
    say(f"first-created vcpu has id 5: mp={vm.vcpus[0].mp_state()} (idx 0 is boot)")
    vm.close()
    vm = port.create_vm()
    vm.map(RAM, 0x10000)
    made, answer = 0, "0"
    while made < 40 and answer == "0":
        answer = vm.region(made, 0, 0x80000000 + made * 0x100000, 0x10000, RAM)
        made += answer == "0"
    say(f"40 slots aliasing the same hva: rc={answer} n={made}")
    zone = structs.COALESCED_MMIO_ZONE.build(addr=DEVICE, size=8)
    count, answer = 0, "0"
    while (answer := vm.result("REGISTER_COALESCED_MMIO", zone)) == "0":
        count += 1
    say(f"coalesced zones until error: {count} {answer}")
    event = vm.eventfd()
    count = 0
    while (answer := vm.ioeventfd(event, DEVICE + 0x1000 + 8 * count, 4)) == "0":
        count += 1
    say(f"ioeventfds after that: {count} {answer}")
    vm.close()
    made, answer = port.create_vms_until_failure()
    say(f"CREATE_VM until failure: {made} {answer}")
