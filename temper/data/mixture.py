"""Exact counts for mixtures."""

from temper.errors import TemperError


def harmful_count(harmful_ratio: float, n_rows: int) -> int:
    """``harmful_ratio * n_rows``: see `exact_count`."""
    return exact_count("harmful_ratio", harmful_ratio, "n_rows", n_rows)


def exact_count(flag: str, share: float, of_flag: str, n_rows: int) -> int:
    """``share * n_rows``, which must be a whole number.

    Nothing is rounded in silence: a table that says p = 0.05 must have been made with 5 % of rows.

    Args:
        flag: Name of the share, for errors.
        share: Share in [0, 1].
        of_flag: Name of the number of rows, for errors.
        n_rows: Rows that it is a share of.

    Raises:
        TemperError: no rows; a share outside [0, 1]; or a product that is not whole, with the
            share that rounding to the nearest whole number (halves to even) would give.
    """
    if n_rows < 1:
        raise TemperError(f"data.init_args.{of_flag}={n_rows}: the set is empty; give at least 1")
    if not 0 <= share <= 1:
        raise TemperError(f"data.init_args.{flag}={share}: give a share in [0, 1], for example 0.1 for 10 %")
    exact = share * n_rows
    count = round(exact)
    if abs(exact - count) > 1e-9 * n_rows:
        raise TemperError(
            f"data.init_args.{flag}={share}: {share} x {n_rows} rows = {exact} is not a whole number; "
            f"rounded it would be {count} rows: set {flag}={count / n_rows}, or change {of_flag}"
        )
    return count
