"""A result of a measurement: a named figure with a unit, and which direction is better."""

from typing import Literal

from attrs import frozen

SIGNIFICANT_DIGITS = 4


@frozen(kw_only=True)
class Quantity:
    """One figure of a case. A case has one or more; a peer may lack some of them."""

    name: str
    """How targets, the table and the JSON call it."""

    unit: str

    better: Literal["less", "more", "neither"] = "less"
    """"neither": it says under what the others came to be, and is compared with nothing."""

    def show(self, figure: float) -> str:
        """Return the figure as the table shows it: four significant digits, no decimals for large numbers."""
        if figure == 0 or abs(figure) >= 1_000:
            return f"{figure:,.0f}"
        if abs(figure) < 0.01:
            return f"{figure:.4f}"
        whole = len(str(int(abs(figure)))) if abs(figure) >= 1 else 1
        return f"{figure:.{SIGNIFICANT_DIGITS - whole}f}"
