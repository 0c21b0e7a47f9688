#!/bin/sh
# First process of our images: mounts, modules for the devices that are there, then a shell on hvc0 or, when the host has put
# a command into /softkvm.conf, that command on the ports stdin, stdout and stderr. An image with a system on a disk: root.sh.
export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/root TERM=linux
mount -t devtmpfs dev /dev 2>/dev/null
mount -t proc proc /proc
mount -t sysfs sys /sys

load() { [ -e "/sys/module/$1" ] || insmod "/lib/modules/$1.ko"; }
# Devices on PCI need nothing; those on virtio-mmio its module.
for device in /sys/bus/platform/devices/*.virtio_mmio; do
    [ ! -e "$device" ] || load virtio_mmio
done

# What the host has added for this VM's devices.
for list in /lib/modules/*.order; do
    [ ! -e "$list" ] || while read -r module; do load "$module"; done <"$list"
done

# Device types of the virtio specification, chapter 5: 1 network, 2 block, 4 entropy.
types=$(cat /sys/bus/virtio/devices/*/device 2>/dev/null)
case "$types" in *0x0002*) load virtio_blk ;; esac
case "$types" in *0x0001*) load failover; load net_failover; load virtio_net ;; esac
case "$types" in *0x0004*) load rng_core; load virtio_rng ;; esac 2>/dev/null

[ -r /softkvm.conf ] && . /softkvm.conf
hostname "${NAME:-softkvm}"
root= inside=
[ -z "$ROOT" ] || . /root.sh
for tag in $SHARES; do  # cache=mmap is close-to-open; with none, 6.12 reads 4 KiB at a time
    mkdir -p "$root/mnt/$tag" &&
        mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=mmap "$tag" "$root/mnt/$tag"
done
[ -z "$ROOT" ] || [ -n "$COMMAND" ] || start_system
case "$types" in *0x0001*)
    ip link set lo up
    ip link set eth0 up
    udhcpc -q -n -t 3 -T 1 -i eth0 -s /etc/udhcpc.script >/dev/null 2>&1 || true ;;
esac
ip link set lo up 2>/dev/null

mount -t devpts -o mode=620 pts /dev/pts 2>/dev/null || { mkdir -p /dev/pts; mount -t devpts pts /dev/pts; }
[ -z "$ROOT" ] || prepare_command
finish() {
    [ -z "$ROOT" ] || leave_root
    poweroff -f
}

# The host names its console and ports one by one after the device is there; the control port comes last.
find_ports() {
    for port in /sys/class/virtio-ports/*; do
        [ -r "$port/name" ] || continue
        read -r name <"$port/name"
        case "$name" in
            org.softkvm.stdin) stdin=/dev/${port##*/} ;;
            org.softkvm.stdout) stdout=/dev/${port##*/} ;;
            org.softkvm.stderr) stderr=/dev/${port##*/} ;;
            org.softkvm.control) control=/dev/${port##*/} ;;
        esac
    done
}
tries=0
while [ $tries -lt 500 ]; do
    [ -z "$COMMAND" ] || find_ports
    if [ -n "$COMMAND" ]; then [ -z "$control" ] || break; else [ ! -c /dev/hvc0 ] || break; fi
    tries=$((tries + 1))
    usleep 2000
done

cd /root
if [ -z "$control" ]; then
    # Interactive: a session leader with the console as its terminal, so that job control works.
    setsid -c sh -l </dev/hvc0 >/dev/hvc0 2>&1
    finish
fi

exec 3<>"$control"
# What the host says: signals for the command and everything that it has started, or that the VM is to end.
# The command runs in the foreground: a shell makes what it starts with & deaf to SIGINT.
(
    while read -r verb argument <&3; do
        case "$verb" in
            signal) kill -"$argument" -"$(cat /run/command)" ;;
            identity)
                # We are a clone from now on: UUID, name and addresses of our own.
                set -- $argument
                hostname "$2"
                [ ! -d /etc ] || echo "$1" >/etc/machine-id
                shift 2
                number=0
                for address in "$@"; do
                    ip link set "eth$number" down
                    ip link set "eth$number" address "$address"
                    ip link set "eth$number" up
                    number=$((number + 1))
                done ;;
            powerdown)
                kill -TERM -"$(cat /run/command)"
                sleep 1
                finish ;;
        esac
    done
) 2>/dev/null &
if [ -n "$TTY" ]; then
    exec </dev/hvc0 >/dev/hvc0 2>&1
    ctty=-c
else
    exec <"$stdin" >"$stdout" 2>"$stderr"
    ctty=
fi
export COMMAND
setsid $ctty $inside /bin/sh -c 'cd; echo $$ >/run/command; echo ready >&3; exec 3>&-; eval "$COMMAND"' 3>&3
status=$?
[ -z "$ROOT" ] || leave_root
echo "exit $status" >&3
poweroff -f
