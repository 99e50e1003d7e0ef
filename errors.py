"""The one exception that is meant for the user."""


class UserError(Exception):
    """Something that the user can mend: one sentence naming what is wrong, where, and what to do."""
