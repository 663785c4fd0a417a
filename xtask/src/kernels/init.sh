#!/bin/sh
# The first process of the guest. Results go to the second serial line.
export PATH=/bin HOME=/tmp
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
for mode in session multi perf; do
    echo "=== $mode"
    rm -f /tmp/profile.json
    if memprof record --probe "$mode" -i 1 -f json -o /tmp/profile.json -- /bin/target 2>/tmp/errors; then
        cat /tmp/profile.json
        echo
    else
        tail -n 40 /tmp/errors
    fi
done >/dev/ttyS1
echo "=== end" >/dev/ttyS1
poweroff -f
