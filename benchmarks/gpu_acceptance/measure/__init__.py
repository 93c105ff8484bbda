"""Programs that a line runs in a process of its own. Each prints one JSON document; `{"skipped": why}` is one."""
