#!/usr/bin/python3
"""The data path of a backup provider: each distinct block is stored once, named by its SHA-256.

store.py backup STORE INDEX BASE DEVICE VOLUME LIMIT COMMAND...
store.py restore STORE INDEX IMAGE

An index has the size of the disk, then the digest of each block (32 bytes). BASE is the index of the
previous backup, for an increment. VOLUME is the JSON object that Proxmox VE gives to a provider. COMMAND is
pve-backup-access. doc/any-language.md describes the stream.
"""

import hashlib
import os
import struct
import subprocess
import sys

FRAME = struct.Struct(">8sQQ32s")
SIZE = struct.Struct(">Q")
BLOCK = 65536


def frames(stream):
    """Yields each frame as (kind, offset, length, digest, data); raises if the stream is not complete."""
    headers, count, total, first = hashlib.sha256(), 0, 0, True
    while True:
        header = stream.read(FRAME.size)
        if len(header) != FRAME.size:
            raise EOFError("the stream was cut")
        kind, offset, length, digest = FRAME.unpack(header)
        kind = kind.rstrip(b"\0").decode()
        if kind == "end":
            if first or (offset, length, digest) != (count, total, headers.digest()):
                raise ValueError("the stream is not complete")
            return
        headers.update(header)
        data = b""
        if kind == "data":
            data = stream.read(length)
            if len(data) != length:
                raise EOFError("the stream was cut")
            if hashlib.sha256(data).digest() != digest:
                raise ValueError("the block at %d is not what was sent" % offset)
        elif kind not in ("zero", "full", "part"):
            raise ValueError("a frame of an unknown kind: " + kind)
        if first != (kind in ("full", "part")):
            raise ValueError("a frame of kind %s in the wrong place" % kind)
        first = False
        if kind in ("data", "zero"):
            count, total = count + 1, total + length
        yield kind, offset, length, digest, data


def block_file(store, digest):
    name = digest.hex()
    return os.path.join(store, "blocks", name[:2], name)


def write_durably(path, data):
    """The file gets its name only once its data is on disk."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    part = "%s.%d.part" % (path, os.getpid())
    with open(part, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.rename(part, path)


def read_index(path):
    with open(path, "rb") as file:
        data = file.read()
    return SIZE.unpack_from(data)[0], bytearray(data[SIZE.size :])


def store_stream(stream, store, base):
    index, size = None, 0
    for kind, offset, length, digest, data in frames(stream):
        if kind in ("full", "part"):
            if index is not None or offset != 1:
                raise ValueError("not a stream of version 1")
            size = length
            index = bytearray(32 * -(-size // BLOCK))
            if kind == "part":
                base_size, index = read_index(base)
                if base_size != size:
                    raise ValueError("the base has another size")
            continue
        at = offset // BLOCK * 32
        index[at : at + 32] = digest if kind == "data" else bytes(32)
        path = block_file(store, digest)
        if kind == "data" and not os.path.exists(path):
            write_durably(path, data)
    return SIZE.pack(size) + index


def backup(store, index, base, device, volume, limit, *command):
    copy = list(command) + ["copy", "-", "--device", device, "--volume", volume]
    if limit:
        copy += ["--bandwidth-limit", limit]
    with subprocess.Popen(copy, stdout=subprocess.PIPE) as process:
        content = store_stream(process.stdout, store, base)
    if process.returncode:
        raise RuntimeError("the copy failed")
    write_durably(index, content)


def restore(store, index, image):
    size, digests = read_index(index)
    with open(image, "wb") as file:
        file.truncate(size)
        for at in range(0, len(digests), 32):
            digest = bytes(digests[at : at + 32])
            if digest == bytes(32):
                continue
            with open(block_file(store, digest), "rb") as block:
                data = block.read()
            if hashlib.sha256(data).digest() != digest:
                raise ValueError("the block at %d is damaged" % (at // 32 * BLOCK))
            file.seek(at // 32 * BLOCK)
            file.write(data)


if __name__ == "__main__":
    os.umask(0o077)  # blocks are as confidential as their disk
    try:
        {"backup": backup, "restore": restore}[sys.argv[1]](*sys.argv[2:])
    except (OSError, EOFError, ValueError, RuntimeError) as error:
        sys.exit("store.py: %s" % error)
