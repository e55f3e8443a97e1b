"""What MkDocs calls: README, CHANGELOG and SECURITY are pages too, and docstrings have links.

The repository's top folder and docs/ are one folder there, so links between the two are changed.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent


def on_files(files, config):
    for name in ("README.md", "CHANGELOG.md", "SECURITY.md"):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))


def on_page_markdown(markdown, **_):
    return re.sub(r"\]\((docs|\.\.)/", "](", markdown)


def on_page_content(html, page, config, **_):
    """On the API's page, link the names and the pages of docs/ that docstrings mention."""
    if page.file.src_path != "api.md":
        return html
    names = "|".join(re.findall(r'id="lpln_autopatch\.(\w+)"', html))
    link = r'<a href="#lpln_autopatch.\1">\g<0></a>'
    html = re.sub(rf"(?<!<b>)<code>({names})</code>", link, html)
    for title, path in (item for entry in config.nav for item in entry.items()):
        html = html.replace(f"docs/{path}", f'<a href="../{Path(path).stem}/">{title}</a>')
    return html
