import pytest

from moray.kernels.cpu.philox import MASK32, philox4x32, uniform_bits


# Known answers published with Random123 (kat_vectors, philox4x32 10).
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((MASK32,) * 4, (MASK32,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter, key, words):
    assert philox4x32(counter, key) == words


def test_bits_depend_on_every_part_of_the_stream():
    streams = [(key, sample, at) for key in (0, 1, 2**32, 2**63) for sample in (0, 1) for at in (0, 1, 2**32)]
    assert len({uniform_bits(*stream) for stream in streams}) == len(streams)


def test_a_negative_stream_key_is_taken_modulo_two_to_the_64():
    assert uniform_bits(-1, 0, 0) == uniform_bits(2**64 - 1, 0, 0)


def test_bits_are_uniform():
    counts = [0] * 16
    for position in range(16_000):
        counts[uniform_bits(7, 0, position) >> 60] += 1
    # Chi-square of 15 degrees of freedom: 37.7 is its 0.999 quantile.
    assert sum((count - 1000) ** 2 / 1000 for count in counts) < 37.7
