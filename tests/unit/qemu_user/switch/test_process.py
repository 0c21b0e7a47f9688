"""A real `softkvm switch` process: sockets of both kinds, who may be what, captures, rates, stopped clients, links."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.channel import keys
from tests.framework.product import Product
from tests.framework.switch import Client, RunningSwitch

BROADCAST = b"\xff" * 6


def mac(number: int) -> bytes:
    return b"\x52\x54\0\0\0" + bytes((number,))


def frame(to: bytes, source: bytes, size: int = 60, tag: bytes = b"") -> bytes:
    return (to + source + tag + b"\x88\xb5").ljust(size, b"x")


@pytest.fixture
def product() -> Iterator[Product]:
    with Product() as made:
        yield made


def test_frames_between_both_kinds_of_ports(product: Product) -> None:
    with RunningSwitch(product, "--default", "vlan=5") as switch:
        with Client(switch) as qemu, Client(switch, "web/n0") as vm, Client(switch, "db/n0", "vlan=6") as other:
            assert [vm.welcome.port, other.welcome.port] == ["web/n0", "db/n0"]
            vm.send(frame(BROADCAST, mac(1)))
            assert qemu.receive() == frame(BROADCAST, mac(1))
            many = [frame(mac(1), mac(2), 60 + size) for size in range(0, 9000, 100)]
            qemu.send(*many)
            assert list(vm.frames(len(many))) == many
            assert other.hears_nothing()
            shown = switch.show()
            assert [port["name"] for port in shown["ports"]] == ["qemu", "web/n0", "db/n0"]
            assert {row["mac"]: (row["vlan"], row["port"]) for row in shown["table"]} == {
                mac(1).hex(":"): (5, "web/n0"), mac(2).hex(":"): (5, "qemu"),
            }  # fmt: skip
            assert switch.port("web/n0")["tx_frames"] == len(many)
            assert json.loads(switch.verb("show", "lan", "--json").stdout)["table"]
            text = switch.verb("show").stdout.decode()
            assert "web/n0" in text
            assert "vlan=6" in text
            with Client(switch, "web/n0") as arriving:  # the same VM, as a migration has it
                assert arriving.welcome.port == "web/n0#2"
                arriving.send(frame(BROADCAST, mac(1)))
                assert qemu.receive() == frame(BROADCAST, mac(1))
                qemu.send(frame(mac(1), mac(2)))
                assert arriving.receive() == frame(mac(1), mac(2))
        assert switch.show()["ports"] == []
    assert switch.process.returncode == 0
    assert not switch.directory.exists()


def test_who_may_be_what(product: Product, tmp_path: Path) -> None:
    place = tmp_path / "q.sock"
    ports = ["--port", "web,vlan=7", "--port", f"q,listen={place},trunk=all,native=7"]
    with RunningSwitch(product, *ports) as switch:  # noqa: SIM117
        with Client(switch, "web/n0") as web, Client(switch, path=place) as q:
            assert switch.port("web/n0")["settings"] == "vlan=7"
            web.send(frame(BROADCAST, mac(1)))
            assert q.receive() == frame(BROADCAST, mac(1))
            with Client(switch, path=place) as second:  # one at a time
                assert second.socket.recv(1) == b""
            for name, settings, complaint in (
                ("web/n1", "vlan=8", "has settings of its own for port web"),
                ("q", "", "not for VMs"),
                ("x/n0", "vlan=9999", "no VLAN"),
                ("../x", "", "no name for a port"),
            ):
                with Client(switch, name, settings) as refused:
                    assert complaint in refused.welcome.error
            assert switch.verb("set", "lan", "web/n0", "vlan=8").stdout == b"vlan=8\n"
            q.send(frame(BROADCAST, mac(2)), frame(BROADCAST, mac(3), tag=b"\x81\0\0\x08"))
            assert web.receive() == frame(BROADCAST, mac(3))[:14] + b"x" * 42
            for wrong in (["set", "lan", "nope", "vlan=1"], ["set", "lan", "web/n0", "vlan=0"], ["unplug", "lan", "nope"]):
                done = switch.verb(*wrong)
                assert done.returncode == 1
                assert done.stderr.startswith(b"softkvm switch: ")
            assert switch.verb("unplug", "lan", "web/n0").returncode == 0
            assert web.socket.recv(1) == b""
    for wrong in ("run bad/name", "run --port a,tap=x,listen=y", "run --port a --port a", "show no"):
        assert product.run("switch", *wrong.split()).returncode == 1
    with RunningSwitch(product) as switch:
        again = product.run("switch", "run", "lan")
        assert (again.returncode, b"is running" in again.stderr) == (1, True)


def test_nonsense_on_every_socket(product: Product) -> None:
    with RunningSwitch(product) as switch:
        for name, data in (
            ("qemu.sock", b"\xff\xff\xff\xff" + bytes(100)),
            ("port.sock", b"GET / HTTP/1.0\r\n\r\n"),
            ("port.sock", b"SKSW\xff\xff\xff\xff"),
            ("port.sock", b"SKSW\0\0\0\x02[]"),
            ("port.sock", b'SKSW\0\0\0\x19{"name":"a","version":99}'),
        ):
            with socket.socket(socket.AF_UNIX) as hostile:
                hostile.settimeout(60)
                hostile.connect(str(switch.directory / name))
                hostile.sendall(data)
                assert hostile.recv(100) == b""
        with socket.socket(socket.AF_UNIX) as control:
            control.settimeout(60)
            control.connect(str(switch.directory / "control.sock"))
            lines = control.makefile("rwb")
            for line in (b"[]", b"{", b'{"execute": "nope"}', b'{"execute": "show", "arguments": 7}', b'{"execute": ["show"]}'):
                lines.write(line + b"\n")
                lines.flush()
                assert b"no such request" in lines.readline()
            with pytest.raises(ConnectionError):
                control.sendall(b"x" * 10_000_000)
        with Client(switch) as a, Client(switch) as b:
            a.send(b"short", frame(BROADCAST, mac(1)))
            assert b.receive() == frame(BROADCAST, mac(1))
            assert switch.port("qemu")["rx_broken"] == 1


def test_a_stopped_client_holds_nobody_up(product: Product) -> None:
    with RunningSwitch(product) as switch:  # noqa: SIM117
        with Client(switch, "a") as a, Client(switch, "stopped") as stopped, Client(switch, "b") as b:
            count = 3000
            big = frame(BROADCAST, mac(1), 9000)
            for _ in range(count // 100):
                a.send(*[big] * 100)
                assert list(b.frames(100)) == [big] * 100
            row = switch.port("stopped")
            assert row["tx_dropped"] > count // 2
            assert row["tx_frames"] + row["tx_dropped"] == count
            assert row["queued_bytes"] < 3 << 20
            assert switch.port("b")["tx_dropped"] == 0
            assert list(stopped.frames(row["tx_frames"])) == [big] * row["tx_frames"]
            a.send(frame(BROADCAST, mac(1)))
            assert stopped.receive() == frame(BROADCAST, mac(1))


@pytest.mark.parametrize("way", ["in", "out"])
def test_rates(product: Product, way: str) -> None:
    """1 MB at 1 MB/s takes a second at least, whichever side is limited; nothing is lost while the queue holds it."""
    limited = f"rate-{way}=1mbps,burst=64k"
    with RunningSwitch(product) as switch:
        a_settings, b_settings = (limited, "") if way == "in" else ("", limited)
        with Client(switch, "a", a_settings) as a, Client(switch, "b", b_settings) as b:
            start = time.monotonic()
            frames = [frame(BROADCAST, mac(1), 1500)] * 600
            a.send(*frames)
            assert list(b.frames(600)) == frames
            assert time.monotonic() - start > 0.7


def test_captures_are_read_by_tshark(product: Product, tmp_path: Path) -> None:
    everything, one = tmp_path / "all.pcapng", tmp_path / "one.pcapng"
    with RunningSwitch(product, "--capture", str(everything)) as switch:
        with Client(switch, "a/n0") as a, Client(switch, "b/n0", "trunk=all,native=none") as b:
            recording = product.start("switch", "capture", "lan", str(one), "--port", "b/n0")
            assert recording.stderr is not None
            assert b"records" in recording.stderr.readline()
            a.send(*(frame(BROADCAST, mac(1), 60 + size) for size in range(5)))
            assert len(list(b.frames(5))) == 5
            b.send(frame(mac(1), mac(2), tag=b"\x81\0\0\x01"))
            assert a.receive()
            other = tmp_path / "killed.pcapng"
            killed = product.start("switch", "capture", "lan", str(other))
            assert killed.stderr is not None
            killed.stderr.readline()
            killed.kill()
            killed.communicate()
            stopped = switch.verb("capture", "lan", str(other), "--stop")
            assert (stopped.returncode, b"0 frames" in stopped.stderr) == (0, True)
            recording.send_signal(signal.SIGINT)
            assert b"6 frames" in recording.communicate(timeout=60)[1]
        assert b"no capture" not in switch.verb("show").stdout
        for wrong in ("/nonexistent/x", str(everything)):
            assert switch.verb("capture", "lan", wrong).returncode == 1
    if shutil.which("tshark") is None:
        pytest.skip("needs tshark (apt install tshark)")
    assert tshark(everything, "frame.interface_name", "eth.src", "frame.len") == [
        *(["a/n0", mac(1).hex(":"), str(60 + size)] for size in range(5)), ["b/n0", mac(2).hex(":"), "60"],
    ]  # fmt: skip
    assert tshark(one, "frame.packet_flags_direction", "vlan.id", "frame.len") == [
        *(["0x00000002", "1", str(64 + size)] for size in range(5)), ["0x00000001", "1", "60"],
    ]  # fmt: skip


def tshark(file: Path, *fields: str) -> list[list[str]]:
    """The fields of each frame; tshark must have nothing to complain of."""
    command = ["tshark", "-n", "-r", str(file), "-T", "fields", *(word for field in fields for word in ("-e", field))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "cut short" not in done.stderr
    return [line.split("\t") for line in done.stdout.splitlines()]


def key_pair(folder: Path, peer: Path | None = None) -> Path:
    """A host's key in `folder`, trusted by the host `peer`."""
    folder.mkdir(parents=True, exist_ok=True)
    before = os.environ.get("XDG_CONFIG_HOME")
    os.environ["XDG_CONFIG_HOME"] = str(folder)
    try:
        keys.own()
    finally:
        os.environ.pop("XDG_CONFIG_HOME") if before is None else os.environ.__setitem__("XDG_CONFIG_HOME", before)
    return folder / "softkvm" / "keys" / "host.key"


