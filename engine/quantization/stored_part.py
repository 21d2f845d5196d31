"""StoredPart: what a tensor of a weight file must be. No torch: a plan reads headers too."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StoredPart:
    """States what one stored tensor must be.

    shape:        its shape
    dtypes:       the names that its dtype may have in a safetensors file, such as "BF16" and "F8_E4M3"
    is_optional:  the file need not have it
    also:         other shapes that it may have
    """

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    is_optional: bool = False
    also: tuple[tuple[int, ...], ...] = ()

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Return whether a stored tensor may have this shape."""
        return shape == self.shape or shape in self.also
