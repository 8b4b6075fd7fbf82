#!/usr/bin/python3
"""rbd-contents.py CONF POOL NAMESPACE: prints IMAGE@SNAPSHOT and the SHA-256 of its content for all snapshots of all images.

One program for all of them: each program needs a tenth of a second to connect to the cluster.
"""

import hashlib
import sys

import rados
import rbd

conf, pool, namespace = sys.argv[1:]
with rados.Rados(conffile=conf) as cluster, cluster.open_ioctx(pool) as ioctx:
    ioctx.set_namespace(namespace)
    for name in rbd.RBD().list(ioctx):
        with rbd.Image(ioctx, name, read_only=True) as image:
            for snapshot in list(image.list_snaps()):
                if snapshot["namespace"] != rbd.RBD_SNAP_NAMESPACE_TYPE_USER:
                    continue  # a removed one, of which there is a clone
                image.set_snap(snapshot["name"])
                content = image.read(0, image.size())
                print(f"{name}@{snapshot['name']} {hashlib.sha256(content).hexdigest()}")
