"""The command line: `app` holds the program, the other modules its sub-commands, by what they are for.
Imports every room.
"""
