"""A run from its configuration: its parts, folder, key, assembly and summary."""
