"""Matplotlib settings and colours of all plots, for files and for the report."""

from dataclasses import dataclass, field
from typing import Any

from steepest.report.palette import LIGHT, Look, Paper, readable

__all__ = ["FilePaint", "PagePaint", "Paint", "file_style", "page_style"]


class Paint:
    """Colours that a plot is drawn with."""

    ink = "#333333"
    muted = "#555555"
    grid = "#dddddd"
    paper = "#ffffff"

    def line(self, look: Look) -> str:
        """Colour of a row's line."""
        raise NotImplementedError

    def text(self, look: Look) -> str:
        """Colour of words about a row."""
        raise NotImplementedError


class FilePaint(Paint):
    """Colours as they are, on white."""

    def line(self, look: Look) -> str:
        """Colour of a row's line."""
        return look.colour

    def text(self, look: Look) -> str:
        """Colour of words about a row."""
        return readable(look.colour, "#ffffff", 4.5)


@dataclass
class PagePaint(Paint):
    """Colours that only stand for variables of the page: its style sheet has one value for light and one for dark.

    Attributes:
        colours: Colours of the optimizers so far; their places are the numbers of the variables.
    """

    colours: list[str] = field(default_factory=list)
    ink = "#010101"
    muted = "#010102"
    grid = "#010103"
    paper = "#010104"

    def place(self, look: Look) -> int:
        """Number of a row's variable.

        Args:
            look: How the row is drawn.

        Returns:
            The number.
        """
        if look.colour not in self.colours:
            self.colours.append(look.colour)
        return self.colours.index(look.colour)

    def line(self, look: Look) -> str:
        """Stand-in for the colour of a row's line."""
        return f"#0102{self.place(look):02x}"

    def text(self, look: Look) -> str:
        """Stand-in for the colour of words about a row."""
        return f"#0103{self.place(look):02x}"

    def variables(self) -> dict[str, str]:
        """What each stand-in stands for.

        Returns:
            CSS by stand-in.
        """
        found = {self.ink: "var(--ink)", self.muted: "var(--muted)", self.grid: "var(--rule)"}
        found[self.paper] = "var(--paper)"
        for place in range(len(self.colours)):
            found[f"#0102{place:02x}"] = f"var(--series-{place})"
            found[f"#0103{place:02x}"] = f"var(--series-{place}-text)"
        return found

    def values(self, paper: Paper = LIGHT) -> dict[str, str]:
        """Colours of the variables on a paper.

        Args:
            paper: The page's colours.

        Returns:
            Hexadecimal colours by name of the variable.
        """
        found = {}
        for place, colour in enumerate(self.colours):
            found[f"--series-{place}"] = readable(colour, paper.paper, paper.line)
            found[f"--series-{place}-text"] = readable(colour, paper.paper, paper.text)
        return found


def _style(paint: type[Paint], size: float) -> dict[Any, Any]:
    return {
        "font.family": "DejaVu Sans",
        "font.size": size,
        # Text of a user is no formula.
        "text.parse_math": False,
        "text.color": paint.ink,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.edgecolor": paint.muted,
        "axes.labelcolor": paint.muted,
        "axes.labelsize": size,
        "xtick.color": paint.muted,
        "ytick.color": paint.muted,
        "xtick.labelsize": size,
        "ytick.labelsize": size,
        "ytick.left": False,
        "ytick.minor.left": False,
        "xtick.major.size": 3.0,
        "grid.color": paint.grid,
        "grid.linewidth": 0.8,
        # With the date left out, the same records give the same file.
        "svg.hashsalt": "steepest",
    }


def file_style() -> dict[Any, Any]:
    """Matplotlib settings of plots in files of their own.

    Returns:
        Settings by name.
    """
    return {**_style(FilePaint, 10.5), "svg.fonttype": "path", "figure.facecolor": "white"}


def page_style() -> dict[Any, Any]:
    """Matplotlib settings of plots in the report: text stays text, and the page shines through.

    Returns:
        Settings by name.
    """
    return {**_style(PagePaint, 9.5), "svg.fonttype": "none", "figure.facecolor": "none", "axes.facecolor": "none"}
