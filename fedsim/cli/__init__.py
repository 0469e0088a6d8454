"""The command line: words in, words out. Imports nothing heavy."""
