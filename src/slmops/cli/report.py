"""`slmops report`: the comparison that the last run made."""

from __future__ import annotations

import argparse

from slmops.cli.common import json_argument, open_project, project_arguments, say
from slmops.errors import UsageError

HELP = "show the comparison of teacher and student; --open shows the page with plots"


def arguments(parser: argparse.ArgumentParser) -> None:
    """What `report` takes."""
    project_arguments(parser)
    parser.add_argument("--open", action="store_true", help="open the HTML page in the browser")
    json_argument(parser)


def run(options: argparse.Namespace) -> int:
    """Print, or open, what is in the project's outputs folder."""
    from slmops.store.files import read_json

    project = open_project(options)
    page = project.outputs / "report.html"
    report = read_json(project.outputs / "report.json")
    if report is None or not page.exists():
        raise UsageError(f"there is no report of {project.spec.name} yet", "make it with `slmops run`")
    if options.json:
        print((project.outputs / "report.json").read_text(), end="")
        return 0
    if options.open:
        import webbrowser

        if not webbrowser.open(page.as_uri()):
            say(f"no browser found; the page is {page}")
        else:
            print(page)
        return 0
    from slmops.evaluate.text import render_text

    print(render_text(report))
    print(f"page: {page}")
    return 0
