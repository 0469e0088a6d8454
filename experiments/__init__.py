"""Reproductions: each module is one command that runs a comparison and ends in tables and plots."""
