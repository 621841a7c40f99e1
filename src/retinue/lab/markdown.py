"""A report as Markdown: the same words and tables as the page, without its plots."""

from retinue.lab.page import Report, Section, Table


def markdown(report: Report) -> str:
    """The whole document."""
    parts = [f"# {report.title}", report.lead]
    parts.append("\n".join(f"- {word}: {_flat(value)}" for word, value in report.setting))
    parts += report.notes
    for section in report.sections:
        parts += _section(section, report)
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(section: Section, report: Report) -> list[str]:
    parts = [f"## {section.title}"]
    if section.claim:
        parts.append(f"{report.claim_heading}: {section.claim}")
        parts.append(f"{report.found_heading}: {section.found}")
    else:
        parts.append(section.found)
    for table in section.tables:
        parts += [table.caption and f"**{table.caption}**", _table(table)]
    return parts + list(section.notes)


def _table(table: Table) -> str:
    lines = [table.header, ["---:" if right else "---" for right in table.numeric]]
    rows = [*lines, *table.rows]
    return "\n".join(f"| {' | '.join(_flat(cell) for cell in row)} |" for row in rows)


def _flat(cell: str) -> str:
    """One line; what follows a line's end, such as an interval, in brackets."""
    first, _, rest = cell.replace("|", "\\|").partition("\n")
    return f"{first} ({rest})" if rest else first
