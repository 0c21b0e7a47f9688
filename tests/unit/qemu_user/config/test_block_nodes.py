"""-blockdev: QEMU's ways to write a node, what becomes of it, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qemu_user.config.block_nodes import BlockNodes
from qemu_user.config.errors import ConfigError
from qemu_user.config.keyvals import KeyValues
from qemu_user.config.machine_config import Drive
from qemu_user.config.qemu_options import parse


def drive(*options: str, name: str = "d") -> Drive:
    nodes = BlockNodes()
    for option in options:
        nodes.add(option)
    made = nodes.drive(name)
    assert nodes.unused() == []
    return made


SAME = [
    ["driver=qcow2,node-name=d,file.driver=file,file.filename=/a,,b"],
    ["qcow2,node-name=d,file.driver=file,file.filename=/a,,b,file.aio=threads,lazy-refcounts=on"],
    ["driver=file,filename=/a,,b,node-name=f", "driver=qcow2,file=f,node-name=d"],
    ['{"driver":"qcow2","node-name":"d","file":{"driver":"file","filename":"/a,b","locking":"auto"}}'],
    ['{"driver":"file","node-name":"f","filename":"/a,b"}', "driver=qcow2,node-name=d,file=f"],
    ["driver=qcow2,node-name=d,file.driver=raw,file.file.driver=file,file.file.filename=/a,,b"],
]


@pytest.mark.parametrize("options", SAME)
def test_all_ways_to_say_the_same(options: list[str]) -> None:
    if "file.driver=raw" in options[0]:
        with pytest.raises(ConfigError, match="directly over the file"):
            drive(*options)
        return
    assert drive(*options) == Drive(id="d", file="/a,b", format="qcow2")


def test_settings() -> None:
    text = "driver=raw,node-name=d,read-only=on,discard=unmap,detect-zeroes=unmap,cache.direct=on,file.driver=host_device"
    made = drive(text + ",file.filename=/dev/x")
    assert (made.file, made.format, made.readonly, made.discard) == ("/dev/x", "raw", True, True)
    assert (made.detect_zeroes, made.cache) == ("unmap", "none")
    assert drive("driver=file,node-name=d,filename=x").format == "raw"
    assert drive('{"driver":"file","node-name":"d","filename":"x","cache":{"no-flush":true}}').cache == "unsafe"
    assert drive('{"driver":"raw","node-name":"d","file":{"driver":"file","filename":"x","read-only":true}}').readonly


def test_nbd() -> None:
    server = "file.server.type=inet,file.server.host=h,file.server.port=10810"
    inet = drive(f"driver=raw,node-name=d,file.driver=nbd,{server},file.export=a b")
    assert (inet.file, inet.format) == ("nbd://h:10810/a%20b", "raw")
    assert drive("nbd,node-name=d,server.type=inet,server.host=::1,server.port=1").file == "nbd://[::1]:1/"
    unix = drive("driver=nbd,node-name=d,server.type=unix,server.path=/run/a?b,reconnect-delay=3")
    assert (unix.file, unix.reconnect) == ("nbd+unix:///?socket=/run/a%3Fb", 3)


def objects(*texts: str) -> BlockNodes:
    nodes = BlockNodes()
    for text in texts:
        values = KeyValues("-object", text, "qom-type")
        nodes.add_object(values.take("qom-type"), values)
    return nodes


@pytest.mark.parametrize("limits", ["x-iops-total=500,x-bps-read=1M", "limits.iops-total=500,limits.bps-read=1M"])
def test_throttle(limits: str) -> None:
    nodes = objects(f"throttle-group,id=slow,{limits}", "throttle-group,id=other")
    nodes.add("driver=qcow2,node-name=q,file.driver=file,file.filename=x,read-only=on")
    nodes.add("driver=throttle,node-name=d,throttle-group=slow,file=q")
    made = nodes.drive("d")
    assert (made.limits, made.format, made.readonly) == ({"iops-total": 500, "bps-read": 1 << 20}, "qcow2", True)
    nodes.add("driver=throttle,node-name=e,throttle-group=slow,file.driver=file,file.filename=y")
    with pytest.raises(ConfigError, match="no free -object throttle-group"):
        nodes.drive("e")
    nodes.add("driver=raw,node-name=f,file.driver=throttle,file.throttle-group=other,file.file.driver=file,file.file.filename=z")
    assert nodes.drive("f").limits == {}


def test_tls() -> None:
    nodes = objects("tls-creds-x509,id=t,dir=/pki/a b,endpoint=client,verify-peer=on,priority=NORMAL")
    server = "server.type=inet,server.host=h,server.port=1"
    nodes.add(f"driver=nbd,node-name=d,{server},export=e,tls-creds=t,tls-hostname=other")
    assert nodes.drive("d").file == "nbds://h:1/e?tls-certificates=/pki/a%20b&tls-hostname=other"
    nodes.add("driver=nbd,node-name=u,server.type=unix,server.path=/s,tls-creds=t,tls-hostname=other")
    assert nodes.drive("u").file == "nbds+unix:///?socket=/s&tls-certificates=/pki/a%20b&tls-hostname=other"
    nodes = objects("tls-creds-x509,id=system")
    nodes.add(f"driver=nbd,node-name=d,{server},tls-creds=system")
    assert nodes.drive("d").file == "nbds://h:1/"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("throttle-group,x-iops-total=1", "needs an id="), ("throttle-group,id=a,x-iops=1", "x-iops: no such setting"),
        ("tls-creds-x509,id=a,endpoint=server", "endpoint=server"), ("tls-creds-x509,id=a,verify-peer=off", "verify-peer=off"),
        ("throttle-group,id=a,x-iops-total=many", "expected a size"),
    ],
)  # fmt: skip
def test_objects_that_are_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        objects(text)


REFUSED = [
    ("driver=throttle,node-name=d,throttle-group=g,file.driver=file,file.filename=x", "throttle-group=g: no free"),
    ("driver=throttle,node-name=d,throttle-group=g", "throttle needs file="),
    ("driver=qcow2,node-name=d,file.driver=throttle,file.file.driver=file,file.file.filename=x", "above the format"),
    ("driver=nbd,node-name=d,server.type=unix,server.path=/x,tls-creds=t", "tls-creds=t: no -object"),
    ("driver=qcow2,file.driver=file,file.filename=x", "node-name"),
    ("driver=vmdk,node-name=d", "driver=vmdk"),
    ("node-name=d", "driver=None"),
    ("driver=qcow2,node-name=d", "needs file="),
    ("driver=qcow2,node-name=d,file=other", "no free -blockdev"),
    ("driver=file,node-name=d", "needs filename"),
    ("driver=file,node-name=d,filename=x,backing=y", "backing: no such setting"),
    ("driver=raw,node-name=d,offset=512,file.driver=file,file.filename=x", "offset: no such setting"),
    ("driver=file,node-name=d,filename=x,filename=y", "said twice"),
    ("driver=file,node-name=d,filename=x,read-only=perhaps", "on or off"),
    ("driver=file,node-name=d,filename=x,cache=none", "cache.direct"),
    ("driver=file,node-name=d,filename=x,discard=perhaps", "one of ignore"),
    ("driver=nbd,node-name=d,server.type=inet,server.host=h", "server.port"),
    ("driver=nbd,node-name=d,server=h", "server.type"),
    ("driver=nbd,node-name=d,server.type=unix,server.path=/x,reconnect-delay=soon", "expected a number"),
    ("driver=raw,node-name=d" + "".join(f",{'file.' * deep}driver=raw" for deep in range(1, 5)), "more nodes"),
    ("driver=raw,node-name=d,file=f,file.driver=file", "value of its own"),
    ('{"driver":', "not JSON"),
    ('{"driver":"raw","node-name":"d","file":[1]}', "no free -blockdev"),
    ('{"driver":"file","node-name":7,"filename":"x"}', "node-name"),
    ('{"driver":"file","node-name":"d","filename":7}', "needs filename"),
]


@pytest.mark.parametrize(("text", "says"), REFUSED)
def test_what_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        drive(text)


def test_names_are_given_and_used_once() -> None:
    nodes = BlockNodes()
    nodes.add("driver=file,filename=x,node-name=f")
    with pytest.raises(ConfigError, match="a node f already"):
        nodes.add("driver=file,filename=y,node-name=f")
    nodes.add("driver=raw,file=f,node-name=a")
    nodes.add("driver=raw,file=f,node-name=b")
    nodes.drive("a")
    with pytest.raises(ConfigError, match="no free -blockdev"):
        nodes.drive("b")


def test_devices_use_nodes(tmp_path: Path) -> None:
    kernel = tmp_path / "Image"
    kernel.write_bytes(b"x")
    node, device = ["-blockdev", "driver=file,filename=x,node-name=n"], ["-device", "virtio-blk-pci,drive=n,serial=S,id=dev"]
    config, _ = parse(["-kernel", str(kernel), *node, *device])
    (disk,) = config.drives
    assert (disk.id, disk.file, disk.serial, disk.device) == ("n", "x", "S", "dev")
    group = ["-object", "throttle-group,id=g,x-iops-total=7"]
    above = ["-blockdev", "driver=throttle,node-name=t,throttle-group=g,file=n", "-device", "virtio-blk-pci,drive=t"]
    config, _ = parse(["-kernel", str(kernel), *group, *node, *above])
    assert config.drives[0].limits == {"iops-total": 7}
    with pytest.raises(ConfigError, match="no -device virtio-blk-pci,drive=n uses it"):
        parse(["-kernel", str(kernel), *node])
    with pytest.raises(ConfigError, match="no -blockdev node-name=n before it"):
        parse(["-kernel", str(kernel), *device])
    with pytest.raises(ConfigError, match="drive=n"):
        parse(["-kernel", str(kernel), *node, *device, *device])


@given(st.text(st.sampled_from("dnfaie=,.{}[]\":rvx-1") | st.characters(codec="utf-8"), max_size=60))
def test_nonsense_is_an_error_for_the_user(text: str) -> None:
    nodes = BlockNodes()
    try:
        nodes.add(text)
        for name in nodes.unused():
            nodes.drive(name)
    except ConfigError:
        pass
