#!/bin/bash
# Runs as the first process of the machine: prepares it, runs the tests and hands back what came out.
# Disks: /dev/vda root, vdb modules, vdc programs (at /under-test), vdd the cases to run and, at the end, the results.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /run
mkdir -p /run/netns /run/lock /tmp/results /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t securityfs securityfs /sys/kernel/security
mount -t bpf bpf /sys/fs/bpf
ln -sfn /proc/self/fd /dev/fd
ip link set lo up
hostname anyport-test
echo "3 4 1 3" >/proc/sys/kernel/printk
tr -d '\0' </dev/vdd >/tmp/cases
# What the kernel does not load by itself when iptables and ipset ask for it.
modprobe -a xt_TPROXY xt_socket xt_mark ipt_REJECT ip6t_REJECT xt_set ip_set_hash_net ip_set_hash_ip nft_compat veth

echo "anyport: $(uname -r) $(uname -v), up after $(cut -d' ' -f1 /proc/uptime) s"
{ uname -r; uname -v; } >/tmp/results/kernel
export ANYPORTD=/under-test/debug/anyportd ANYPORTCTL=/under-test/debug/anyportctl
export ANYPORT_TEST_KERNEL=1 ANYPORT_REQUIRE=all ANYPORT_TEST_CASES=/tmp/cases ANYPORT_TEST_PATIENCE=8 RUST_BACKTRACE=0
cd /tmp
# What tests complain goes to the console alone: it would tear the runner's lines apart.
{
  /under-test/debug/deps/e2e --test-threads 2 2>&3 | tee /tmp/results/output
  echo "${PIPESTATUS[0]}" >/tmp/results/status
} 3>&1
echo "anyport: ended after $(cut -d' ' -f1 /proc/uptime) s"
dmesg >/tmp/results/dmesg
tar -cf /dev/vdd -C /tmp/results .
sync
echo o >/proc/sysrq-trigger
sleep 60
