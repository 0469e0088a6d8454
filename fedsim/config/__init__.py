"""Settings: their types, how a configuration is composed and checked, and how a node of it becomes an object."""
