"""Student's t distribution."""

from statistics import NormalDist


def student_t(degrees: int, confidence: float) -> float:
    """Return the two-sided point of Student's t distribution: with this probability, its values are within it.

    At 95% it is within 1% from 5 degrees of freedom on (Abramowitz and Stegun 26.7.5).
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / degrees + second / degrees**2