@pytest.mark.parametrize("scheme", ["tcp", "ipc"])
def test_two_hosts(scheme: str, tmp_path: Path) -> None:
    with Product() as here, Product() as there:
        ours, theirs = (key_pair(tmp_path / name) for name in ("here", "there"))
        for product, name in ((here, "here"), (there, "there")):
            product.environment["XDG_CONFIG_HOME"] = str(tmp_path / name)
        peers = tmp_path / "peers"
        peers.mkdir()
        shutil.copy(ours, peers / "west.key")
        listen = "tcp://127.0.0.1:*" if scheme == "tcp" else f"ipc://{there.runtime}/link"
        with RunningSwitch(there, "--listen", listen, "--peers", str(peers)) as east:
            uri = json.loads(there.run("switch", "show", "lan", "--json").stdout)["listen"]
            with RunningSwitch(here, "--link", f"{uri},peer-key={theirs}") as west:
                called = "link-west" if scheme == "tcp" else "link-switch"
                east.until(called, up=True)
                link = next(port["name"] for port in west.show()["ports"])
                west.until(link, up=True)
                with Client(west, "a/n0", "vlan=9") as a, Client(east, "b/n0", "vlan=9") as b, Client(east) as other:
                    a.send(frame(BROADCAST, mac(1)))
                    assert b.receive() == frame(BROADCAST, mac(1))
                    many = [frame(mac(1), mac(2), 1000 + size) for size in range(500)]
                    b.send(*many)
                    assert list(a.frames(500)) == many
                    assert other.hears_nothing()
                    with Client(east, "a/n0", "vlan=9") as moved:  # a was handed over to the other host
                        moved.send(frame(BROADCAST, mac(1)))
                        assert a.receive() == frame(BROADCAST, mac(1))
                        assert b.receive() == frame(BROADCAST, mac(1))
                        b.send(frame(mac(1), mac(2)))
                        assert moved.receive() == frame(mac(1), mac(2))
                        assert a.hears_nothing()
                east.process.kill()
                east.process.wait()
                west.until(link, up=False)
                fixed = ["--listen", uri, "--peers", str(peers)]
                with RunningSwitch(there, *fixed) as back:
                    west.until(link, up=True)
                    with Client(west) as a, Client(back) as b:
                        a.send(frame(BROADCAST, mac(1)))
                        assert b.receive() == frame(BROADCAST, mac(1))


