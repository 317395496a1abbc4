"""The generated reference of recipes: the JSON schema and the tables of keys, made from the docstrings of the schemas.

`json_schema.py` makes the JSON schema, `tables.py` turns schemas into Markdown, `blocks.py` has the generated parts of pages
by name, and `pages.py` finds and rewrites them. `python -m distill.reference` runs it; a test fails on outdated pages.
"""
