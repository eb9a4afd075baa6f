sudo kvm -m 512 -hda "snape freebsd.qcow" -net nic,macaddr=00:16:3e:01:02:03 -net tap,ifname=tap1 -boot c -name snape -localtime >/tmp/log 2>&1 &
