"""The error that the scripts here end with: one line, exit code 2."""


class UserError(Exception):
    """What the user gave is wrong; the message is the line they see."""
