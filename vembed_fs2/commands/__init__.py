"""The verbs of the command line; their modules import nothing heavy."""
