"""Server halves of methods: one file per method."""
