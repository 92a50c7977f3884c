"""Draws docs/block.svg: the passes over memory of conv -> batch norm -> add -> ReLU, eager and fused.

Run it with ``python docs/block.py``; the counts are those of DESIGN's op table and of the README.
"""

from __future__ import annotations

from pathlib import Path

# (what runs, full tensors read, full tensors written)
EAGER_FORWARD = [
    ("batch norm: statistics", "y", ""),
    ("batch norm: normalise", "y", "n"),
    ("add the shortcut", "n, r", "n"),
    ("ReLU", "n", "z"),
]
FUSED_FORWARD = [("bn_stats", "y", ""), ("bn_act", "y, r", "z")]
EAGER_BACKWARD = [
    ("ReLU backward", "g, z", "du"),
    ("batch norm: sums", "du, y", ""),
    ("batch norm: apply", "du, y", "dy"),
]
FUSED_BACKWARD = [("bn_act_backward_reduce", "g, z, y", "du"), ("bn_act_backward_apply", "du, y", "dy")]

WIDTH, ROW, TOP, LEFT, GAP = 360, 44, 92, 20, 40
STYLE = """
text{font:14px system-ui,sans-serif;fill:#1f2328} .head{font-weight:600;font-size:16px}
.sub{fill:#57606a;font-size:12px} .box{fill:#f6f8fa;stroke:#8c959f} .ours{fill:#dafbe1;stroke:#2da44e}
@media (prefers-color-scheme:dark){text{fill:#e6edf3}.sub{fill:#8d96a0}.box{fill:#161b22;stroke:#6e7681}
.ours{fill:#12261e;stroke:#3fb950}}
"""


def tensors(passes: list[tuple[str, str, str]]) -> int:
    return sum(len([t for t in (r + "," + w).split(",") if t.strip()]) for _, r, w in passes)


def column(x: int, y: int, title: str, passes: list[tuple[str, str, str]], css: str) -> tuple[str, int]:
    out = [
        f'<text class="head" x="{x}" y="{y}">{title}</text>',
        f'<text class="sub" x="{x + WIDTH}" y="{y}" text-anchor="end">{tensors(passes)} tensors moved</text>',
    ]
    y += 12
    for name, reads, writes in passes:
        moved = f"reads {reads}" + (f", writes {writes}" if writes else "")
        out.append(f'<rect class="{css}" x="{x}" y="{y}" width="{WIDTH}" height="{ROW - 8}" rx="6"/>')
        out.append(f'<text x="{x + 12}" y="{y + 23}">{name}</text>')
        out.append(f'<text class="sub" x="{x + WIDTH - 12}" y="{y + 23}" text-anchor="end">{moved}</text>')
        y += ROW
    return "".join(out), y


def main() -> None:
    right = LEFT + WIDTH + GAP
    parts, y = [], TOP
    for label, eager, fused in (
        ("Forward", EAGER_FORWARD, FUSED_FORWARD),
        ("Backward", EAGER_BACKWARD, FUSED_BACKWARD),
    ):
        left, end = column(LEFT, y, f"{label}, eager PyTorch", eager, "box")
        ours, _ = column(right, y, f"{label}, fusedres", fused, "ours")
        parts += [left, ours]
        y = end + 36
    width, height = right + WIDTH + LEFT, y - 20
    head = (
        f'<text class="head" x="{LEFT}" y="32">The end of a block: z = relu(batch_norm(y) + r)</text>'
        f'<text class="sub" x="{LEFT}" y="54">y: output of the convolution, r: shortcut, g: gradient of z. '
        "A box is one pass over memory.</text>"
    )
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}">'
        f"<style>{STYLE}</style>{head}{''.join(parts)}</svg>\n"
    )
    (Path(__file__).parent / "block.svg").write_text(svg)


if __name__ == "__main__":
    main()
