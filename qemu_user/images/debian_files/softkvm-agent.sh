#!/bin/sh
# What the host says on the control port: `powerdown`, or, to a clone, `identity UUID NAME MAC...`, a MAC for each network card.
exec 3<>/dev/virtio-ports/org.softkvm.control
while read -r verb rest <&3; do
    case "$verb" in
        powerdown) systemctl poweroff ;;
        identity)
            # shellcheck disable=SC2086
            set -- $rest
            echo "$1" >/etc/machine-id
            hostnamectl hostname "$2"
            shift 2
            for device in /sys/class/net/*/device; do
                [ $# -gt 0 ] || break
                card=${device%/device}
                card=${card##*/}
                ip link set dev "$card" down
                ip link set dev "$card" address "$1"
                ip link set dev "$card" up
                shift
            done
            # Two machines with one key are one machine to who checks it. sshd has a key all the while: making one takes seconds.
            for old in /etc/ssh/ssh_host_*_key; do
                rm -f /etc/ssh/new /etc/ssh/new.pub
                kind=${old#/etc/ssh/ssh_host_}
                ssh-keygen -q -t "${kind%_key}" -N "" -C "root@$(hostname)" -f /etc/ssh/new
                mv /etc/ssh/new.pub "$old.pub"
                mv /etc/ssh/new "$old"
            done ;;
    esac
done
