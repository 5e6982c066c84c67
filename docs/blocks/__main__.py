"""Write the blocks of the README and of the documentation: ``python -m docs.blocks``, from the repository's root."""

from docs.blocks.pages import PAGES, filled

for page in PAGES:
    text = page.read_text(encoding="utf-8")
    if (new := filled(text, page)) != text:
        page.write_text(new, encoding="utf-8")
        print(f"updated {page.name}")
