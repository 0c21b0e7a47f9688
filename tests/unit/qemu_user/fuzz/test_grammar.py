"""Sequences: the table is their only source, seeds decide everything, files keep them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from protocol.abi.ioctls import IOCTLS
from protocol.codec import coverage_marks
from qemu_user.fuzz import guest_code, rules, setups
from qemu_user.fuzz.branches import NOT_WATCHED, branches, taken
from qemu_user.fuzz.grammar import GENERIC, Grammar
from qemu_user.fuzz.minimize import minimize, same_fault
from qemu_user.fuzz.oracles import Bystander
from qemu_user.fuzz.sequence import Finding, Op, load, save
from tests.framework.asm import assemble


def test_a_seed_decides_everything() -> None:
    first, again, other = Grammar(7), Grammar(7), Grammar(8)
    assert [first.sequence(i) for i in range(20)] == [again.sequence(i) for i in range(20)]
    assert first.sequence(3) != other.sequence(3)


def test_every_ioctl_and_every_member_is_tried() -> None:
    seen: dict[str, set[str]] = {}
    for index in range(1500):
        for op in Grammar(1).sequence(index):
            seen.setdefault(op.name, set()).update(op.members or {})
    for row in IOCTLS:
        if row.name == "CREATE_VM":  # what every sequence starts with
            continue
        assert row.name in seen
        members = {field.name for field in row.argument.fields} if row.argument else set()
        assert {name for name in members if not name.startswith("pad") and name != "reserved"} <= seen[row.name], row.name


def test_rules_name_members_that_exist() -> None:
    from protocol.abi.structs import LAYOUTS

    known = {(layout.name, field.name) for layout in LAYOUTS for field in layout.fields}
    assert set(rules.RULES) <= known


def test_files_say_what_was_done(tmp_path: Path) -> None:
    ops = Grammar(3).sequence(0)
    save(tmp_path / "f.jsonl", ops, Finding("errno", "x", 4), seed=3)
    head, again = load(tmp_path / "f.jsonl")
    assert again == ops
    assert (head["oracle"], head["step"], head["seed"]) == ("errno", 4, 3)


@pytest.mark.parametrize(
    "text", ["", "{}\n", "not json\n", '{"softkvm-fuzz": 99}\n', '{"softkvm-fuzz": 1}\n{"do": 3}\n', "[]\n"]
)
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"not a"):
        load(path)


def test_one_fault_in_the_answer_and_in_the_log() -> None:
    answer, log = Finding("internal error", "RUN: EIO"), Finding("log", "Traceback\nZeroDivisionError: division by zero")
    assert same_fault(answer, log)
    assert same_fault(log, Finding("log", "elsewhere\nZeroDivisionError: division by zero\n"))
    assert not same_fault(log, Finding("log", "Traceback\nKeyError: 3"))
    assert not same_fault(answer, Finding("model", "RUN: EIO"))
    assert same_fault(Finding("model", "a"), Finding("model", "b"))


def test_minimize_leaves_what_it_takes() -> None:
    ops = [Op("ioctl", ("vm", 0), name, members={"slot": 7, "flags": 3}) for name in "ABCDEFGH"]

    def shows(candidate: list[Op]) -> bool:
        names = [op.name for op in candidate if (op.members or {}).get("flags") == 3]
        return "C" in names and "F" in names and names.index("C") < names.index("F")

    smallest = minimize(ops, shows)
    assert [(op.name, op.members) for op in smallest] == [("C", {"flags": 3}), ("F", {"flags": 3})]
    with pytest.raises(ValueError, match="does not show"):
        minimize(ops[:2], shows)


def test_code_for_guests_is_what_its_comments_say() -> None:
    generator = assemble(
        "again: slli a2, a0, 13\n xor a0, a0, a2\n srli a2, a0, 7\n xor a0, a0, a2\n slli a2, a0, 17\n xor a0, a0, a2\n"
        " addi a1, a1, -1\n bnez a1, again\n mv a1, a3\n sd a0, 0(a4)\n j again\n"
    )
    assert generator.image == b"".join(word.to_bytes(4, "little") for word in Bystander._CODE)
    interpreter = assemble(
        "loop: ld x6, 0(x5)\n ld x7, 8(x5)\n ld x28, 16(x5)\n addi x5, x5, 24\n beqz x28, store\n addi x28, x28, -1\n"
        " beqz x28, load\n j out\nstore: sd x7, 0(x6)\n j loop\n nop\nload: ld x7, 0(x6)\n j loop\nout: nop\n"
    )
    assert interpreter.image[:-4] == b"".join(word.to_bytes(4, "little") for word in guest_code._INTERPRETER)


def test_branches_and_their_marks(tmp_path: Path) -> None:
    source = "def f(a):\n    if a:\n        return 1\n    for i in a or ():\n        a = i\n    return 2\n"
    for folder in coverage_marks.FOLDERS:
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "kvmcore/vm/x.py").write_text(source)
    every = branches(tmp_path)
    ways = {(branch.line, branch.to) for branch in every}
    assert {(2, 3), (2, 4), (4, 5), (4, 6)} <= ways
    marks = bytearray(coverage_marks.SIZE)
    marks[coverage_marks.place(coverage_marks.seed("/kvmcore/vm/x.py"), 2, 3, len(marks))] = 1
    assert [(branch.line, branch.to) for branch in taken(every, bytes(marks))] == [(2, 3)]


@pytest.mark.parametrize("setup", [*setups.SETUPS, setups.aia, setups.ring], ids=lambda setup: setup.__name__)
def test_setups_are_operations_that_files_keep(setup: Callable[[Random], list[Op]], tmp_path: Path) -> None:
    for seed in range(20):
        ops = setup(Random(seed))
        assert ops == setup(Random(seed))
        save(tmp_path / "f.jsonl", ops)
        assert load(tmp_path / "f.jsonl")[1] == ops


def test_what_all_kvms_have_is_compared() -> None:
    """The ioctls of Linux's generic code (KVM_ABI 1.2), each in short sequences that share a VM."""
    generic = {
        "GET_API_VERSION", "CHECK_EXTENSION", "GET_VCPU_MMAP_SIZE", "CREATE_VCPU", "SET_USER_MEMORY_REGION",
        "SET_USER_MEMORY_REGION2", "GET_DIRTY_LOG", "CLEAR_DIRTY_LOG", "RESET_DIRTY_RINGS", "ENABLE_CAP", "IOEVENTFD", "IRQFD",
        "REGISTER_COALESCED_MMIO", "UNREGISTER_COALESCED_MMIO", "CREATE_DEVICE", "GET_STATS_FD", "SET_SIGNAL_MASK", "RUN",
    }  # fmt: skip
    assert generic <= GENERIC
    grammar = Grammar(1, guest=False, generic=True)
    ops = [op for index in range(200) for op in grammar.together(index, 4)]
    assert {op.name for op in ops if op.name} == GENERIC
    assert all(op.extra["immediate"] for op in ops if op.do == "run"), "no guest runs on a real KVM"


def test_what_does_not_count_says_why_and_is_there() -> None:
    root = Path(__file__).parents[4]
    for name, reason in NOT_WATCHED.items():
        file, _, function = name.partition(":")
        assert reason
        source = (root / file[1:]).read_text()
        assert f"def {function.rpartition('.')[2]}(" in source or not function, name
    assert not any(branch.file in NOT_WATCHED for branch in branches(root))
