# In the guest: round after round stress-ng, which checks what it computes, then work whose checksum must be the same each time.
# Usage: bench.sh SECONDS-OF-A-ROUND. Ends with the VM.
export PATH=/usr/bin:/usr/sbin LC_ALL=C HOME=/root
cd /tmp || exit 1
known=
round=0
while :; do
    round=$((round + 1))
    case $((round % 4)) in
        0) load="--cpu 2 --cpu-method all --matrix 1 --atomic 1 --qsort 1" ;;
        1) load="--vm 1 --vm-bytes 48M --mmap 1 --mmap-bytes 16M --fault 1 --madvise 1 --shm 1 --shm-bytes 4M" ;;
        2) load="--fork 1 --vfork 1 --exec 1 --switch 1 --pipe 1 --futex 1 --sem 1 --signal 1" ;;
        3) load="--timer 1 --nanosleep 1 --fp 1 --str 1 --hash 1 --sysinfo 1 --tmpfs 1 --membarrier 1 --icache 1" ;;
    esac
    # shellcheck disable=SC2086
    stress-ng --verify --timestamp --temp-path /tmp -t "$1" $load >/tmp/log 2>&1
    status=$?
    found=$({ seq 1 60000 | sort -R --random-source=/usr/bin/bash; gzip -9n </usr/bin/bash; } | sha256sum | cut -c1-16)
    [ -n "$known" ] || known=$found
    if [ $status != 0 ] || [ "$found" != "$known" ]; then
        echo "soak round $round failed: status $status, checksum $found, first $known"
        cat /tmp/log
        exit 1
    fi
    echo "soak round $round $found $(grep -c . /proc/net/unix) $(sed -n 's/^MemAvailable: *\([0-9]*\).*/\1/p' /proc/meminfo)"
done
