"""What MkDocs calls: README and CHANGELOG are pages of the site too.

The repository's top folder and docs/ are one folder there, so links between the two are changed.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent


def on_files(files, config):
    for name in ("README.md", "CHANGELOG.md"):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))


def on_page_markdown(markdown, **_):
    return re.sub(r"\]\((docs|\.\.)/", "](", markdown)
