"""The schemes once more, in Python: python3 reference.py SCHEME [NAMESPACE] reads names, as lines of
hexadecimal digits, and prints the key of each."""

import hashlib
import hmac
import re
import struct
import sys
import zlib


def crc(name):
    return zlib.crc32(name)


def signed32(n):
    return struct.unpack("<i", struct.pack("<I", n))[0]


def signed64(n):
    return struct.unpack("<q", struct.pack("<Q", n))[0]


def first8(digest, order):
    return struct.unpack(order + "q", digest[:8])[0]


def fnv(name, bits, xor_first=False):
    prime, value = {32: (0x01000193, 0x811C9DC5), 64: (0x100000001B3, 0xCBF29CE484222325)}[bits]
    for byte in name:
        if xor_first:
            value = (value ^ byte) * prime % 2**bits
        else:
            value = value * prime % 2**bits ^ byte
    return value


def hkdf(name):
    secret = hmac.new(bytes(32), name, hashlib.sha256).digest()
    return hmac.new(secret, b"SQLx (Rust) Postgres advisory lock\x01", hashlib.sha256).digest()


def distributedlock(name):
    if len(name) <= 9 and all(byte < 128 for byte in name):
        bits = "".join(format(byte, "07b") for byte in name) + "0"
        n = int(bits.ljust(64, "1"), 2)
        return signed32(n >> 32), signed32(n % 2**32)
    if re.fullmatch(rb"[0-9a-fA-F]{16}", name):
        return signed64(int(name, 16))
    if re.fullmatch(rb"[0-9a-fA-F]{8},[0-9a-fA-F]{8}", name):
        return tuple(signed32(int(half, 16)) for half in name.split(b","))
    return first8(hashlib.sha1(name).digest(), "<")


def flyway(name):
    units = name.decode().encode("utf-16-be")
    value = 0
    for (unit,) in struct.iter_unpack(">H", units):
        value = (31 * value + unit) % 2**32
    return int.from_bytes(b"Flyway", "big") + signed32(value)


def sha256(name, namespace):
    if namespace is None:
        return first8(hashlib.sha256(name).digest(), ">")
    return first8(hashlib.sha512(struct.pack(">Q", len(namespace)) + namespace + name).digest(), ">")


def river(name, namespace):
    if namespace is None:
        return signed64(fnv(name, 64))
    return int(namespace) * 2**32 + fnv(name, 32)


def joined(name, namespace, separator):
    return name if namespace is None else namespace + separator + name


SCHEMES = {
    "atlas": lambda name, _: fnv(name, 32),
    "distributedlock": lambda name, _: distributedlock(name),
    "django-pglock": lambda name, _: first8(hashlib.sha256(name).digest(), "<"),
    "django-pglocks": lambda name, _: signed32(crc(name)),
    "flyway": lambda name, _: flyway(name),
    "fnv1a64": lambda name, _: signed64(fnv(name, 64, True)),
    "golang-migrate": lambda name, _: crc(name) * 1486364155 % 2**32,
    "good_job": lambda name, ns: first8(hashlib.md5(joined(name, ns, b"-")).digest(), ">"),
    "heroku-pg_lock": lambda name, _: (-(2**31), signed32(crc(name))),
    "npm-advisory-lock": lambda name, _: struct.unpack("<ii", hashlib.sha256(name).digest()[:8]),
    "pals": lambda name, ns: first8(hashlib.sha1(joined(name, ns, b".")).digest(), "<"),
    "py-postgresql-lock": lambda name, _: first8(hashlib.sha1(name).digest(), ">"),
    "rails": lambda name, _: 2053462845 * crc(name),
    "river": river,
    "sha256": sha256,
    "sqlalchemy-dlock": lambda name, _: first8(hashlib.blake2b(name, digest_size=8).digest(), "<"),
    "sqlx": lambda name, _: first8(hkdf(name), "<"),
    "sqlx-migrate": lambda name, _: 0x3D32AD9E * crc(name),
    "symfony": lambda name, _: crc(name),
    "with_advisory_lock": lambda name, ns: (crc(name) & 0x7FFFFFFF, int(ns or b"0") & 0x7FFFFFFF),
}

namespace = sys.argv[2].encode() if len(sys.argv) > 2 else None
for line in sys.stdin:
    print(SCHEMES[sys.argv[1]](bytes.fromhex(line), namespace))
