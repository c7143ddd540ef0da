"""The command line: thin. Each command parses, builds, runs once and prints."""
