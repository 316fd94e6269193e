"""Exact counts for mixtures."""

from temper.errors import TemperError


def harmful_count(harmful_ratio: float, n_rows: int) -> int:
    """``harmful_ratio * n_rows``, which must be a whole number.

    Nothing is rounded in silence: a table that says p = 0.05 must have been made with 5 % of rows.

    Raises:
        TemperError: no rows; a ratio outside [0, 1]; or a product that is not whole, with the
            ratio that rounding to the nearest whole number (halves to even) would give.
    """
    if n_rows < 1:
        raise TemperError(f"data.init_args.n_rows={n_rows}: the set is empty; give at least 1")
    if not 0 <= harmful_ratio <= 1:
        raise TemperError(f"data.init_args.harmful_ratio={harmful_ratio}: give a share in [0, 1], for example 0.1 for 10 %")
    exact = harmful_ratio * n_rows
    count = round(exact)
    if abs(exact - count) > 1e-9 * n_rows:
        raise TemperError(
            f"data.init_args.harmful_ratio={harmful_ratio}: {harmful_ratio} x {n_rows} rows = {exact} is not a whole number; "
            f"rounded it would be {count} rows: set harmful_ratio={count / n_rows}, or change n_rows"
        )
    return count
