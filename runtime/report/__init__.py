"""Reports: `model` is their content, `html`, `markdown` and `terminal` render it, `files` writes it."""
