"""Philox4x32-10, a counter-based random generator.

A number is a pure function of its key and counter, so it does not depend on numbers generated before. Source: Salmon et
al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

MASK32 = 0xFFFFFFFF


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return four random 32-bit words for a 128-bit counter and a 64-bit key, both given as 32-bit words."""
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(10):
        p, q = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (q >> 32) ^ b ^ k0, q & MASK32, (p >> 32) ^ d ^ k1, p & MASK32
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return a, b, c, d


def uniform_bits(stream_key: int, sample: int, position: int) -> int:
    """Return 64 random bits for one token; divided by 2**64 they are a uniform number in [0, 1).

    stream_key: the request's key, modulo 2**64
    sample:     number of the sample in the request
    position:   number of tokens generated before this one
    """
    key = stream_key & MASK32, (stream_key >> 32) & MASK32
    low, high, _, _ = philox4x32((position & MASK32, position >> 32 & MASK32, sample & MASK32, 0), key)
    return high << 32 | low
