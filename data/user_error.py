class UserError(Exception):
    """What the user gave is wrong; the message is the one line they see, the exit code 2."""
