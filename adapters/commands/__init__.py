"""The commands: what each reads from its line, calls and prints."""
