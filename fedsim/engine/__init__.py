"""Where clients are computed: in this process, or on Ray workers."""
