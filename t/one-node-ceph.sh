#!/usr/bin/env bash
# A one-node Ceph in a directory: a monitor, a manager, an OSD on a file, and the pool "backup" for RBD.
# one-node-ceph.sh DIRECTORY PORT [LINE...]: PORT is the monitor's, on the loopback address; LINE is one more of the
# configuration. DIRECTORY/*.pid name the processes.
set -euo pipefail
dir=$1
port=$2
shift 2
fsid=$(cat /proc/sys/kernel/random/uuid)
cat > "$dir/ceph.conf" <<END
[global]
fsid = $fsid
mon host = v2:127.0.0.1:$port
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
osd pool default size = 1
osd pool default min size = 1
mon allow pool size one = true
osd crush chooseleaf type = 0
run dir = $dir
admin socket = $dir/\$name.\$pid.asok
log file = $dir/\$name.log
pid file = $dir/\$name.pid
mon data = $dir/mon
mgr data = $dir/mgr
osd data = $dir/osd
osd objectstore = bluestore
bluestore block size = 8589934592
osd max object name len = 256
osd max object namespace len = 64
osd memory target = 939524096
keyring = $dir/keyring
$(printf '%s\n' "$@")
END
export CEPH_CONF="$dir/ceph.conf"
mkdir -p "$dir/mon" "$dir/mgr" "$dir/osd"
ceph-authtool --create-keyring "$dir/keyring" --gen-key -n mon. --cap mon 'allow *' >/dev/null
ceph-authtool "$dir/keyring" --gen-key -n client.admin --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *' >/dev/null
ceph-authtool "$dir/keyring" --gen-key -n mgr.x --cap mon 'allow profile mgr' --cap osd 'allow *' >/dev/null
ceph-authtool "$dir/keyring" --gen-key -n osd.0 --cap mon 'allow profile osd' --cap mgr 'allow profile osd' --cap osd 'allow *' >/dev/null
monmaptool --create --fsid "$fsid" --addv a "[v2:127.0.0.1:$port]" "$dir/monmap" >/dev/null
ceph-mon --mkfs -i a --monmap "$dir/monmap" --keyring "$dir/keyring"
ceph-mon -i a
ceph-mgr -i x
osd_uuid=$(cat /proc/sys/kernel/random/uuid)
ceph osd new "$osd_uuid" >/dev/null
ceph-osd -i 0 --mkfs --osd-uuid "$osd_uuid"
ceph-osd -i 0
ceph osd pool create backup 8
rbd pool init backup
