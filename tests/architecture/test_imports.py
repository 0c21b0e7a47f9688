"""The house rules on who may import whom, read from the source without running it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("protocol", "kvmcore", "qemu_user")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
FORBIDDEN = {"protocol": {"kvmcore", "qemu_user"}, "kvmcore": {"qemu_user"}, "qemu_user": {"kvmcore"}}
#: The translator side: the only files that may load LLVM.
LLVM_SIDE = {"kvmcore/engine/region_compiler.py", "kvmcore/engine/build.py", "qemu_user/images/compile.py"}
LONGEST = 800


@cache
def nodes(path: Path) -> list[ast.AST]:
    """Those that the rules are about: imports and calls, wherever in the file."""
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom | ast.Call)]


def imports(path: Path) -> Iterator[str]:
    """Full names of the modules that a file imports."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


def _id(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=_id)
def test_halves_do_not_meet(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    for name in imports(path):
        assert name.partition(".")[0] not in FORBIDDEN[package], f"{_id(path)} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=_id)
def test_llvm_stays_on_its_side(path: Path) -> None:
    if _id(path) not in LLVM_SIDE:
        assert not any(name.partition(".")[0] == "llvmlite" for name in imports(path)), f"{_id(path)} imports llvmlite"


@pytest.mark.parametrize("path", FILES, ids=_id)
def test_no_star_imports_and_no_endless_files(path: Path) -> None:
    stars = [node for node in nodes(path) if isinstance(node, ast.ImportFrom) and node.names[0].name == "*"]
    assert not stars, f"{_id(path)}: import *"
    assert path.read_text().count("\n") <= LONGEST, f"{_id(path)} is longer than {LONGEST} lines"


def test_tables_know_nothing_of_io() -> None:
    """protocol/abi and protocol/codec are pure."""
    for folder in ("abi", "codec"):
        for path in (ROOT / "protocol" / folder).glob("*.py"):
            heads = {name.partition(".")[0] for name in imports(path)}
            if path.name == "errors.py":
                heads.discard("os")  # strerror
            assert not heads & {"socket", "zmq", "os", "time", "threading", "asyncio"}, f"{_id(path)}: {heads}"


def test_a_vm_process_loads_no_llvm() -> None:
    program = "import kvmcore.server.vm_process, kvmcore.engine.machine, sys; sys.exit('llvmlite' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


def test_nobody_waits_for_a_forgotten_thread() -> None:
    """Python waits for threads that are not daemons, and for a pool's: a failed test would keep pytest from ending."""
    for path in (*FILES, *sorted((ROOT / "tests").rglob("*.py"))):
        for node in nodes(path):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("threading.Thread", "Thread"):
                daemon = [ast.unparse(word.value) for word in node.keywords if word.arg == "daemon"]
                assert daemon == ["True"], f"{_id(path)}:{node.lineno}: a thread without daemon=True"
            pool = isinstance(node, ast.ImportFrom) and node.module == "concurrent.futures" and path not in FILES
            assert not pool, f"{_id(path)}: a pool of threads"
