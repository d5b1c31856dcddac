"""The command line: ``main.py`` and one verb a file."""
