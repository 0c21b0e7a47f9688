"""What `softkvm bench migration` counts of clones' memory."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from qemu_user.bench import hosts

_CODE = "import sys; block = b'x' * (int(sys.argv[1]) << 20); print(flush=True); input()"


def test_only_the_clones_are_counted(tmp_path: Path) -> None:
    with ExitStack() as stack:

        def process(mib: int) -> int:
            made = subprocess.Popen([sys.executable, "-c", _CODE, str(mib)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            stack.enter_context(made)
            stack.callback(made.kill)
            assert made.stdout is not None
            made.stdout.readline()
            return made.pid

        for name, sizes in {"copy-1": (20, 10), "copy-2": (20, 10), "bench": (300, 300)}.items():
            (tmp_path / name).mkdir()
            pids = [process(mib) for mib in sizes]
            (tmp_path / name / "meta.json").write_text(json.dumps({"pid": pids[0], "vm_pid": pids[1]}))
        unique, guest = hosts.memory_of(tmp_path, "copy*")
    assert 60 << 20 < unique < 200 << 20
    assert guest == 0
