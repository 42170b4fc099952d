#!/bin/busybox sh
# Loads the drivers of the disks, mounts them and goes on with the root file system.
b=/bin/busybox
fail() {
  echo "anyport: the initramfs failed: $1"
  $b poweroff -f
}
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs dev /dev
while read -r module; do $b insmod "/modules/$module" || echo "anyport: insmod $module failed"; done </modules/list
n=0
while [ ! -b /dev/vdd ] && [ $n -lt 100 ]; do
  $b sleep 0.1
  n=$((n + 1))
done
$b mount -t ext4 /dev/vda /new || fail "mount the root file system"
$b mount -t ext4 -o ro /dev/vdb /new/lib/modules || fail "mount the modules"
$b mount -t ext4 -o ro /dev/vdc /new/under-test || fail "mount the programs"
$b mount --move /dev /new/dev
$b mount --move /proc /new/proc
$b mount --move /sys /new/sys
exec $b switch_root /new /bin/bash /under-test/init
