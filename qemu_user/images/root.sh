# Part of /init for images whose system is on the disk $ROOT: mounts it at /sysroot, makes it as large as its disk, and gives a
# new VM what the host has chosen for it: NAME, MACHINE_ID, USER_NAME, SSH_KEYS. Then its own init goes on (start_system), or
# the host's command runs in it (prepare_command).
root=/sysroot inside="chroot /sysroot"
mkdir -p $root
if ! mount -t ext4 -o rw,relatime "$ROOT" $root; then
    echo "softkvm: the root file system on $ROOT cannot be mounted" >/dev/console
    poweroff -f
fi
for name in dev proc sys; do mount --bind /$name $root/$name; done

# The file system's own size: s_blocks_count_lo and s_log_block_size of ext4's superblock, at 1024.
set -- $(dd if="$ROOT" bs=1024 skip=1 count=1 2>/dev/null | od -A n -t u4 -N 28)
sectors=$(($2 * (2 << $7)))
if [ "$(cat "/sys/class/block/${ROOT##*/}/size")" -gt $((sectors + 2048)) ]; then
    $inside resize2fs "$ROOT" >/dev/null 2>&1
fi

first_boot() {
    echo "$NAME" >$root/etc/hostname
    echo "127.0.1.1 $NAME" >>$root/etc/hosts
    echo "$MACHINE_ID" >$root/etc/machine-id
    for kind in ed25519 ecdsa; do
        $inside ssh-keygen -q -t $kind -N "" -C "root@$NAME" -f /etc/ssh/ssh_host_${kind}_key
    done
    authorize root /root
    if [ -n "$USER_NAME" ]; then
        $inside useradd -m -s /bin/bash -G sudo,adm "$USER_NAME"
        echo "$USER_NAME ALL=(ALL) NOPASSWD:ALL" >$root/etc/sudoers.d/softkvm
        chmod 440 $root/etc/sudoers.d/softkvm
        authorize "$USER_NAME" "/home/$USER_NAME"
    fi
    # The console is the terminal of whoever has started the VM: no password is asked there, and there is none.
    mkdir -p $root/etc/systemd/system/serial-getty@.service.d
    {
        echo "[Service]"
        echo "ExecStart="
        echo "ExecStart=-/sbin/agetty --autologin ${USER_NAME:-root} --noreset --noclear --keep-baud 115200,57600,38400,9600 - \${TERM}"
    } >$root/etc/systemd/system/serial-getty@.service.d/softkvm.conf
    rm $root/var/lib/softkvm/first-boot
}

authorize() {
    [ -n "$SSH_KEYS" ] || return 0
    mkdir -p -m 700 "$root$2/.ssh"
    echo "$SSH_KEYS" >"$root$2/.ssh/authorized_keys"
    chmod 600 "$root$2/.ssh/authorized_keys"
    $inside chown -R "$1:" "$2/.ssh"
}

start_system() {
    [ ! -e $root/var/lib/softkvm/first-boot ] || first_boot
    for name in dev proc sys; do
        umount $root/$name
        mount --move /$name $root/$name
    done
    exec /bin/busybox switch_root -c /dev/console $root /sbin/init
}

prepare_command() {
    export LANG=C.UTF-8 PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
    mount -t tmpfs -o mode=755 run /run
    mount --bind /run $root/run
    mount --bind /dev/pts $root/dev/pts
    mount -t tmpfs tmp $root/tmp
    mkdir -p /run/systemd/resolve
    [ ! -e /etc/resolv.conf ] || cp /etc/resolv.conf /run/systemd/resolve/stub-resolv.conf
}

leave_root() {
    PATH=/bin:/sbin
    sync
    kill -9 -1
    cd /
    for name in tmp dev/pts run dev proc sys; do umount $root/$name; done
    umount $root || mount -o remount,ro $root
} 2>/dev/null
