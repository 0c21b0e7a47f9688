#!/bin/sh
# First process of `softkvm bench programs` and of scripts/soak, here and under QEMU: Debian's programs in /debian, one after
# the other. Runs /debian/bench.sh there with the words of bench.args= (separated by commas), on the console of bench.console=.
export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/root TERM=linux
mount -t devtmpfs dev /dev 2>/dev/null
mount -t proc proc /proc
for word in $(cat /proc/cmdline); do
    case "$word" in
        bench.console=*) console=${word#*=} ;;
        bench.args=*) args=$(echo "${word#*=}" | tr , ' ') ;;
    esac
done
while [ ! -c "/dev/$console" ]; do usleep 2000; done
exec </dev/null >/dev/"$console" 2>&1
stty -opost <"/dev/$console"
for folder in proc sys dev tmp root run; do mkdir -p "/debian/$folder"; done
mount -t proc proc /debian/proc
mount -t sysfs sys /debian/sys
mount -t devtmpfs dev /debian/dev
mkdir -p /debian/dev/shm
mount -t tmpfs tmp /debian/tmp
mount -t tmpfs shm /debian/dev/shm
# shellcheck disable=SC2086
chroot /debian /usr/bin/bash /bench.sh $args
echo "bench-ended $?"
poweroff -f
