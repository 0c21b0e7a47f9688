#!/bin/sh
# First process of `softkvm bench io`, here and under QEMU: one measurement after the other, results as lines
# "BENCH name value" on the console that the command line names (bench.console=, bench.seconds=, bench.only=).
export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/root TERM=linux LD_LIBRARY_PATH=/lib
mount -t devtmpfs dev /dev 2>/dev/null
mount -t proc proc /proc
mount -t sysfs sys /sys
load() { [ -e "/sys/module/$1" ] || insmod "/lib/modules/$1.ko"; }
for module in virtio_blk failover net_failover virtio_net; do load $module; done 2>/dev/null
for word in $(cat /proc/cmdline); do
    case "$word" in
        bench.console=*) console=${word#*=} ;;
        bench.seconds=*) seconds=${word#*=} ;;
        bench.only=*) only=${word#*=} ;;
        bench.port=*) port=${word#*=} ;;
        bench.address=*) address=${word#*=} ;;  # where nobody answers DHCP
        bench.gateway=*) gateway=${word#*=} ;;
    esac
done
while [ ! -c "/dev/$console" ]; do usleep 2000; done
exec </dev/"$console" >/dev/"$console" 2>&1
stty -opost

wanted() { case ",$only," in ,, | *,$1,*) ;; *) return 1 ;; esac; }
# Without a value: what the program said, for whoever looks at the console.
say() { [ -n "$2" ] && echo "BENCH $1 $2" || echo "no value for $1: $out"; }

# Terse version 3 of fio (HOWTO, "Terse output"): field 7 and 8 are KiB/s and operations/s read, 48 and 49 written.
disk() {
    wanted "$1" || return
    out=$(fio --name=x --filename=/dev/vda --direct=1 --ioengine=libaio --time_based --runtime="$seconds" \
        --ramp_time=0.5 --norandommap --randrepeat=0 --output-format=terse --terse-version=3 --rw="$3" --bs="$4" --iodepth="$5" 2>&1)
    say "$1" "$(echo "$out" | grep '^3;' | cut -d';' -f"$2")"
}
disk randread-qd1 8 randread 4k 1
disk randread-qd32 8 randread 4k 32
disk read-1m 7 read 1m 4
disk write-1m 48 write 1m 4

ip link set lo up
tries=0
case $(cat /sys/bus/virtio/devices/*/device) in *0x0001*)
    while [ ! -e /sys/class/net/eth0 ] && [ $tries -lt 500 ]; do usleep 10000; tries=$((tries + 1)); done ;;
esac
if [ -e /sys/class/net/eth0 ] && { wanted ping || wanted iperf-out || wanted iperf-in; }; then
    ip link set eth0 up
    [ -n "$address" ] && ip addr add "$address" dev eth0 || udhcpc -q -n -t 5 -T 1 -i eth0 -s /etc/udhcpc.script >/dev/null 2>&1
    [ -n "$gateway" ] || gateway=$(ip route | sed -n 's/^default via \([^ ]*\).*/\1/p')
    # Average of the round trips, in milliseconds.
    if wanted ping; then
        out=$(ping -c 100 -A "$gateway" 2>&1)
        say ping "$(echo "$out" | sed -n 's,.*min/avg/max = [^/]*/\([^/]*\)/.*,\1,p')"
    fi
    # Mbit/s as the receiver counts them.
    flow() {
        wanted "$1" || return
        out=$(iperf3 -c "$gateway" -p "$port" -t "$seconds" -O 1 -f m $2 2>&1)
        say "$1" "$(echo "$out" | sed -n 's,.* \([0-9.]*\) Mbits/sec.*receiver.*,\1,p')"
    }
    flow iperf-out
    flow iperf-in -R
fi

if wanted console; then  # the host takes the time
    say console begin
    seq 1 200000
    say console end
fi
say all done
poweroff -f
