"""Make the site out of the files of the repository, as they are read there: a hook of mkdocs.

The README is the home page; the examples and other files that pages link to are pages, too, and links lead to these.
Between ``<!-- tabs -->`` and ``<!-- /tabs -->`` headings become tabs. Mathematics becomes MathML, which browsers show
without help.
"""

import html
import posixpath
import re
from pathlib import Path
from typing import Any

from math_core import LatexToMathML

ROOT = Path(__file__).parent.parent
NAMES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
LANGUAGES = {".py": "python", ".yaml": "yaml"}
LINK = re.compile(r"(\]\()(?!https?:|#)([^)\s#]+)")
TABS = re.compile(r"<!-- tabs -->\n(.*?)<!-- /tabs -->\n", re.DOTALL)
MATHS = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)

maths = LatexToMathML()


def on_files(files: Any, config: Any) -> Any:
    """Add what lies outside of ``docs``."""
    from mkdocs.structure.files import File

    for source, page in NAMES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    for path in sorted((ROOT / "examples").iterdir()):
        if language := LANGUAGES.get(path.suffix):
            text = f"# {path.name}\n\n```{language}\n{path.read_text()}```\n"
            files.append(File.generated(config, f"examples/{path.name}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links lead to pages of the site, and lay tabs out."""
    here = page.file.src_uri
    source = next((source for source, name in NAMES.items() if name == here), f"docs/{here}")

    def moved(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[2]))
        return link[1] + posixpath.relpath(address(target), posixpath.dirname(here) or ".")

    return TABS.sub(tabbed, LINK.sub(moved, markdown))


def address(source: str) -> str:
    """Return the page of the site that shows a file of the repository."""
    if source.startswith("examples/"):
        return f"{source}.md"
    return NAMES.get(source, source.removeprefix("docs/"))


def tabbed(section: re.Match[str]) -> str:
    """Turn the headings of a section into tabs."""
    _, *parts = re.split(r"^## (.+)\n", section[1], flags=re.MULTILINE)
    tabs = zip(parts[::2], parts[1::2], strict=True)
    return "".join(f"/// tab | {title}\n{text.strip()}\n///\n\n" for title, text in tabs)


def on_page_content(content: str, **_: Any) -> str:
    """Convert mathematics.

    Raises:
        LatexError: naming what is not LaTeX.
    """

    def converted(found: re.Match[str]) -> str:
        text: str = maths.convert_with_local_state(html.unescape(found[2]), displaystyle=found[1] == "div")
        return text

    return MATHS.sub(converted, content)
