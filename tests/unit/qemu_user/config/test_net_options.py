"""QEMU's network options: what they become, and what is said of those that cannot be."""

from __future__ import annotations

import pytest

from qemu_user.config.errors import ConfigError
from qemu_user.config.keyvals import KeyValues
from qemu_user.config.machine_config import Net
from qemu_user.config.net_options import parse_net, published
from qemu_user.config.qemu_options import Builder


def net(text: str) -> Net:
    return parse_net(KeyValues("-netdev", text, "type"), "n")


def test_user() -> None:
    assert net("user") == net("passt") == Net(id="n")
    assert net("user,hostfwd=tcp::2222-:22,hostfwd=udp::53-:53").forwards == ("tcp::2222-:22", "udp::53-:53")
    found = net("user,net=10.0.2.0/24,dns=10.0.2.3,dnssearch=a.b,dnssearch=c,restrict=on,ipv6=off")
    assert (found.network, found.gateway, found.address) == ("10.0.2.0/24", "10.0.2.2", "10.0.2.15")
    assert (found.dns, found.search, found.restrict, found.ipv4, found.ipv6) == ("10.0.2.3", ("a.b", "c"), True, True, False)
    found = net("user,net=192.168.7.0/28,host=192.168.7.1,dhcpstart=192.168.7.9")
    assert (found.network, found.gateway, found.address) == ("192.168.7.0/28", "192.168.7.1", "192.168.7.9")
    assert net("user,host=10.0.2.4").address == "10.0.2.15"


def test_cables() -> None:
    found = net("stream,addr.type=inet,addr.host=::1,addr.port=7,server=on,addr.ipv6=on")
    assert (found.kind, found.inet, found.path, found.server) == ("stream", "::1:7", "", True)
    assert net("socket,listen=:1234").inet == ":1234"
    assert net("socket,listen=:1234").server
    assert not net("socket,connect=host:1234").server
    found = net("socket,udp=a:1,localaddr=b:2")
    assert (found.kind, found.inet, found.remote) == ("dgram", "b:2", "a:1")
    found = net("socket,mcast=230.0.0.1:1234")
    assert (found.kind, found.inet, found.remote) == ("dgram", "multicast", "230.0.0.1:1234")
    found = net("dgram,local.type=unix,local.path=/a,remote.type=unix,remote.path=/b")
    assert (found.path, found.remote) == ("/a", "/b")
    found = net("dgram,local.type=inet,local.host=127.0.0.1,local.port=5,remote.type=inet,remote.host=h,remote.port=6")
    assert (found.inet, found.remote) == ("127.0.0.1:5", "h:6")


def test_tap_and_switch() -> None:
    found = net("tap,ifname=t0,script=no,downscript=no,vhost=on,vnet_hdr=on")
    assert (found.ifname, found.vhost) == ("t0", True)
    found = net("switch,name=lan,vlan=10,isolated=on,rate-in=10mbit")
    assert (found.switch, found.settings) == ("lan", "vlan=10,isolated=on,rate-in=10mbit")
    assert net("switch").switch == "default"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("slirp", "one of user"),
        ("user,net=10.0.2.0/99", "IPv4 network"),
        ("user,net=10.0.2.0/30", "too small"),
        ("user,dns=nameserver", "no IP address"),
        ("user,host=1.2.3.4", "is not in net"),
        ("user,dhcpstart=10.0.2.2", "cannot both be"),
        ("user,ipv4=off,ipv6=off", "no network"),
        ("user,tftp=/srv", "tftp"),
        ("tap,script=/etc/qemu-ifup", "script=no"),
        ("tap,fd=3", "ifname="),
        ("stream", "addr.path"),
        ("stream,addr.type=vsock", "unix or inet"),
        ("stream,addr.type=inet,addr.host=a,addr.port=99999", "1 to 65535"),
        ("socket", "one of listen"),
        ("socket,listen=:1,connect=a:1", "one of listen"),
        ("socket,udp=a:1", "localaddr"),
        ("dgram,local.type=unix,local.path=/a", "remote.type"),
        ("switch,vlan=0", "no VLAN"),
        ("switch,vlan=1,trunk=all", "access ports"),
        ("user,queues=many", "number"),
    ],
)
def test_what_is_wrong_is_said(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        net(text)


def test_published_ports() -> None:
    assert published("2222:22") == "tcp::2222-:22"
    assert published("80") == "tcp::80-:80"
    assert published("127.0.0.1:8080:80/tcp") == "tcp:127.0.0.1:8080-:80"
    assert published("[::1]:53:53/udp") == "udp:[::1]:53-:53"
    for bad in ("", "a:b", "1:2:3:4", "0:22", "22:70000", "80/sctp", "[::1]:80:", "1:"):
        with pytest.raises(ConfigError, match="-p"):
            published(bad)
    builder = Builder()
    builder.publish("2222:22")
    builder.finish_nets()
    assert builder.nets["net0"].forwards == ("tcp::2222-:22",)
    builder = Builder()
    builder.netdev("tap,id=net0")
    builder.netdev("user,id=u,hostfwd=tcp::1-:1")
    builder.publish("2222:22")
    builder.finish_nets()
    assert builder.nets["u"].forwards == ("tcp::1-:1", "tcp::2222-:22")


def test_filter_dump() -> None:
    builder = Builder()
    builder.netdev("user,id=u")
    builder.object("rng-random,id=r,filename=/dev/urandom")
    builder.object("filter-dump,id=f,netdev=u,file=/tmp/x,maxlen=100")
    builder.finish_nets()
    assert [(dump.file, dump.longest) for dump in builder.nets["u"].dumps] == [("/tmp/x", 100)]
    for bad in ("filter-mirror,id=f,netdev=u", "filter-dump,id=f,netdev=u", "filter-dump,id=f,netdev=u,file=x,maxlen=0"):
        with pytest.raises(ConfigError, match="filter"):
            Builder().object(bad)
    builder.object("filter-dump,id=g,netdev=none,file=x")
    with pytest.raises(ConfigError, match="no -netdev"):
        builder.finish_nets()
