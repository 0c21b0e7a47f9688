"""Consoles of VMs in the background: several at once, read-only, the log, and what is left of it when the VM has ended."""

from __future__ import annotations

import pytest

from tests.framework.product import Product, read_until

pytestmark = [pytest.mark.net, pytest.mark.timeout(240), pytest.mark.usefixtures("busybox")]


def test_several_consoles_and_the_log(product: Product) -> None:
    assert product.run("run", "-d", "--name", "sh").returncode == 0
    first, second = product.start("console", "sh"), product.start("console", "sh")
    looking = product.start("console", "--read-only", "sh")
    following = product.start("console", "--log", "--follow", "sh")
    assert first.stdin is not None
    assert second.stdin is not None
    assert looking.stdin is not None
    looking.stdin.write(b"echo $((6*111))\n")
    looking.stdin.flush()
    for typist, sum_, shown in ((first, b"40+2", b"42\r\n"), (second, b"500+55", b"555\r\n")):
        typist.stdin.write(b"echo $((%s))\n" % sum_)  # type: ignore[union-attr]
        typist.stdin.flush()  # type: ignore[union-attr]
        for reader in (first, second, looking, following):
            assert b"666" not in read_until(reader, shown, 120)
    second.stdin.write(b"seq 1 300; echo done$((1+1))\n")
    second.stdin.flush()
    for reader in (first, second, looking):
        assert b"299\r\n300\r\n" in read_until(reader, b"done2\r\n", 120)
    tail = product.run("console", "--log", "--tail", "2", "sh").stdout
    assert tail.count(b"\n") <= 2
    assert product.run("kill", "sh").returncode == 0
    for reader in (first, second, looking, following):
        reader.communicate(timeout=60)
        assert reader.returncode == 0
    kept = product.run("console", "--log", "sh")
    assert (kept.returncode, b"done2\r\n" in kept.stdout) == (0, True)
    assert len(kept.stdout) <= 1 << 20
    gone = product.run("console", "sh")
    assert (gone.returncode, b"console --log sh" in gone.stderr) == (1, True)
    for wrong in (["--log", "nobody"], ["--log", "../x"], ["--follow", "sh"]):
        assert product.run("console", *wrong).returncode == 1
    assert product.run("run", "--name", "sh", "--", "true").returncode == 0
    assert b"done2" not in product.run("console", "--log", "sh").stdout, "a new VM of that name begins a new log"
