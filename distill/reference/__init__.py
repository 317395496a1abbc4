"""The reference of recipes: its JSON schema and its tables, made of what each key says of itself where it is declared.

`json_schema.py` describes a recipe, `tables.py` puts schemas into Markdown, `blocks.py` has the generated parts of pages by
name, `pages.py` finds and rewrites them: `python -m distill.reference`, which a test asks for where one is out of date.
"""