def test_strangers_do_not_get_in(tmp_path: Path) -> None:
    with Product() as here, Product() as there:
        theirs, friend = key_pair(tmp_path / "there"), key_pair(tmp_path / "friend")
        key_pair(tmp_path / "here")
        for product, name in ((here, "here"), (there, "there")):
            product.environment["XDG_CONFIG_HOME"] = str(tmp_path / name)
        peers = tmp_path / "peers"
        peers.mkdir()
        done = there.run("switch", "run", "lan", "--listen", "tcp://127.0.0.1:*", "--peers", str(peers))
        assert (done.returncode, b"public keys" in done.stderr) == (1, True)
        shutil.copy(friend, peers / "friend.key")
        with RunningSwitch(there, "--listen", "tcp://127.0.0.1:*", "--peers", str(peers)) as east:
            uri = east.show()["listen"]
            with RunningSwitch(here, "--link", f"{uri},peer-key={theirs}") as west:
                time.sleep(3)
                assert not any(port["up"] for port in west.show()["ports"])
                assert east.show()["ports"] == []
        done = here.run("switch", "run", "lan", "--link", f"{uri},peer-key=/nonexistent")
        assert (done.returncode, b"/nonexistent" in done.stderr) == (1, True)


def test_a_switch_is_linked_once(product: Product) -> None:
    """Two links to one switch would be a loop; so would a link to itself."""
    east = product.runtime / "east"
    with RunningSwitch(product, "--listen", f"ipc://{east}", name="east") as first:
        links = ["--link", f"ipc://{east}", "--link", f"ipc://{east}"]
        with RunningSwitch(product, *links, name="west") as second:
            end = time.monotonic() + 60
            while sum(port["up"] for port in second.show()["ports"]) != 1:
                assert time.monotonic() < end
                time.sleep(0.1)
            time.sleep(2.5)
            assert sorted(port["up"] for port in second.show()["ports"]) == [False, True]
            assert sum(port["up"] for port in first.show()["ports"]) == 1
            with Client(first) as a, Client(second) as b:
                a.send(frame(BROADCAST, mac(1)))
                assert b.receive() == frame(BROADCAST, mac(1))
                assert b.hears_nothing()
                assert a.hears_nothing()
