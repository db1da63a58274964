"""Names for the cases of a test."""


def short(case: object) -> str:
    """The name of a function, else str: all workers have to know a case by one name, without an address."""
    return getattr(case, "__name__", str(case))
