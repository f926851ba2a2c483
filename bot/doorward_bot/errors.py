"""What can go wrong for good. Imports nothing of the project."""


class BotError(Exception):
    """Something that the operator has to mend; the argument is the sentence that says how."""
