"""Random numbers as a function of (seed, position) alone: no generator, no state, no batch mates."""

_MASK = (1 << 64) - 1
GOLDEN_GAMMA = 0x9E3779B97F4A7C15
FIRST_MULTIPLIER = 0xBF58476D1CE4E5B9
SECOND_MULTIPLIER = 0x94D049BB133111EB
# 52 bits: u * total stays below total after rounding
UNIFORM_BITS = 52


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) for the token at a position: SplitMix64 (Steele et al. 2014) keyed by both, as a counter."""
    word = _mix(_mix(seed & _MASK) ^ ((position * GOLDEN_GAMMA) & _MASK))
    return (word >> (64 - UNIFORM_BITS)) * 2.0**-UNIFORM_BITS


def _mix(word: int) -> int:
    word = (word + GOLDEN_GAMMA) & _MASK
    word = ((word ^ (word >> 30)) * FIRST_MULTIPLIER) & _MASK
    word = ((word ^ (word >> 27)) * SECOND_MULTIPLIER) & _MASK
    return word ^ (word >> 31)
