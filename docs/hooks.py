"""Make the site out of the files of the repository, as they are read there: hooks of mkdocs.

The README is the home page, the examples are pages, and links lead to these. Between ``<!-- tabs -->`` and
``<!-- /tabs -->`` headings become tabs. Mathematics becomes MathML, which browsers show without help.
"""

import html
import posixpath
import re
from pathlib import Path
from typing import Any

from math_core import LatexError, LatexToMathML
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
NAMES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
EXAMPLES = "examples/"
LANGUAGES = {".py": "python", ".yaml": "yaml"}
LINK = re.compile(r"(\]\()(?!https?:|#)([^)\s#]+)")
TABS = re.compile(r"<!-- tabs -->\n(.*?)<!-- /tabs -->\n", re.DOTALL)
MATHS = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)

maths = LatexToMathML()


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what lies outside of ``docs``."""
    for source, page in NAMES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    for path in sorted((ROOT / EXAMPLES).iterdir()):
        if language := LANGUAGES.get(path.suffix):
            text = f"# {path.name}\n\n```{language}\n{path.read_text()}```\n"
            files.append(File.generated(config, f"{EXAMPLES}{path.name}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Let links lead to pages of the site, and lay tabs out."""
    here = page.file.src_uri
    if here.startswith(EXAMPLES):
        return markdown
    source = next((source for source, name in NAMES.items() if name == here), f"docs/{here}")

    def moved(link: re.Match[str]) -> str:
        return link[1] + address(posixpath.normpath(posixpath.join(posixpath.dirname(source), link[2])))

    return TABS.sub(tabbed, LINK.sub(moved, markdown))


def address(source: str) -> str:
    """Return the page of the site that shows a file of the repository."""
    return f"{source}.md" if source.startswith(EXAMPLES) else NAMES.get(source, source.removeprefix("docs/"))


def tabbed(section: re.Match[str]) -> str:
    """Turn the headings of a section into tabs."""
    _, *parts = re.split(r"^## (.+)\n", section[1], flags=re.MULTILINE)
    tabs = zip(parts[::2], parts[1::2], strict=True)
    return "".join(f"/// tab | {title}\n{text.strip()}\n///\n\n" for title, text in tabs)


def on_page_content(content: str, page: Page, **_: Any) -> str:
    """Convert mathematics.

    Raises:
        PluginError: naming the page and what is not LaTeX.
    """

    def converted(found: re.Match[str]) -> str:
        try:
            text: str = maths.convert_with_local_state(html.unescape(found[2]), displaystyle=found[1] == "div")
        except LatexError as error:
            raise PluginError(f"{page.file.src_uri}: {found[2]}: {error}") from None
        return text

    return MATHS.sub(converted, content)
