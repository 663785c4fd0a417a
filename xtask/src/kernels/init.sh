#!/bin/sh
# The first process of the guest. Results go to the second serial line.
export PATH=/bin HOME=/tmp
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
export MEMPROF_LOG=debug
try() {
    echo "=== $1"
    rm -f /tmp/profile.json
    if memprof record -i 1 -f json -o /tmp/profile.json -- /bin/target 2>/tmp/errors; then
        cat /tmp/profile.json
        echo
        echo "=== verified $1"
        grep 'the verifier has passed' /tmp/errors
    else
        tail -n 40 /tmp/errors
    fi
}
for mode in session multi perf prefilter; do
    MEMPROF_PROBE=$mode try "$mode"
done >/dev/ttyS1
# As on kernels without bpf_loop.
MEMPROF_PROBE=perf MEMPROF_WALK=tail-calls try tail-calls >/dev/ttyS1
echo "=== end" >/dev/ttyS1
poweroff -f
