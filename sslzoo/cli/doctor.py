"""Check this machine and say how to fix problems; exit code 1 if something is broken."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser  # no options


def run(args: argparse.Namespace) -> int:
    del args
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from sslzoo.run.doctor import BROKEN, FINE, examine

    findings = examine()
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for finding in findings:
        style = {FINE: "green", BROKEN: "bold red"}.get(finding.state, "yellow")
        text = Text(finding.detail)
        if finding.fix:
            text.append(f"\n-> {finding.fix}", style=style)
        table.add_row(Text(finding.state, style=style), finding.subject, text)
    Console(highlight=False).print(table)
    return 1 if any(finding.state == BROKEN for finding in findings) else 0
