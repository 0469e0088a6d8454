"""Local halves of methods: one file per local rule."""
