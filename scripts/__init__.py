"""One command per file: parse, wire, run."""
