"""Units of memory, in bytes."""

MIB = 2**20
GIB = 2**30


def counted(amount: float, noun: str) -> str:
    """An amount with its noun, such as "1 GPU" or "0.12 CPUs"."""
    return f"{round(amount, 3):g} {noun}{'' if amount == 1 else 's'}"
