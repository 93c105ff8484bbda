"""One way to write a report: `model` is what it says, `html`, `markdown` and `terminal` are how, `files` is where."""
