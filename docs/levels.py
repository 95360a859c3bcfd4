"""The drawing of the package's rooms, from the levels that `tests/test_layers.py` holds them to."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
DRAWING = ROOT / "docs/images/levels.svg"
STYLE = """
.sheet { fill: #ffffff }
.box { fill: #eef1fb; stroke: #3f51b5; stroke-width: 1.2 }
.out { fill: #e8f5e9; stroke: #2e7d32; stroke-width: 1.2 }
.row { fill: #f5f6fa }
text { fill: #1f2330; text-anchor: middle }
.small { font-size: 12px; fill: #4a5066 }
"""
TITLE = "The rooms of the package by level"
#: Rooms that a user meets.
OUTER = {"cli", "deployment", "report"}
SIZE = (118, 34)
ROW = 48
PITCH = 54


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    style = f' class="{kind}"' if kind else ""
    return f'<text{style} x="{x:g}" y="{y:g}">{text}</text>'


def _rect(x: float, y: float, width: float, height: float, kind: str) -> str:
    return (
        f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6"/>'
    )


def drawing(level_of: dict[str, int]) -> str:
    """An SVG with a row of boxes for each level, the highest first."""
    numbers = sorted({*level_of.values()}, reverse=True)
    rows = [[room for room in level_of if level_of[room] == number] for number in numbers]
    width = 80 + max(map(len, rows)) * (SIZE[0] + 8)
    height = 54 + len(rows) * PITCH
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" font-family="Helvetica, Arial, sans-serif" font-size="14">',
        f"<title>{TITLE}</title>",
        f"<style>{STYLE}</style>",
        _rect(0, 0, width, height, "sheet"),
    ]
    for i, row in enumerate(rows):
        y = 20 + i * PITCH
        parts.append(_rect(16, y, width - 32, ROW, "row"))
        parts.append(_text(36, y + 29, str(level_of[row[0]]), "small"))
        for j, room in enumerate(row):
            x = 60 + j * (SIZE[0] + 8)
            parts.append(_rect(x, y + 7, *SIZE, "out" if room in OUTER else "box"))
            parts.append(_text(x + SIZE[0] / 2, y + 29, room))
    foot = "a room imports only from rows below its own"
    parts.append(_text(width / 2, height - 16, foot, "small"))
    return "\n".join([*parts, "</svg>", ""])


def levels() -> dict[str, int]:
    """The levels that the layer test enforces, the package's entry points left out."""
    tree = ast.parse((ROOT / "tests/test_layers.py").read_text(encoding="utf-8"))
    (found,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LEVELS"
    )
    return {room: level for room, level in found.items() if not room.startswith("__")}


def main() -> None:
    """Write the drawing."""
    DRAWING.write_text(drawing(levels()), encoding="utf-8")


if __name__ == "__main__":
    main()
