"""Seeds from seeds."""

import hashlib


def mix(seed: int, *keys: int | str) -> int:
    """A seed for torch's generators, unrelated to that of any other `keys`."""
    digest = hashlib.blake2b(repr((seed, *keys)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
