"""`softkvm top` and what it is made of: counters of a VM that computes, and of one that sleeps."""

from __future__ import annotations

import json

import pytest

from tests.framework.product import Product, read_until

pytestmark = [pytest.mark.net, pytest.mark.timeout(240), pytest.mark.usefixtures("busybox")]


def test_top(product: Product) -> None:
    vms = {
        name: product.start("run", "--name", name, "busybox", "--", "sh", "-c", f"echo up; {what}")
        for name, what in (("works", "while :; do :; done"), ("sleeps", "read line"))
    }
    for client in vms.values():
        read_until(client, b"up\n", 120)
    reports = []
    for _ in range(20):
        done = product.run("top", "--once", "--json", "--interval", "0.5")
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        reports.append({vm["name"]: vm for vm in report["vms"]})
        if len(reports) > 1 and reports[-1]["works"]["regions"]:
            break
    first, last = (report["works"] for report in (reports[0], reports[-1]))
    assert last["regions"] >= last["regions_ready_made"] >= 0
    assert last["regions"] > 0
    assert last["guest_instructions"] > first["guest_instructions"]
    assert last["mips"] > 0
    assert reports[-1]["sleeps"]["guest_instructions"] > 0
    assert last["cpu_percent"] > 1
    assert last["memory"] > 20 << 20
    assert 0 < last["decoded_bytes"] <= 38 << 20
    assert last["code_bytes"] > last["decoded_bytes"], "regions are there, so some of them are mapped"
    assert last["code_bytes"] <= 64 << 20
    assert report["translator"]["arena_bytes"] <= 48 << 20
    done = product.run("top", "--once", "--interval", "0.1")
    lines = done.stdout.decode().splitlines()
    assert "translator:" in lines[0]
    assert [line.split()[0] for line in lines[1:]] == ["NAME", "works", "sleeps"]
    for client in vms.values():
        client.kill()
        client.wait(60)


def test_intervals_that_cannot_be(product: Product) -> None:
    assert product.run("top", "--once", "--interval", "0").returncode == 2
