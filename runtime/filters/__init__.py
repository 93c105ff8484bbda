"""Filters on the metadata of images: `album = "x" and year >= 2020`.

`tree` says what conditions are and what they mean, `parsing` reads them from text, `metadata` checks what they are
about. Each engine translates the tree into its own language (`sql` for the gallery's SQLite); a test holds them all to
the same answers.
"""
