"""Rows of text as a table, for a terminal or for Markdown."""


def text(header, rows):
    """Columns aligned: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = []
    for row in (header, *rows):
        first, *others = zip(row, widths, strict=True)
        cells = [first[0].ljust(first[1])] + [cell.rjust(width) for cell, width in others]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def markdown(header, rows):
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def of(header, rows, as_markdown):
    return markdown(header, rows) if as_markdown else text(header, rows)
