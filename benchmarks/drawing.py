"""Draw small line charts side by side as one SVG."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from benchmarks.baselines_page import COLORS

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 230, 220, 44, 30, 40


@dataclass(frozen=True, slots=True)
class Panel:
    """One chart: lines by name, each a list of (x, y). All lines have the same x values."""

    title: str
    lines: dict[str, list[tuple[float, float]]]


def drawing(panels: Sequence[Panel], unit: str) -> str:
    """Draw the panels in a row. Each starts at 0 and has its own scale. A line has one color in all panels."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    colors = {name: COLORS[place % len(COLORS)] for place, name in enumerate(names)}
    width = len(panels) * WIDTH + 110
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" font-family="sans-serif" '
        f'font-size="11"><rect width="{width}" height="{HEIGHT}" fill="white"/>',
        f'<text x="4" y="12" fill="#5d6778">{escape(unit)}</text>',
    ]
    for place, panel in enumerate(panels):
        parts.append(f'<g transform="translate({place * WIDTH},0)">{_panel(panel, colors)}</g>')
    for place, (name, color) in enumerate(colors.items()):
        parts.append(f'<text x="{width - 104}" y="{TOP + 14 * place}" fill="{color}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel, colors: dict[str, str]) -> str:
    points = [point for line in panel.lines.values() for point in line]
    low, high = min(x for x, _ in points), max(x for x, _ in points)
    most = max(y for _, y in points) or 1.0
    floor = HEIGHT - BOTTOM

    def at(x: float, y: float) -> str:
        across = (x - low) / (high - low) if high > low else 0.5
        return f"{LEFT + across * (WIDTH - LEFT - 16):.1f},{floor - y / most * (floor - TOP):.1f}"

    parts = [f'<path d="M{at(low, 0)}L{at(high, 0)}M{at(low, most)}L{at(high, most)}" stroke="#dfe3ea"/>']
    parts += [f'<text x="4" y="{TOP + 4}">{most:.2g}</text><text x="4" y="{floor}">0</text>']
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 6}" font-weight="bold">{escape(panel.title)}</text>')
    for x in sorted({x for x, _ in points}):
        place = at(x, 0).split(",")[0]
        parts.append(f'<text x="{place}" y="{floor + 14}" text-anchor="middle">{x:g}</text>')
    for name, line in panel.lines.items():
        places = " ".join(at(x, y) for x, y in line)
        parts.append(f'<polyline points="{places}" fill="none" stroke="{colors[name]}" stroke-width="1.6"/>')
    return "".join(parts)
